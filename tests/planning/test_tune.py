"""`greenvis tune` measures settings in turns and says which to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greenvis.cli.main import main
from greenvis.errors import BadInput
from greenvis.planning import tune as module
from greenvis.planning.tune import PRESENT, SETTINGS, tune

RECIPE = """
name: tiny
data: {name: digits, train: 100, test: 50}
model: {ref: plain/convnet, channels: [4, 8]}
train: {epochs: 2, batch_size: 25, threads: 1}
arms: {plain: {}, taught: {techniques: [ema]}}
report: {baseline: plain}
meter: {codecarbon: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_settings_are_measured_in_turns(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--runs", str(recipe.parent / "runs"), "--json"]
    assert main(["tune", str(recipe), "--rounds", "1", *words]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert {*(row["setting"] for row in tuned["rows"]), *tuned["refused"]} >= {PRESENT, *SETTINGS}
    assert tuned["refused"]["one thread"] == "the recipe has it"
    as_is = next(row for row in tuned["rows"] if row["setting"] == PRESENT)
    assert (as_is["ratio"], as_is["low"], as_is["high"], as_is["set"]) == (1, 1, 1, [])
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in tuned["rows"])
    assert tuned["tuning_j"] > 0
    assert tuned["floor"] >= 1
    assert tuned["arm"] == "plain"
    assert not (recipe.parent / "runs").exists()


def answers(monkeypatch: pytest.MonkeyPatch, joules: dict[str, list[float]]) -> None:
    """Let the trainings of each setting take so many joules, one a round."""

    def expected(prepared: Any) -> float:
        arm = prepared.job.arm
        names = {
            "channels last": arm.model.model_dump().get("memory_format") == "channels_last",
            "bf16": arm.train.precision == "bf16",
        }
        return joules[", ".join(name for name, has in names.items() if has) or PRESENT].pop(0)

    monkeypatch.setattr(module, "expected", expected)
    monkeypatch.setattr(module, "_has_bf16", lambda: True)


def test_a_setting_is_taken_where_it_takes_less_in_each_round(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, {PRESENT: [4.0] * 4, "channels last": [2.0, 3.0], "bf16": [5.0, 3.0]})
    tuned = tune(recipe, rounds=2)
    assert tuned["pick"] == "channels last"
    best = tuned["rows"][0]
    assert (best["setting"], best["ratio"], best["energy_j"]) == ("channels last", 0.625, 2.5)
    answers(monkeypatch, {PRESENT: [4.0] * 4, "channels last": [3.0, 5.0], "bf16": [5.0, 3.0]})
    assert tune(recipe, rounds=2)["pick"] is None


def test_what_noise_could_save_is_not_taken(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for present, pick in (([4.0, 4.1], "channels last"), ([4.0, 8.0], None)):  # as it is, again
        answers(monkeypatch, {PRESENT: [*present], "channels last": [3.6], "bf16": [9.0]})
        tuned = tune(recipe, rounds=1)
        assert (tuned["floor"], tuned["pick"]) == (present[1] / present[0], pick)


def test_settings_that_take_less_are_measured_together(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joules = {
        PRESENT: [4.0, 4.0, 4.0, 4.0, 8.0, 8.0],
        "channels last": [3.0, 3.0],
        "bf16": [3.0, 3.0],
    }
    answers(monkeypatch, {**joules, "channels last, bf16": [4.0, 4.0]})
    tuned = tune(recipe, rounds=2)
    assert tuned["pick"] == "channels last, bf16"
    row = tuned["rows"][0]
    assert row["ratio"] == 0.5  # to what was measured in turn with it
    assert row["set"] == ["model.memory_format=channels_last", "train.precision=bf16"]


def test_what_is_dear_is_measured_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {PRESENT: [4.0] * 4, "channels last": [3.0, 3.0], "bf16": [40.0]})
    tuned = tune(recipe, rounds=2)
    assert tuned["refused"]["bf16"] == "×10.00 in the first round"
    assert [row["setting"] for row in tuned["rows"]] == ["channels last", PRESENT]


def test_emulated_bf16_is_not_measured(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {PRESENT: [4.0, 4.0], "channels last": [3.0], "bf16": []})
    monkeypatch.setattr(module, "_has_bf16", lambda: False)
    assert "no instructions for bf16" in tune(recipe, rounds=1)["refused"]["bf16"]


def test_bad_input_is_refused(recipe: Path) -> None:
    with pytest.raises(BadInput, match="rounds is 0: give 1 or more"):
        tune(recipe, rounds=0)
    with pytest.raises(BadInput, match=r"train\.epoch"):
        tune(recipe, overrides=["train.epoch=3"])
