"""Counters under a fuzzer: whatever they do, no energy is negative, impossible, or "measured" where
nothing was.

A machine with two packages, a memory counter, three GPUs and a plug, read by two meters at once.
What it truly used is known; its counters begin anew, wrap, freeze, jump, cannot be read; clocks
jump, and the machine sleeps.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from test_nvml import Driver

from greenvis.meters import host, pricing
from greenvis.meters.counter import GRACE_S, Counter
from greenvis.meters.energy import Meter
from greenvis.meters.ledger import Ledger
from greenvis.meters.sources import DOOR, cpu_time, nvml, rapl, wall
from greenvis.testing.meter_sources import on_devices

CPUS, MEMORY_GB, WRAPS_AT_J = 4, 16.0, 65_536.0
ZONES = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "dram"}
WATTS = {"intel-rapl:0": 90.0, "intel-rapl:1": 60.0, "intel-rapl:0:0": 12.0, "gpu0": 300.0,
"gpu1": 40.0, "gpu2": 700.0,
         "plug": 1500.0}  # fmt: skip
MOST_W = {
    "cpu_j": 2 * rapl.MOST_W,
    "dram_j": rapl.MOST_W,
    "gpu_j": 3 * nvml.MOST_W,
    "meter_j": wall.MOST_W,
}


class Host:
    """The machine. `used` holds what each device truly used since boot, `shown` what its counter
    says; None: unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.slept = folder, 1000.0, 0.0
        self.used = dict.fromkeys(WATTS, 0.0)
        self.shown: dict[str, float | None] = dict.fromkeys(WATTS, 5000.0)
        self.frozen: set[str] = set()
        self.cpu_s, self.gb = 7.0, 0.5
        for zone, name in ZONES.items():
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(name)
            (folder / zone / "max_energy_range_uj").write_text(str(int(WRAPS_AT_J * 1e6)))
            self.show(zone, 5000.0)

    def show(self, device: str, value: float | None) -> None:
        self.shown[device] = value
        if device in ZONES:
            if value is not None:
                value = self.shown[device] = value % WRAPS_AT_J
            # in place: the meter holds the file open
            (self.folder / device / "energy_uj").write_text(
                "?" if value is None else f"{int(value * 1e6)}"
            )

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.cpu_s += seconds * 2.5
        for device, watts in WATTS.items():
            self.used[device] += watts * seconds
            if device not in self.frozen and (value := self.shown[device]) is not None:
                self.show(device, value + watts * seconds)

    def plug(self) -> float:
        if (value := self.shown["plug"]) is None:
            raise OSError("plug out of reach")
        return value


class Gpus(Driver):
    def __init__(self, machine: Host) -> None:
        super().__init__(3)
        self.machine = machine

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if (value := self.machine.shown[f"gpu{handle}"]) is None:
            error = self.NVMLError("Unknown Error")
            error.value = 999
            raise error
        return int(value * 1000)


class Tree:
    def __init__(self, machine: Host) -> None:
        self.machine = machine

    def cpu_s(self) -> float:
        return self.machine.cpu_s

    def resident_gb(self) -> float:
        return self.machine.gb


DEVICES = st.sampled_from([*WATTS])
EVENTS = st.one_of(
    st.tuples(st.just("run"), st.floats(1e-4, 20.0)),
    st.tuples(st.just("run"), st.floats(0.01, 1.5)),
    st.tuples(st.just("read"), st.booleans()),
    st.tuples(st.just("phase"), st.sampled_from(["train", "eval"])),
    st.tuples(st.just("reset"), DEVICES, st.floats(0, 50)),
    st.tuples(st.just("jump"), DEVICES, st.floats(-1e9, 1e12)),
    st.tuples(st.just("garbage"), DEVICES, st.sampled_from([float("inf"), 1e300, -5.0])),
    st.tuples(st.just("unreadable"), DEVICES),
    st.tuples(st.just("readable"), DEVICES, st.floats(0, 60_000)),
    st.tuples(st.just("freeze"), DEVICES),
    st.tuples(st.just("thaw"), DEVICES),
    st.tuples(st.just("sleep"), st.floats(2.0, 1e5), st.booleans()),
    st.tuples(st.just("clock"), st.floats(-50.0, 4000.0)),
    st.tuples(st.just("reaped"), st.floats(0, 1e6)),
    st.tuples(st.just("memory"), st.sampled_from([0.0, 0.1, 15.0, 1e9])),
)

