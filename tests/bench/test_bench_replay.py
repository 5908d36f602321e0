"""The benchmark of replay says how to install its rival, and times what it says it times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from greenvis.bench import replay
from greenvis.errors import BadInput


def test_without_the_rival_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "avalanche", None)  # as if it were not there
    with pytest.raises(BadInput, match=r"pip install 'greenvis\[bench\]'"):
        replay.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("load", [replay._slices, replay._loaded])
def test_a_step_replays_as_many_as_are_new(load: object, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    model = replay._model("mlp")
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    seconds = replay._ours(model, replay._task(640, 0), replay._task(6 * 32, 1), load)  # type: ignore[arg-type]
    assert sizes == [32] + [64] * 25
    assert seconds > 0
    assert replay._bare(replay._model("mlp"), replay._task(6 * 64, 1)) > 0


def test_rows_set_each_arm_against_the_rival() -> None:
    rows = replay._rows(
        "mlp",
        {
            replay.PEER_ARM: [4.0, 8.0, 4.0],
            replay.OURS: [1.0, 4.0, 3.0],
            replay.BARE: [1.0, 1.0, 1.0],
        },
    )
    ours = rows[1]
    assert (ours["vs_peer"], ours["without_the_model_ms"], ours["target"]) == (
        0.5,
        2000.0,
        "<= 0.5: yes",
    )
    assert rows[0]["target"] == ""


@pytest.mark.slow
def test_measured_beside_the_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("avalanche")
    monkeypatch.setattr(replay, "MODELS", {"mlp": (*replay.MODELS["mlp"][:2], 640)})
    found = replay.run(tmp_path, rounds=1)
    assert [row["arm"] for row in found["rows"]] == [
        replay.PEER_ARM,
        replay.OURS,
        replay.EXACT,
        replay.LOADED,
        replay.BARE,
    ]
    assert "| mlp | avalanche-lib |" in (tmp_path / "report.md").read_text()
