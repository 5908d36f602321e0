"""A counter is believed step by step: resets, wraps, gaps, plugs out of reach, machines that
slept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import greenvis as gv
from greenvis.meters import host, pricing
from greenvis.meters.counter import GRACE_S, Counter
from greenvis.meters.energy import Meter
from greenvis.meters.ledger import Ledger
from greenvis.meters.record import read
from greenvis.meters.sources import cpu_time
from greenvis.meters.sources.base import ONE
from greenvis.meters.sources.rapl import Rapl

LIFETIME = 3.6e8  # J a plug has counted since it was bought


class Plug:
    """Answers the script's values in order, the last one again; None: out of reach."""

    def __init__(self, *script: float | str | None) -> None:
        self.script, self.calls = script, 0

    def __call__(self) -> Any:
        value = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        if value is None:
            raise OSError("plug out of reach")
        return value


def plugged(tmp_path: Path, *script: float | str | None) -> gv.track:
    with gv.track("plug", dir=tmp_path, wall_meter=Plug(*script), interval_s=100) as run:
        for _ in range(6):
            run.energy()
    return run


@pytest.mark.parametrize(
    ("script", "joules", "provenance", "word"),
    [
        # dropped before the run began
        ((0, LIFETIME, LIFETIME + 5, LIFETIME + 10), 10.0, "measured", "cannot be"),
        ((LIFETIME, LIFETIME, LIFETIME + 5, LIFETIME + 10), 10.0, "measured", ""),
        ((None, None, LIFETIME, LIFETIME + 5), 5.0, "partly unknown", "out of reach"),
        ((LIFETIME, LIFETIME, LIFETIME + 5, 1.0, 6.0), 10.0, "partly unknown", "cannot be"),
        # the gap is bridged
        ((LIFETIME, LIFETIME, None, None, LIFETIME + 5), 5.0, "measured", "out of reach"),
        ((LIFETIME, LIFETIME, LIFETIME + 5, None), 5.0, "partly unknown", "out of reach"),
        ((LIFETIME, LIFETIME, LIFETIME + 5, 9e99, LIFETIME + 9), 5.0, "partly unknown", "cannot "
                                                                                        "be"),
        ((LIFETIME, LIFETIME, "nan", LIFETIME + 4), 4.0, "measured", "nan"),
        ((None,), None, "partly unknown", "out of reach"),
        (("watts",), None, "partly unknown", "watts"),
    ],
)  # fmt: skip
def test_a_plug_is_believed_only_where_it_can_be(
    tmp_path: Path, script: tuple[Any, ...], joules: float | None, provenance: str, word: str
) -> None:
    run = plugged(tmp_path, *script)
    for reading in (run.energy(), pricing.run_energy(read(run.path))):
        assert (reading.value, reading.provenance) == (joules, provenance)
    assert word in "; ".join(run.notes) if word else run.notes == []
    assert read(run.path).notes == run.notes


def test_a_plug_that_stands_still_measures_nothing(tmp_path: Path) -> None:
    reading = plugged(tmp_path, LIFETIME).energy()
    assert reading.value is None
    assert "stood still" in reading.reason


