"""`greenvis tune` measures settings in turns and says which to take."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert {row["setting"] for row in tuned["rows"]} == {*SETTINGS}
    as_is = next(row for row in tuned["rows"] if row["setting"] == PRESENT)
    assert (as_is["ratio"], as_is["low"], as_is["high"], as_is["set"]) == (1, 1, 1, [])
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in tuned["rows"])
    assert tuned["tuning_j"] > 0
    assert tuned["arm"] == "plain"
    assert not (recipe.parent / "runs").exists()


def test_a_setting_is_taken_where_it_takes_less_in_each_round(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joules = iter([4.0, 2.0, 5.0, 3.0, 3.0, 3.0, 3.0, 5.0, 2.0, 4.0])  # the second round turns
    monkeypatch.setattr(module, "expected", lambda prepared: next(joules))
    tuned = tune(recipe, rounds=2)
    assert tuned["pick"] == "channels last"
    best = tuned["rows"][0]
    assert (best["setting"], best["ratio"], best["energy_j"]) == ("channels last", 0.5, 2.0)
    joules = iter([4.0, 3.0, 5.0, 5.0, 5.0, 6.0, 6.0, 6.0, 5.0, 4.0])
    assert tune(recipe, rounds=2)["pick"] is None


def test_bad_input_is_refused(recipe: Path) -> None:
    with pytest.raises(BadInput, match="rounds is 0: give 1 or more"):
        tune(recipe, rounds=0)
    with pytest.raises(BadInput, match=r"train\.epoch"):
        tune(recipe, overrides=["train.epoch=3"])
