"""A recipe with a base, a kept teacher and a report, killed before any of its writes: the next run
ends as if nothing was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import greenvis

from tests.hostile import killed

DATA = """\
data: {name: digits, train: 64, test: 32, img_size: 8}
model: {ref: plain/mlp, img_size: 8, hidden: [8]}
meter: {codecarbon: false}
"""
BASE = f"name: base\n{DATA}train: {{epochs: 1, batch_size: 32}}\narms: {{full: {{}}}}\n"
TINY = f"""\
name: tiny
{DATA}train: {{epochs: 2, batch_size: 32, checkpoint_every_s: 1.0e-9}}
arms:
  alone: {{}}
  taught: {{techniques: [{{distill: {{teacher: "run:base", cache: true}}}}]}}
"""


RENAMES, OTHERS = killed.WRITES[:2], killed.WRITES[2:]


@pytest.mark.parametrize(
    "loops",
    [
        pytest.param([(3, 37, RENAMES), (12, 71, OTHERS)], id="some"),
        *(
            pytest.param([(i, 4, killed.WRITES)], id=f"all-{i}-of-4", marks=pytest.mark.slow)
            for i in range(1, 5)
        ),
    ],
)
def test_killed_before_any_write_the_next_run_ends_as_if_nothing_was(
    loops: list[tuple[int, int, tuple[str, ...]]], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = [f"{first}:{step}:{','.join(kinds)}" for first, step, kinds in loops]
    done = greenvis(killed.__file__, str(tmp_path / "tiny.yaml"), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *others = map(json.loads, done.stdout.splitlines())
    assert len(whole["weights"]) == 3
    assert len(whole["losses"]["tiny/taught"]) == 2
    ends = [i for i, one in enumerate(others) if one["ended"] == killed.FINISHED]
    assert len(ends) == len(loops)  # each went over all writes
    assert ends[-1] == len(others) - 1
    assert {one["ended"] for one in others} == {9, killed.FINISHED}
    for (_, _, kinds), begin, end in zip(loops, [0, *(i + 1 for i in ends)], ends, strict=False):
        assert end - begin >= 2
        assert {one["at"].split()[0] for one in others[begin:end]} <= set(kinds)
    for one in others:
        at = (one["number"], one["at"], one["said"])
        assert one["code"] == 0, at
        assert one["litter"] == [], at
        assert one["fitting"], at
        for part in ("weights", "marked", "reported", "losses"):
            assert one[part] == whole[part], at
