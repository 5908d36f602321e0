"""The meter: what is observed, which source is trusted, what the user may override."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenvis.errors import BadInput
from greenvis.meters import pricing
from greenvis.meters.coefficients import load_coefficients
from greenvis.meters.energy import Meter, Replay
from greenvis.meters.ledger import Ledger
from greenvis.meters.processes import PortableTree, ProcessTree, open_tree
from greenvis.meters.sources import cpu_time, rapl

BURN = "import time\ne = time.process_time() + {s}\nwhile time.process_time() < e: sum(range(1000))"


def child(seconds: float, then: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BURN.format(s=seconds) + "\n" + then])


def by_the_kernel() -> float:
    """What this process used, and those it waited for, with what they waited for."""
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + waited_for.ru_utime + waited_for.ru_stime


def test_own_work_is_counted_in_full() -> None:
    tree = open_tree()
    before, start = tree.cpu_s(), time.process_time()
    while time.process_time() - start < 0.2:
        sum(range(1000))
    assert tree.cpu_s() - before == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("kind", [ProcessTree, PortableTree])
def test_a_child_that_ends_between_readings_is_counted_once(kind: type[ProcessTree]) -> None:
    tree = kind()
    before, start = tree.cpu_s(), by_the_kernel()
    assert child(0.8).wait() == 0
    used, expected = tree.cpu_s() - before, by_the_kernel() - start
    assert expected > 0.8  # the interpreter's own start-up is work, too
    assert used == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("kind", [ProcessTree, PortableTree])
def test_a_child_seen_alive_and_then_reaped_is_not_doubled(kind: type[ProcessTree]) -> None:
    tree = kind()
    before, start = tree.cpu_s(), by_the_kernel()
    process, readings = child(0.6), []
    while process.poll() is None:
        readings.append(tree.cpu_s() - before)
        time.sleep(0.02)
    readings.append(tree.cpu_s() - before)
    expected = by_the_kernel() - start
    assert readings == sorted(readings)
    assert any(0.1 < r < 0.5 for r in readings)
    assert expected > 0.6
    assert readings[-1] == pytest.approx(expected, abs=0.05)


GRANDCHILD = (
    "import subprocess, sys\nb = subprocess.Popen([sys.executable, '-c', {code!r}], "
    "stdout=subprocess.PIPE)\n"
)
ENDS = BURN.format(s=1.0) + "\nprint('burnt', flush=True)"
WAITS = ENDS + "\ntime.sleep(60)"


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("grandchild", "child_then"),
    [
        (
            WAITS,
            "b.stdout.readline(); print('now', flush=True); sys.stdin.read(); b.kill()",
        ),  # both live
        (
            ENDS,
            "b.communicate(); print('now', flush=True); sys.stdin.read()",
        ),  # the living child waited for its own
        (ENDS, "b.communicate(); print('now', flush=True)"),  # and the child has ended, too
    ],
)
@pytest.mark.parametrize("kind", [ProcessTree, PortableTree])
def test_what_a_grandchild_used_is_counted_once(
    kind: type[ProcessTree], grandchild: str, child_then: str
) -> None:
    tree = kind()
    before = tree.cpu_s()
    process = subprocess.Popen(
        [sys.executable, "-c", GRANDCHILD.format(code=grandchild) + child_then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    if "sys.stdin" not in child_then:
        process.wait()
    tree._walked = -1.0  # the next reading lists the tree anew, however soon it comes
    assert 0.97 <= tree.cpu_s() - before <= 1.9  # two interpreters start, too
    process.communicate()
    assert 0.97 <= tree.cpu_s() - before <= 1.9


def test_an_orphan_goes_on_counting(tmp_path: Path) -> None:
    tree = ProcessTree()
    before = tree.cpu_s()
    begun, go = tmp_path / "begun", tmp_path / "go"
    for fifo in (begun, go):
        os.mkfifo(fifo)
    orphan = f"open({str(begun)!r}, 'w').close(); open({str(go)!r}).read()\n{BURN.format(s=1.0)}\n"
    orphan += f"open({str(begun)!r}, 'w').close(); open({str(go)!r}).read()"
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}]); "
        "sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    begun.read_text()  # it lives
    tree._walked = -1.0
    tree.cpu_s()
    process.communicate()  # its parent ends: it goes to init
    go.write_text("")
    begun.read_text()  # it has burnt
    tree._walked = -1.0
    used = tree.cpu_s() - before
    go.write_text("")  # it may end
    assert 0.97 <= used <= 1.9


def test_shared_memory_of_forked_children_exists_once() -> None:
    block = bytearray(os.urandom(1000) * 60_000)  # 60 MB, written: resident
    tree = ProcessTree()
    tree.cpu_s()  # what earlier tests left running counts in both readings
    alone = tree.resident_gb()
    stop_r, stop_w = os.pipe()
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os.close(stop_w)
            os.read(stop_r, 1)
            os._exit(0)
        pids.append(pid)
    tree._walked = -1.0  # the next reading lists the tree anew
    tree.cpu_s()
    together = tree.resident_gb()
    os.close(stop_w)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(block) == 60_000_000
    assert alone > 0.06
    assert together < alone * 1.6  # five times as much where shared pages are counted for each


def test_phases_sum_to_the_run_and_threads_read_no_other_way() -> None:
    before = time.monotonic()
    ledger = Ledger(Meter())
    start = time.monotonic()
    worker = threading.Thread(target=lambda: sum(range(3_000_000)))
    for name in ("a", "b"):
        path = ledger.enter(name)
        inner = ledger.enter("inner")
        sum(range(200_000))
        ledger.leave(inner)
        ledger.leave(path)
    worker.start()
    worker.join()
    end = time.monotonic()
    ledger.cut()
    after = time.monotonic()
    assert set(ledger.totals) == {"", "a", "a/inner", "b", "b/inner"}
    assert end - start <= ledger.sums()["wall_s"] <= after - before


ADVANCE = """
import os, sys, time
value, end = 1000, time.monotonic() + 600
while time.monotonic() < end and os.path.exists(sys.argv[1]):
    value += 50_000
    for path in sys.argv[1:]:
        fd = os.open(path, os.O_WRONLY); os.pwrite(fd, b"%012d\\n" % value, 0); os.close(fd)
    time.sleep(0.001)
