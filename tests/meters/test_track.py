"""`track`: phases, decorator, nesting, ranks, what a record's header says, and what it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

import greenvis as gv
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.meters import pricing
from greenvis.meters.energy import Replay
from greenvis.meters.record import find, read

BURN = (
    "def burn(s):\n    import time\n    e = time.process_time() + s\n    while time.process_time() "
    "< e: sum(range(1000))\n"
)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


def test_phases_nest_and_sum_to_the_run(tmp_path: Path) -> None:
    start = time.monotonic()
    with gv.track("t", dir=tmp_path, country="FRA") as run:
        entered = time.monotonic()
        with run.phase("train"):
            burn(0.1)
            with run.phase("teacher"):
                burn(0.1)
        with run.phase("eval"):
            run.log(accuracy=0.5)
        time.sleep(0.05)
        left = time.monotonic()
    found = read(run.path)
    assert set(found.totals) == {"", "train", "train/teacher", "eval"}
    assert left - entered <= found.sum("wall_s") <= time.monotonic() - start
    assert found.sum("cpu_s", "train") == pytest.approx(0.2, abs=0.02)
    assert found.logs[0]["phase"] == "eval"
    assert run.energy().value == pytest.approx(pricing.run_energy(found).value)
    assert found.header["carbon_intensity"]["zone"] == "FRA"
    assert found.header["carbon_intensity"]["assumed"] is False


def test_the_header_says_which_run_where_and_with_what(tmp_path: Path) -> None:
    with gv.track("a / strange: name", dir=tmp_path) as run:
        pass
    h = read(run.path).header
    assert (h["name"], h["arm"], h["seed"], h["inputs"], h["nested_in"]) == (
        "a / strange: name",
        h["name"],
        0,
        run.id,
        None,
    )
    assert run.path.parent == tmp_path / "a-strange-name"
    assert h["carbon_intensity"]["assumed"] is True
    assert {
        "host",
        "boot_id",
        "pid",
        "rank",
        "world_size",
        "versions",
        "cpu",
        "command",
        "components",
        "clock_s",
    } <= set(h)
    assert h["versions"]["torch"]
    with gv.track("recipe", dir=tmp_path, header={"arm": "lora", "seed": 3, "inputs": "x"}) as run:
        pass
    assert run.path.parent == tmp_path / "recipe" / "lora" / "seed3"


def test_a_decorated_function_is_a_run_each_time(tmp_path: Path) -> None:
    @gv.track("f", dir=tmp_path)
    def double(x: int) -> int:
        return 2 * x

    assert (double(2), double(3)) == (4, 6)
    assert len(list(find([tmp_path]))) == 2
    assert double.__name__ == "double"


def test_two_trackers_at_once_say_who_counts_whom(tmp_path: Path) -> None:
    with gv.track("outer", dir=tmp_path) as outer, gv.track("inner", dir=tmp_path) as inner:
        code = (
            BURN
            + f"import greenvis as gv\nwith gv.track('child', dir={str(tmp_path)!r}): burn(0.1)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    runs = {r.header["name"]: r for r in map(read, find([tmp_path]))}
    assert runs["outer"].header["nested_in"] is None
    assert runs["inner"].header["nested_in"] == outer.id
    assert runs["child"].header["nested_in"] == inner.id
    assert runs["inner"].sum("cpu_s") >= runs["child"].sum("cpu_s")
    assert "GREENVIS_RUN" not in os.environ


def test_a_wrapped_model_gives_facts_and_phases(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    live = wrap(model, [])
    with gv.track("t", live, dir=tmp_path) as run:
        pass
    facts = read(run.path).facts
    assert (facts["params"], facts["trainable_params"], facts["techniques"]) == (23, 8, [])


def test_steps_count_batches_of_any_kind_without_torch(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        list(run.steps([([1, 2, 3], [0, 0, 0])] * 2))
        list(run.steps([{"x": [1, 2]}], phase="eval"))
        with run.phase("train"), run.phase("epoch1"):
            list(run.steps(iter([[[1], [2]]])))
    totals = read(run.path).totals
    assert (totals["train"]["steps"], totals["train"]["samples"]) == (2, 6)
    assert totals["eval"]["samples"] == 2
    assert set(totals) == {"", "train", "eval", "train/epoch1"}


def test_a_bar_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    code = (
        "import greenvis as gv, time\nwith gv.track('t') as run:\n  for _ in run.steps([[1]] * 3): "
        "time.sleep(0.2)\nprint(1)"
    )
    main, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    assert process.wait(timeout=600) == 0
    os.close(terminal)
    assert b"train" in os.read(main, 10_000)
    quiet = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert quiet.stdout == "1\n"
    (line,) = quiet.stderr.splitlines()  # and at its end one line, wherever that goes
    assert re.fullmatch(r"greenvis: t: .+ \(.+\), .+ s; runs/t/.+\.jsonl", line)


def test_a_deleted_working_folder_does_not_stop_the_training(tmp_path: Path) -> None:
    code = (
        f"import os, shutil, greenvis as gv; os.makedirs({str(tmp_path / 'gone')!r}); "
        f"os.chdir({str(tmp_path / 'gone')!r});"
        f"os.rmdir({str(tmp_path / 'gone')!r})\nwith gv.track('t') as run: "
        "pass\nprint(len(run.notes))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 1


def test_uses_notes_and_facts_are_kept(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.uses(
            "teacher", "kd/teacher", ["r1"], pricing.Reading("energy_j", 5.0, 4.0, 6.0), seed=1
        )
        run.fact(macs=1)
        run.fact(macs=2)
        run.note("careful")
    found = read(run.path)
    assert found.uses[0]["energy_j"]["high"] == 6.0
    assert found.uses[0]["seed"] == 1
    assert (found.facts["macs"], found.notes) == (2, ["careful"])


def test_misuse_is_refused_and_use_after_the_end_is_harmless(tmp_path: Path) -> None:
    for bad in ("", "  ", None, 3):
        with pytest.raises(BadInput):
            gv.track(bad, dir=tmp_path)
    with pytest.raises(BadInput):
        gv.track("t", interval_s=0, dir=tmp_path)
    with pytest.raises(BadInput, match="did you mean"):
        gv.track("t", country="FRX", dir=tmp_path)
    with pytest.raises(BadInput, match="not str"):
        gv.track("t", "model", dir=tmp_path)
    run = gv.track("t", dir=tmp_path)
    assert run.energy().value is None
    assert not list(tmp_path.iterdir())
    with run:
        with pytest.raises(GreenvisError, match="started already"):
            run.start()
        with pytest.raises(BadInput):
            run.phase("/")
    with run.phase("late"):
        run.log(x=1)
    run.stop()
    assert read(run.path).logs == []


def test_a_replayed_log_gives_its_own_energy(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        '{"components": [{"name": "gpu", "source": "nvml", "observation": "gpu_j", "coefficient": '
        '{"low": 1, "central": 1, "high": 1}, "provenance": "measured"}]}\n'
        + "".join(f'{{"wall_s": {t}, "gpu_j": {t * 250.0}}}\n' for t in range(5))
    )
    with gv.track("t", dir=tmp_path, source=Replay(log), interval_s=60) as run, run.phase("train"):
        pass
    found = pricing.run_energy(read(run.path))
    assert (found.value, found.provenance) == (750.0, "measured")


RANKED = (
    BURN
    + """