CALM = st.one_of(
    st.tuples(st.just("run"), st.floats(0.01, 20.0)),
    st.tuples(st.just("read"), st.booleans()),
    st.tuples(st.just("phase"), st.sampled_from(["train", "eval"])),
)
DAYS = st.one_of(
    st.lists(EVENTS, min_size=4, max_size=60),
    st.tuples(st.lists(CALM, min_size=2), st.lists(EVENTS, max_size=3), st.lists(CALM)).map(
        lambda p: [e for q in p for e in q]
    ),
)


def happen(machine: Host, what: tuple[Any, ...]) -> None:
    kind, *rest = what
    if kind == "run":
        machine.run(rest[0])
    elif kind in ("reset", "readable") or (kind == "garbage" and rest[0] not in ZONES):
        machine.show(rest[0], rest[1])
    elif kind == "jump":
        machine.show(rest[0], max(0.0, (machine.shown[rest[0]] or 0.0) + rest[1]))
    elif kind == "unreadable":
        machine.show(rest[0], None)
    elif kind == "freeze":
        machine.frozen.add(rest[0])
    elif kind == "thaw":
        machine.frozen.discard(rest[0])
    elif kind == "sleep":
        machine.slept += rest[0]
        for device in WATTS:
            if rest[1] and machine.shown[device] is not None:
                machine.show(device, 0.5)
    elif kind == "clock":
        machine.now += rest[0]
    elif kind == "reaped":
        machine.cpu_s += rest[0]
    elif kind == "memory":
        machine.gb = rest[0]


@pytest.fixture(scope="module")
def driver_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("driver") / "version"
    path.write_text("NVRM")
    return str(path)


def patched(machine: Host, driver_file: str, stack: ExitStack) -> None:
    """Let sources look at the machine, its RAPL counters advancing under the short load they begin
    with."""
    load = itertools.count(1)

    def work(*_: Any) -> float:
        machine.run(0.001)
        return next(load) * 0.001

    enter = stack.enter_context
    enter(mock.patch.object(host, "clocks", side_effect=lambda: (machine.now, machine.slept)))
    enter(mock.patch.object(host, "cpus", return_value=CPUS))
    enter(mock.patch.object(host, "memory_gb", return_value=MEMORY_GB))
    enter(mock.patch.object(cpu_time, "open_tree", return_value=Tree(machine)))
    enter(mock.patch.object(nvml, "DRIVER", (driver_file,)))
    enter(mock.patch.dict(sys.modules, {"pynvml": Gpus(machine)}))
    enter(mock.patch.dict(os.environ))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    enter(mock.patch.object(rapl, "time", mock.Mock(perf_counter=work)))
    enter(mock.patch.object(rapl, "POWERCAP", machine.folder))


def opened(machine: Host, driver_file: str, stack: ExitStack, *, plug: bool) -> Meter:
    """Open a meter on the machine."""
    patched(machine, driver_file, stack)
    return Meter(wall_meter=machine.plug if plug else None)


