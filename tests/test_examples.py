"""Every example runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import greenvis

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_example(script: Path, tmp_path: Path) -> None:
    done = greenvis(str(script), cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "energy" in done.stdout


def test_every_example_is_listed() -> None:
    text = (EXAMPLES[0].parent / "README.md").read_text()
    notebooks = EXAMPLES[0].parent.glob("*.ipynb")
    assert [p.name for p in (*EXAMPLES, *notebooks) if f"`{p.name}`" not in text] == []