import sys, greenvis as gv
with gv.track("ddp") as run, run.phase("train"):
    burn(0.4); run.add(samples=8, steps=2)
"""
)


def test_two_ranks_of_one_launch_are_one_run(tmp_path: Path) -> None:
    for launched in (1, 2):  # launched again from the same shell: another run
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANKED],
                cwd=tmp_path,
                env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2"},
            )
            for r in range(2)
        ]
        assert [p.wait() for p in ranks] == [0, 0]
        assert len({r.id for r in map(read, find([tmp_path]))}) == launched
    newest = max((r for r in map(read, find([tmp_path]))), key=lambda r: r.header["clock_s"]).id
    runs = [r for r in map(read, find([tmp_path])) if r.id == newest]
    merged = pricing.merge(runs)
    assert sorted(r.header["rank"] for r in runs) == [0, 1]
    assert merged.missing_ranks == []
    assert 0.78 <= merged.totals["train"]["cpu_s"] <= 0.9
    assert (merged.totals["train"]["samples"], merged.totals["train"]["steps"]) == (16, 2)
    assert pricing.merge(runs[:1]).missing_ranks == [1]


@pytest.mark.slow
def test_two_ranks_under_torchrun_with_gloo(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        "import torch, torch.distributed as dist, greenvis as gv\n"
        "torch.set_num_threads(1); dist.init_process_group('gloo')\n"
        "m = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(256, 256))\n"
        "o = torch.optim.SGD(m.parameters(), 0.1)\n"
        "with gv.track('ddp', m) as run:\n"
        "    for x in run.steps([torch.randn(64, 256)] * 30, progress=False):\n"
        "        m(x).square().mean().backward(); o.step(); o.zero_grad()\n"
        "dist.destroy_process_group()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    subprocess.run(
        command, cwd=tmp_path, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    runs = [read(p) for p in find([tmp_path / "runs"])]
    assert len({r.id for r in runs}) == 1
    merged = pricing.merge(runs)
    assert (
        merged.missing_ranks,
        merged.totals["train"]["samples"],
        merged.totals["train"]["steps"],
    ) == ([], 3840, 30)
    assert (
        merged.totals["train"]["flops"] == 3840 * 2 * 2 * 256 * 256
    )  # forward and the weights' gradient


def test_codecarbon_as_a_witness_costs_the_run_nothing(tmp_path: Path) -> None:
    body = (
        BURN + "import greenvis as gv\nwith gv.track('t', codecarbon=True, country='FRA', "
        f"dir={str(tmp_path)!r}): burn(2)"
    )
    out = subprocess.run(
        [sys.executable, "-c", body], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (path,) = find([tmp_path])
    found = read(path)
    fact = found.facts["codecarbon"]
    assert 1.9 < found.sum("cpu_s") < 2.5  # its imports alone take longer
    assert (
        fact["energy_j"] > 0
    )  # whether it agrees the report says: its figure grows with the neighbours' work
    assert fact["tracking_mode"] == "process"
    assert len(out.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t"]  # no CSV, no lock file


def test_start_imports_nothing_heavy(tmp_path: Path) -> None:
    """What start and phases cost is `greenvis bench meter`."""
    code = (
        "import sys; import greenvis as gv; run = gv.track('t', country='FRA').start();"
        "print({'torch', 'pandas', 'codecarbon', 'psutil'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "set()"
