"""The matrix of pairs: what goes together, what is refused with both names, what one of the two refuses alone."""

from __future__ import annotations

import json
from pathlib import Path

from greenvis.bench import compose


def test_pairs_work_are_refused_or_do_not_arise(tmp_path: Path) -> None:
    found = compose.run(tmp_path, ["bitfit", "prompt", "side"], ["timm-vit", "timm-resnet"])
    assert [row["pair"] for row in found["rows"]] == ["bitfit + prompt", "bitfit + side", "prompt + side"]
    assert found["rows"][0] == {"pair": "bitfit + prompt", "timm-vit": "works", "timm-resnet": "alone"}
    assert not [row for row in found["rows"] if "fails" in row.values()]
    assert not found["unclear"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    text = (tmp_path / "report.md").read_text()
    assert "| bitfit | 1/1 |" in text
    assert "**0 fail.**" in text
