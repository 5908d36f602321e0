"""The benchmark beside peers does the same work in each arm, and says what it compares with what."""

from __future__ import annotations

from pathlib import Path

import pytest

from greenvis.bench import peers
from greenvis.bench._digits import digits
from greenvis.bench.peers import _works
from greenvis.bench.peers._work import Arm, Trained, Work
from greenvis.errors import BadInput


def test_an_unknown_work_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown work 'distilation'; did you mean 'distillation'"):
        peers.run(tmp_path / "out", ["distilation"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_set_each_arm_against_the_first_within_a_round() -> None:
    arms = [
        Arm("plain", lambda seed: Trained(2.0 + seed, 0.5)),
        Arm("ours", lambda seed: Trained((2.0 + seed) * (0.4 if seed else 9.0), 0.6), 7, ours=True),
    ]
    work = Work("w", "what", 0.5, arms)
    first, second = peers._rows(work, peers._measured(work, 3))
    assert (first["cpu_s"], first["vs_peer"], first["target"]) == (4.0, 1.0, "")
    assert (second["vs_peer"], second["accuracy"], second["lines"]) == (0.4, 60.0, 7)
    assert second["target"] == "<= 0.5: yes"


def test_the_images_of_training_and_test_are_others() -> None:
    x, y, of_test, labels = digits(8)
    assert (len(x), len(y), len(of_test), len(labels)) == (500, 500, 450, 450)
    assert x.shape[1:] == (3, 8, 8)
    assert not any((x == one).flatten(1).all(1).any() for one in of_test[:50])


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        lambda: _works.low_rank(epochs=1),
        lambda: _works.metering(epochs=1),
        lambda: _works.fine_tuning(32, 1),
        lambda: _works.frozen_prefix(32, 2),
        lambda: _works.distillation(32, 2),
    ],
)
def test_every_arm_trains(work: object, tmp_path: Path) -> None:
    one = work()  # type: ignore[operator]
    for arm in one.arms:
        trained = arm.train(0)
        assert trained.cpu_s > 0
        assert 0 <= trained.accuracy <= 1