@settings(max_examples=150)
@given(events=DAYS, early=st.one_of(st.just([]), st.lists(EVENTS, max_size=3)), plug=st.booleans())
@example(events=[("run", 1.0), ("run", 1.0), ("run", 1.0), ("reaped", 8.0)], early=[], plug=False)
def test_no_energy_is_negative_impossible_or_measured_where_nothing_was(
    driver_file: str, events: list[tuple[Any, ...]], early: list[tuple[Any, ...]], plug: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        machine = Host(Path(folder))
        for what in early:  # before the meters are opened
            happen(machine, what)
        owners, since = [], []
        for _ in range(
            2
        ):  # the second's opening load takes time that only the first one's window holds
            owners.append(Ledger(opened(machine, driver_file, stack, plug=plug)))
            since.append(machine.now)
        began, elapsed, calm = dict(machine.used), 0.0, True
        clock, longest = machine.now, 0.0
        earlier = [clock - began_at for began_at in since]
        for what in [*events, ("read", True)]:
            if what[0] in ("read", "phase"):
                longest = max(longest, machine.now - clock)
                elapsed, clock = elapsed + max(0.0, machine.now - clock), machine.now
                for owner in owners:
                    owner.cut(full=what[1]) if what[0] == "read" else owner.leave(
                        owner.enter(what[1])
                    )
            else:
                happen(machine, what)
                calm &= what[0] == "run"
        for owner, more in zip(owners, earlier, strict=True):
            judge(owner, elapsed + more)
        if calm and not early and not plug and elapsed > 0.1 and longest < WRAPS_AT_J / rapl.MOST_W:
            exact(owners[-1], machine, began)


def judge(owner: Ledger, elapsed: float) -> None:
    """Hold a ledger against what cannot be."""
    sums, components = owner.sums(), owner.source.components
    assert sums["wall_s"] >= 0
    for totals in [*owner.totals.values(), sums]:
        for quantity, value in totals.items():
            if not quantity.endswith("_unseen_s"):
                assert value >= -1e-9, quantity
    for quantity, watts in (MOST_W | {"cpu_s": 1.25 * CPUS, "ram_gb_s": 1.25 * MEMORY_GB}).items():
        assert sums.get(quantity, 0.0) <= watts * (elapsed + GRACE_S) * (1 + 1e-9) + 1e-6, quantity
    for name, reading in pricing.energy(sums, components).items():
        component = next(c for c in components if c["name"] == name)
        unseen = sums.get(component["observation"] + "_unseen_s", 0.0)
        if reading.value is None:
            event(f"{name} unknown")
            assert reading.reason
            continue
        assert 0 <= (reading.low or 0.0) <= reading.value <= (reading.high or 0.0)
        if unseen > 1e-9:
            event(f"{name} partly unknown")
            assert reading.provenance == "partly unknown"
            assert unseen < sums["wall_s"] + 1e-6
        elif component["provenance"] == "measured":
            event(f"{name} measured")
            assert reading.value > 0
    if any(quantity.endswith("_unseen_s") for quantity in sums):
        assert owner.new_notes()


def exact(owner: Ledger, machine: Host, began: dict[str, float]) -> None:
    """A machine that nothing happened to is measured to the joule."""
    event("nothing happened")
    used = {device: machine.used[device] - began[device] for device in WATTS}
    sums = owner.sums()
    want = {
        "cpu_j": used["intel-rapl:0"] + used["intel-rapl:1"], "dram_j": used["intel-rapl:0:0"],
        "gpu_j": sum(used[f"gpu{i}"] for i in range(3)),
    }  # fmt: skip
    for quantity, joules in want.items():
        assert sums[quantity] == pytest.approx(joules, rel=1e-4, abs=0.02)
    assert not [q for q in sums if q.endswith("_unseen_s") and abs(sums[q]) > 1e-9]


ROUNDS = st.lists(
    st.tuples(
        DEVICES, st.sampled_from(["", "", "reset", "dark", "light", "sleep"]), st.floats(0.01, 1.0)
    ),
    max_size=30,
)


@settings(max_examples=100)
@given(rounds=ROUNDS, plug=st.booleans())
def test_what_is_called_measured_is_what_was_used(
    driver_file: str, rounds: list[tuple[str, str, float]], plug: bool
) -> None:
    """Counters that begin anew and cannot be read, read once a second: missed energy is never
    passed over in silence."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        machine = Host(Path(folder))
        owner = Ledger(opened(machine, driver_file, stack, plug=plug))
        began, hidden = dict(machine.used), dict[str, float]()
        for device, what, seconds in [*rounds, ("plug", "", 1.0)]:
            if what == "reset":
                machine.show(device, 0.5)
            elif what == "dark" and device not in hidden:
                hidden[device] = (machine.shown[device] or 0.0) - machine.used[device]
                machine.show(device, None)
            elif what == "light" and device in hidden:
                machine.show(device, hidden.pop(device) + machine.used[device])
            elif what == "sleep":
                happen(machine, ("sleep", 60.0, True))
            machine.run(seconds)
            owner.cut()
        parts = {
            "cpu": ("intel-rapl:0", "intel-rapl:1"), "ram": ("intel-rapl:0:0",), "gpu": ("gpu0",
            "gpu1", "gpu2"),
            "machine": ("plug",),
        }  # fmt: skip
        for name, reading in pricing.energy(owner.sums(), owner.source.components).items():
            truth = sum(machine.used[d] - began[d] for d in parts[name])
            if reading.value is not None:
                assert reading.value <= truth * 1.0001 + 0.02
            if reading.value is not None and reading.provenance == "measured":
                event(f"{name} measured")
                assert reading.value == pytest.approx(truth, rel=1e-4, abs=0.02)


READINGS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(), st.none(), st.text(max_size=3),
    st.booleans(),
    st.floats(0, 1e4),
)  # fmt: skip


@given(
    readings=st.lists(st.tuples(st.floats(-5, 50), READINGS), max_size=60),
    most=st.floats(0.1, 1e5), wraps_at=st.sampled_from([0.0, 100.0, 65_536.0]),
    patience=st.sampled_from([0.0, 2.0, 1e9]),
)  # fmt: skip
def test_a_single_counter_fed_with_anything(
    readings: list[tuple[float, Any]], most: float, wraps_at: float, patience: float
) -> None:
    counter, now, before, elapsed = (
        Counter("c", most, 0.0, wraps_at=wraps_at, patience_s=patience),
        0.0,
        0.0,
        0.0,
    )
    for step, reading in readings:
        now, elapsed = now + step, elapsed + max(0.0, step)
        counter.take(now, reading)
        assert counter.total >= before
        assert counter.unseen_s(now) >= 0
        before = counter.total
    assert counter.total <= most * (elapsed + GRACE_S) * (1 + 1e-9)
    assert len(counter.new_notes()) <= 6


HAPPENINGS = st.lists(
    st.tuples(
        st.sampled_from(["on", "dark", "light", "anew", "jump", "garbage", "lose"]),
        st.floats(1e-3, 30.0),
        st.floats(0.0, 4.0),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(happenings=HAPPENINGS, dark=st.booleans())
@pytest.mark.parametrize("name", sorted(DOOR.own))
def test_any_meter_source_on_devices_that_do_anything(
    driver_file: str, name: str, happenings: list[tuple[str, float, float]], dark: bool
) -> None:
    """Whatever its counters' devices do, a source says nothing that cannot be."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        machine = Host(Path(folder))
        patched(machine, driver_file, stack)
        make = DOOR.find(name) if name != "wall" else lambda: wall.Wall(machine.plug)
        source, devices = on_devices(make, dark=dark, level=1000.0)
        before, elapsed = source.read(), 0.0
        for what, seconds, load in happenings:
            machine.now, elapsed = machine.now + seconds, elapsed + seconds
            for device in (d for stand_ins in devices.values() for d in stand_ins):
                device.level += load * device.most * seconds
                if what in ("dark", "light"):
                    device.dark = what == "dark"
                elif what in ("anew", "jump", "garbage"):
                    device.level = {"anew": 0.0, "jump": 1e11, "garbage": float("nan")}[what]
            if what == "lose":
                source.lose(machine.now, "the machine slept")
            totals = source.read(machine.now)
            for quantity, stand_ins in devices.items():
                most = sum(d.most for d in stand_ins) * (elapsed + GRACE_S)
                assert before[quantity] <= totals[quantity] <= most * (1 + 1e-9) + 1e-6
                assert 0 <= totals.get(quantity + "_unseen_s", 0.0) <= elapsed + 1e-3
            before = totals
        doubted = any(quantity.endswith("_unseen_s") for quantity in before)
        assert bool(source.new_notes()) == doubted
