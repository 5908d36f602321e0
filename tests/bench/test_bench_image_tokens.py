"""The benchmark of image tokens: settings in turns, two of them twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from greenvis.bench import image_tokens


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_tokens, "PATCHES", (8,))


def test_it_writes_its_report(small: None, tmp_path: Path) -> None:
    rows = image_tokens.run(tmp_path, [2], rounds=1)["rows"]
    assert [r["setting"] for r in rows] == [*image_tokens.SETTINGS]
    assert {r["image_tokens"] for r in rows} == {16}
    assert rows[0]["energy_ratio"] == 1
    page = (tmp_path / "report.md").read_text()
    assert "Noise floor of energies: ×" in page
    assert "| 16 | 2 | larger patches |" in page


def test_settings_answer_with_the_tokens_they_say() -> None:
    x, labels = image_tokens._asked(3)
    seen: list[int] = []
    for name in image_tokens.SETTINGS:
        arm: Any = image_tokens._arm(name, 8, labels)
        text = arm.model.model.language_model
        text.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        seen.clear()
        assert arm(x).shape[:2] == (3, image_tokens.ANSWER)
        want = 16 if "all tokens" in name else 4
        assert seen == [want + image_tokens.QUESTION, 1]


def test_figures_are_per_answer_and_noise_is_of_the_same_work() -> None:
    spent = {
        "all tokens": [(0.4, 8.0), (0.2, 4.0), (0.2, 4.0)],
        "merge": [(0.2, 2.0), (0.2, 2.0), (0.2, 2.0)],
        "merge again": [(0.2, 3.0), (0.2, 2.5), (0.2, 2.5)],
        "larger patches": [(0.2, 1.0), (0.2, 1.0), (0.2, None)],
    }
    rows = {r["setting"]: r for r in image_tokens._rows(64, 4, spent)}
    assert (rows["all tokens"]["ms"], rows["all tokens"]["energy_j"]) == (50, 1)
    assert rows["merge"]["energy_ratio"] == 0.5
    assert rows["larger patches"]["energy_j"] is None
    assert image_tokens._apart([*rows.values()]) == pytest.approx(0.625 / 0.5)