"""


@pytest.fixture
def no_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without RAPL."""
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path / "none")


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A powercap tree whose counters stand still."""
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
    ):
        folder = tmp_path / "powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text("1000\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path / "powercap")
    return tmp_path / "powercap"


@pytest.fixture
def advancing(powercap: Path) -> Iterator[Path]:
    """The same tree, its counters advanced each millisecond by another process, as a processor
    would."""
    files = [str(powercap / zone / "energy_uj") for zone in ("intel-rapl:0", "intel-rapl:0:1")]
    process = subprocess.Popen([sys.executable, "-c", ADVANCE, *files])
    while Path(files[0]).read_text() == "1000\n":
        time.sleep(0.01)
    yield powercap
    process.kill()
    process.wait()


def test_a_counter_that_stands_still_is_not_trusted(powercap: Path) -> None:
    cpu = Meter().components[0]
    assert cpu["source"] == "cpu-time model"
    assert "stood still" in cpu["reason"]


def test_a_counter_that_advances_is_read(advancing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the process that advances it may wait for its turn; the first step ends the load
    monkeypatch.setattr(rapl, "LOAD_S", 60.0)
    source = rapl.Rapl()
    source.open({})
    assert set(source.read()) == {"cpu_j", "dram_j"}  # "core" is part of the package: counted once
    meter = Meter()
    assert [(c["name"], c["source"], c["provenance"]) for c in meter.components[:2]] == [
        ("cpu", "rapl", "measured"), ("ram", "rapl", "measured"),
    ]  # fmt: skip
    while not meter.read()["cpu_j"]:
        assert (advancing / "intel-rapl:0").exists()
    assert meter.read()["cpu_j"] > 0


def test_rapl_counters_wrap_around(powercap: Path) -> None:
    zone = powercap / "intel-rapl:0"
    most = int((zone / "max_energy_range_uj").read_text())  # minutes at the most it can draw
    (zone / "energy_uj").write_text(f"{most - 1_000_000}\n")
    source = rapl.Rapl()
    source.watch_zone("cpu", zone)
    (zone / "energy_uj").write_text("500000\n")
    assert source.read()["cpu_j"] == pytest.approx(1.5)


@pytest.mark.usefixtures("no_rapl")
def test_no_counter_falls_back_to_cpu_time_with_the_reason() -> None:
    cpu, ram, *_ = Meter().components
    assert (cpu["source"], cpu["observation"], cpu["scope"]) == (
        "cpu-time model",
        "cpu_s",
        "process",
    )
    assert "no RAPL" in cpu["reason"]
    assert ram["coefficient"]["low"] < ram["coefficient"]["central"] < ram["coefficient"]["high"]
    assert cpu["citation"]


@pytest.mark.usefixtures("no_rapl")
def test_wall_time_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> ProcessTree:
        raise OSError("the processor time used is not available")

    monkeypatch.setattr(cpu_time, "open_tree", unavailable)  # no such system at hand
    meter = Meter()
    assert [(c["source"], c["provenance"]) for c in meter.components] == [("wall time", "constant")]
    ledger = Ledger(meter)
    time.sleep(0.05)
    ledger.cut()
    watts = meter.components[0]["coefficient"]["central"]
    found = pricing.energy(ledger.sums(), meter.components)["cpu"]
    assert found.value == pytest.approx(watts * ledger.sums()["wall_s"])
    assert ledger.sums()["wall_s"] >= 0.05


@pytest.mark.usefixtures("no_rapl")
def test_the_users_coefficients_and_wall_meter_come_first(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"wall_meter": {"idle_w": 40, "busy_w": 100, "busy_cpus": 10}}))
    cpu = Meter(file).components[0]
    assert (cpu["coefficient"]["low"], cpu["coefficient"]["high"]) == (6.0, 10.0)
    joules = iter(range(0, 1000, 7))
    meter = Meter(wall_meter=lambda: next(joules))
    assert [c["name"] for c in meter.components] == ["machine"]
    ledger = Ledger(meter)
    ledger.cut()
    assert pricing.energy(ledger.sums(), meter.components)["machine"].value == 7.0


def test_the_band_of_an_unnamed_processor_covers_every_server_processor_of_the_table() -> None:
    table = load_coefficients()
    general, ratio = table["cpu_w_per_busy_cpu"], table["cpu_band_of_tdp"]
    servers = [p for p in table["processors"] if re.search("EPYC|Platinum|Gold", p["match"])]
    assert len(servers) >= 8
    for p in servers:
        watts = p["tdp_w"] / p["threads"]
        assert general["low"] <= ratio["low"] * watts <= ratio["high"] * watts <= general["high"], (
            p["match"]
        )
    cited = [float(w) for w in re.findall(r"(\d\.\d+) W \(", general["citation"])]
    assert len(cited) == 4
    assert all(any(abs(w - p["tdp_w"] / p["threads"]) < 0.006 for p in servers) for w in cited)
    assert min(cited) == pytest.approx(min(p["tdp_w"] / p["threads"] for p in servers), abs=0.006)


def test_a_coefficient_says_what_it_is_of_and_from_where() -> None:
    table = load_coefficients()
    assert table["cpu_band_of_tdp"]["low"] <= 1 / 1.4
    assert table["cpu_band_of_tdp"]["high"] >= 1 / 0.6
    assert "arXiv:2509.22092" in table["cpu_band_of_tdp"]["citation"]
    assert "resident" in table["ram_w_per_gb"]["citation"]
    assert "no check of the watts" in table["cpu_w_per_busy_cpu"]["citation"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"cpu_w_per_busy_cpus": {}}', "did you mean 'cpu_w_per_busy_cpu'"),
        ('{"ram_w_per_gb": {"low": 2, "central": 1, "high": 3}}', "low <= central"),
        ('{"wall_meter": {"idle_w": 3}}', "busy_w"),
        ("[1]", "cannot read"),
        ("{", "cannot read"),
    ],
)
def test_a_bad_coefficients_file_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(BadInput, match=word):
        load_coefficients(tmp_path / "c.json")


def test_replay_gives_the_recorded_joules(tmp_path: Path) -> None:
    log = tmp_path / "gpu.jsonl"
    components = [
        {
            "name": "gpu",
            "source": "nvml",
            "observation": "gpu_j",
            "coefficient": {"low": 1, "central": 1, "high": 1},
        }
    ]
    rows = [{"components": components}, *({"wall_s": t, "gpu_j": 300.0 * t} for t in range(4))]
    log.write_text("\n".join(map(json.dumps, rows)))
    ledger = Ledger(Replay(log))
    path = ledger.enter("train")  # second reading: one second in no phase
    ledger.leave(path)
    ledger.cut()
    assert {p: t["gpu_j"] for p, t in ledger.totals.items()} == {"": 600.0, "train": 300.0}
    with pytest.raises(BadInput, match=r"the meter log .* it is a folder"):
        Replay(tmp_path)
