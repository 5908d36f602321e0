"""A recipe with a base, a kept teacher and a report, killed before any of its writes: the next run
ends as if nothing was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("first", "step", "kinds"),
    [
        pytest.param(3, 15, ("replace", "rename"), id="some-renames"),
        pytest.param(12, 37, ("write", "unlink", "remove"), id="some-others"),
        *(
            pytest.param(i, 4, killed.WRITES, id=f"all-{i}-of-4", marks=pytest.mark.slow)
            for i in range(1, 5)
        ),
    ],
)
def test_killed_before_any_write_the_next_run_ends_as_if_nothing_was(
    first: int, step: int, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "tiny.yaml").write_text(TINY)
    counted = [str(first), str(step), ",".join(kinds)]
    command = [sys.executable, killed.__file__, *counted, str(tmp_path / "tiny.yaml")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *others = map(json.loads, done.stdout.splitlines())
    assert len(whole["weights"]) == 3
    assert len(whole["losses"]["tiny/taught"]) == 2
    assert others[-1]["ended"] == killed.FINISHED  # the loop went over all writes
    assert [one["ended"] for one in others[:-1]] == [9] * (len(others) - 1)
    assert len(others) > 2
    assert {one["at"].split()[0] for one in others[:-1]} <= set(kinds)
    for one in others:
        at = (one["number"], one["at"], one["said"])
        assert one["code"] == 0, at
        assert one["litter"] == [], at
        assert one["fitting"], at
        for part in ("weights", "marked", "reported", "losses"):
            assert one[part] == whole[part], at