def test_a_phase_that_was_not_seen_says_so_and_the_run_is_whole(tmp_path: Path) -> None:
    plug = Plug(*[LIFETIME] * 2, LIFETIME + 1, None, None, LIFETIME + 9)
    with gv.track("plug", dir=tmp_path, wall_meter=plug, interval_s=100) as run:
        run.energy()
        for name in ("dark", "light"):
            with run.phase(name):
                run.energy()
    record = read(run.path)
    parts = {name: reading["machine"] for name, reading in pricing.phases(record).items()}
    assert parts["dark"].value is None
    assert parts["light"].provenance == "partly unknown"  # it holds what the dark phase used
    whole = pricing.run_energy(record)
    assert (whole.value, whole.provenance) == (9.0, "measured")


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    (folder / "name").write_text("package-0\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    return folder


def put(zone: Path, joules: float) -> None:
    (zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")


def watching(zone: Path, joules: float) -> Rapl:
    put(zone, joules)
    source = Rapl()
    source.watch_zone("cpu", zone)
    return source


@pytest.mark.parametrize(
    ("values", "range_uj", "joules", "doubted"),
    [
        # began anew: the step is dropped, not taken for a wrap
        ((5000.0, 5010.0, 2.0, 4.0), "262143328850", 12.0, True),
        ((262143.0, 4.0), "262143328850", 4.32885, False),
        ((9.0, 0.5), "10000000", 1.5, False),
        ((9.0, 0.5), None, 0.0, True),  # where it wraps is not known
        ((9.0, 0.5), "0", 0.0, True),
        ((9.0, 0.5), "?", 0.0, True),
        ((5.0, 5e5, 6.0, 8.0), "262143328850", 2.0, True),  # a garbled reading
    ],
)  # fmt: skip
def test_rapl_tells_a_wrap_from_a_reset(
    zone: Path, values: tuple[float, ...], range_uj: str | None, joules: float, doubted: bool
) -> None:
    limit = zone / "max_energy_range_uj"
    limit.unlink() if range_uj is None else limit.write_text(range_uj)
    counters = watching(zone, values[0])
    for value in values[1:]:
        put(zone, value)
        reading = counters.read()
    assert reading["cpu_j"] == pytest.approx(joules)
    assert ("cpu_j_unseen_s" in reading) == doubted == bool(counters.new_notes())


def test_rapl_read_too_seldom_to_see_it_wrap_is_not_believed(zone: Path) -> None:
    counters = watching(zone, 1.0)
    opened = host.clocks()[0]
    put(zone, 2.0)
    reading = counters.read(opened + 3600)  # 262 kJ last for some minutes
    assert reading["cpu_j"] == 0
    assert reading["cpu_j_unseen_s"] == pytest.approx(3600, abs=1)


def test_a_machine_that_slept_may_have_begun_its_counters_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0, 0.0]
    monkeypatch.setattr(host, "clocks", lambda: (clock[0], clock[1]))
    meter = Meter(wall_meter=Plug(50.0, 51.0, 58.0, 60.0))
    clock[0] = 101.0
    assert meter.read()["meter_j"] == 1.0
    clock[:] = [102.0, 3600.0]  # it slept for an hour; the plug went on, or did not: who knows
    reading = meter.read()
    assert (reading["meter_j"], reading["meter_j_unseen_s"]) == (1.0, pytest.approx(1.0, abs=1e-5))
    clock[0] = 103.0
    assert meter.read()["meter_j"] == 3.0
    assert any("slept" in note for note in meter.new_notes())


class Machine:
    """Any source of the user's: totals of its own, as wrong as they like."""

    def __init__(self, *rows: dict[str, float]) -> None:
        self.rows, self.next = rows, 0
        self.components = [
            {
                "name": q,
                "source": q,
                "scope": "machine",
                "observation": q,
                "coefficient": ONE,
                "provenance": "measured",
            }
            for q in rows[-1]
            if q != "wall_s"
        ]

    def read(self, full: bool = True) -> dict[str, float]:
        self.next += 1
        return dict(self.rows[min(self.next, len(self.rows)) - 1])

    def corrections(self) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize(
    ("totals", "sums"),
    [
        ([{"cpu_j": 5e8}, {"cpu_j": 5e8 + 9}, {"cpu_j": 3.0}, {"cpu_j": 4.0}], {"cpu_j": 10.0}),
        ([{"gpu_j": 0.0}, {"gpu_j": float("nan")}, {"gpu_j": 4.0}], {"gpu_j": 4.0}),
        ([{}, {"meter_j": 5e8}, {"meter_j": 5e8 + 2}], {"meter_j": 2.0}),
        ([{"cpu_s": 5.0}, {"cpu_s": 7.0}, {"cpu_s": 1.0}, {"cpu_s": 2.0}], {"cpu_s": 3.0}),
        ([{"cpu_s": 5.0}, {"cpu_s": 9e9}, {"cpu_s": 9e9 + 1}], {"cpu_s": 1.0}),
    ],
)  # fmt: skip
def test_no_source_is_believed_blindly(
    totals: list[dict[str, float]], sums: dict[str, float]
) -> None:
    source = Machine(*({"wall_s": float(i)} | row for i, row in enumerate(totals)))
    ledger = Ledger(source)
    for _ in totals[1:]:
        ledger.cut()
    assert {q: ledger.sums()[q] for q in sums} == sums
    unseen = [q for q in ledger.sums() if q.endswith("_unseen_s")]
    assert bool(unseen) == bool(ledger.new_notes())


def test_a_clock_that_goes_back_takes_no_time_away() -> None:
    ledger = Ledger(Machine(*({"wall_s": t} for t in (50.0, 55.0, 10.0, 12.0))))
    seconds = []
    for _ in range(3):
        ledger.cut()
        seconds.append(ledger.sums()["wall_s"])
    assert seconds == [5.0, 5.0, 7.0]


def test_processor_time_and_memory_are_counters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tree:
        cpu, gb = 5.0, 1.0

        def cpu_s(self) -> float:
            return self.cpu

        def resident_gb(self) -> float:
            return self.gb

    tree, clock = Tree(), [0.0, 0.0]
    monkeypatch.setattr(cpu_time, "open_tree", lambda: tree)
    monkeypatch.setattr(host, "clocks", lambda: (clock[0], clock[1]))
    monkeypatch.setattr(host, "cpus", lambda: 2)
    ledger = Ledger(meter := Meter(sources=[cpu_time.CpuTime()]))
    for now, tree.cpu, tree.gb in ((1.0, 6.5, 1.0), (2.0, 9000.0, 0.0), (3.0, 9001.0, 1.0)):
        clock[0] = now
        ledger.cut()
    parts = pricing.energy(ledger.sums(), meter.components)
    assert (
        ledger.sums()["cpu_s"] == 2.5
    )  # reaped by this process, but never its own: 9000 CPU-seconds within a second
    assert parts["cpu"].provenance == "partly unknown"
    assert ledger.sums()["ram_gb_s"] == pytest.approx(3.0)
    assert parts["ram"].provenance == "estimated"


def steps(
    counter: Counter,
    readings: list[tuple[float, Any]],
    each: Callable[[float], None] = lambda now: None,
) -> None:
    for now, reading in readings:
        counter.take(now, reading)
        each(now)


def test_small_steps_in_a_row_do_not_outgrow_the_power() -> None:
    counter = Counter("c", 100.0, 0.0)
    steps(counter, [(i * 1e-6, 5.0 * i) for i in range(100)])
    assert counter.total <= 100.0 * (GRACE_S + 1e-4)


def test_a_counter_that_moves_rarely_is_believed_for_the_whole_time_since() -> None:
    counter = Counter("c", 100.0, 0.0)
    steps(
        counter, [(float(i), 3600.0 * (i // 72)) for i in range(200)]
    )  # whole watt-hours, at 50 W
    assert counter.total == 7200.0
    assert counter.unseen_s(200.0) == 0


def test_a_counter_that_stops_for_good_is_unseen_since() -> None:
    counter = Counter("c", 100.0, 0.0, patience_s=2.0)
    steps(counter, [(i / 10, min(i, 50)) for i in range(200)])
    assert counter.unseen_s(19.9) == pytest.approx(14.9)
    assert counter.new_notes() == ["c: the counter stood still"]
    assert counter.new_notes() == []


def test_a_failed_first_reading_is_no_baseline_and_its_time_stays_unseen() -> None:
    counter = Counter("c", 10.0, 0.0)
    counter.take(1.0, None, "out of reach")
    counter.take(2.0, 500.0)  # what it had counted before anybody asked
    counter.take(3.0, 505.0)
    assert (counter.total, counter.unseen_s(3.0)) == (5.0, pytest.approx(2.0))
