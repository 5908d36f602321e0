"""The contract every meter source keeps, as a check that authors of plug-ins can run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from greenvis.errors import GreenvisError
from greenvis.meters import host, pricing
from greenvis.meters.coefficients import load_coefficients
from greenvis.meters.counter import GRACE_S
from greenvis.meters.record import PROVENANCES, UNSEEN
from greenvis.meters.sources import MeterSource, installed
from greenvis.testing._loop import Broken

LIFETIME = 1e12  # what a counter may say at first: all it has counted since it was made


class Device:
    """Stands in for what a counter reads.

    Args:
        most: what the source says it can grow by in a second.
        load: the share of it that it does grow by.
        level: what the counter says at first.
        dark: whether it cannot be read.
    """

    def __init__(self, most: float, load: float = 0.5, level: float = 0.0, dark: bool = False):
        self.most, self.power, self.level, self.dark = most, load * most, level, dark
        self._start = host.clocks()[0]

    def __call__(self, now: float) -> float:
        """Return what the counter says."""
        if self.dark:
            raise OSError("out of reach")
        return self.level + self.power * (now - self._start)

    def begin_anew(self, now: float) -> None:
        """Start from nothing, as after a restart."""
        self.level -= self(now)


def check_meter_source(make: Callable[[], MeterSource]) -> str:
    """Try a meter source against the contract.

    It opens or says why not. What it reads is never negative, never more than its power × time;
    a first reading that fails is no baseline; what cannot be read has no figure, but a reason; and
    a counter that began anew or jumped is noted, and that step is in no total.

    Args:
        make: Returns a new source at each call; its class, where that takes no arguments. Where the
            device is not here, let the class look at a stand-in for its files or library.

    Returns:
        "" where all was tried; else why it cannot be read here: then nothing more was.

    Raises:
        GreenvisError: With the first rule it breaks.

    Example:
        >>> from greenvis.meters.sources.cpu_time import CpuTime
        >>> check_meter_source(CpuTime)
        ''
    """
    source = make()
    try:
        _check_names(source)
        _open(source)
        if source.reason:
            _require(not source.components and not source.read(), "it has a reason and readings")
            return source.reason
        _check_components(source)
        _check_readings(source)
        for check in (_check_power, _check_failing_first_reading, _check_gap, _check_reset):
            check(make)
    except Exception as error:  # whatever it raises is its failure, not the checker's
        name = getattr(source, "name", type(source).__name__)
        what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        raise GreenvisError(f"meter source '{name}': {what}") from error
    return ""


def _require(holds: object, broken: str) -> None:
    if not holds:
        raise Broken(broken)


def _check_names(source: MeterSource) -> None:
    _require(type(source).__doc__, "its class says nothing of what it reads (a docstring)")
    _require(source.quantities, "`quantities` names nothing that it measures")
    values = [*source.quantities.values()]
    _require(len(values) == len({*values}), "two of its components are recorded as one quantity")
    for other in installed()[0]:
        both = {*other.quantities.values()} & {*values}
        same = other.name == source.name
        _require(same or not both, f"{', '.join(both)} is recorded by '{other.name}' already")


def _open(source: MeterSource) -> None:
    source.open(load_coefficients())
    _require(source.components or source.reason, "it covers nothing, and gives no reason")


def _check_components(source: MeterSource) -> None:
    """Hold what it offers to a record against what pricing needs."""
    json.dumps(source.components)
    for c in source.components:
        quantity, k = source.quantities.get(c["name"]), c["coefficient"]
        _require(c["observation"] == quantity, f"{c['name']} is recorded as {c['observation']}")
        _require(c["provenance"] in PROVENANCES, f"{c['provenance']!r} is no provenance")
        _require(c["scope"] in ("process", "machine"), f"{c['scope']!r} is no scope")
        _require(0 <= k["low"] <= k["central"] <= k["high"], f"{k} is no coefficient in order")


def _check_readings(source: MeterSource) -> None:
    """Read the device itself for a moment."""
    began, before = host.clocks()[0], source.read()
    for _ in range(2):
        time.sleep(0.05)
        totals = source.read()
        _require(
            all(totals[q] >= v for q, v in before.items()), f"{before} was followed by {totals}"
        )
        before = totals
    _require(host.clocks()[0] > began, "the clock stands still")
    notes = source.new_notes()
    _require(not notes, f"{'; '.join(notes)}: is it in joules, and `most` in watts?")


def on_devices(
    make: Callable[[], MeterSource], **device: Any
) -> tuple[MeterSource, dict[str, list[Device]]]:
    """Return a source that was opened while its counters read stand-ins, and these by quantity.

    Args:
        make: as `check_meter_source` has it.
        device: arguments of each `Device`.
    """
    source, devices = make(), dict[str, list[Device]]()
    watch = source.watch

    def interposed(component: str, _: Any, most: float, *args: Any, **kwargs: Any) -> Any:
        stand_in = Device(most, **device)
        devices.setdefault(source.quantities[component], []).append(stand_in)
        return watch(component, stand_in, most, *args, **kwargs)

    source.watch = interposed  # type: ignore[method-assign]
    _open(source)
    return source, {} if source.reason else devices


def _all(devices: dict[str, list[Device]]) -> list[Device]:
    return [device for stand_ins in devices.values() for device in stand_ins]


def _reads(source: MeterSource, moments: Iterable[float]) -> dict[str, float]:
    """Read at each moment, and require that no total falls."""
    totals: dict[str, float] = {}
    for now in moments:
        before, totals = totals, source.read(now)
        for quantity, value in before.items():
            if not quantity.endswith(UNSEEN):
                _require(0 <= value <= totals[quantity], f"{quantity} fell from {value:g}")
    return totals


def _check_power(make: Callable[[], MeterSource]) -> None:
    """A counter that is well is counted in full; one beyond its power, up to that."""
    for load in (0.5, 3.0):
        source, devices = on_devices(make, load=load)
        began = host.clocks()[0]
        first = source.read(began)
        totals = _reads(source, [began + second for second in range(1, 6)])
        for quantity, stand_ins in devices.items():
            step = totals.get(quantity, 0.0) - first[quantity]
            most = sum(d.most for d in stand_ins) * (5 + GRACE_S)
            used = sum(d.power for d in stand_ins) * 5
            right = step <= most if load > 1 else abs(step - used) < 0.01 * used
            _require(right, f"{quantity} says {step:g} of {used:g}, where {most:g} is possible")
        _require(load > 1 or not source.new_notes(), "a counter that is well gives notes")


def _check_failing_first_reading(make: Callable[[], MeterSource]) -> None:
    source, devices = on_devices(make, dark=True, level=LIFETIME)
    if not devices:
        return
    began = host.clocks()[0]
    dark = source.read(began + 1)
    for component, reading in pricing.energy(dark | {"wall_s": 1.0}, source.components).items():
        _require(
            reading.value is None and reading.reason,
            f"{component} cannot be read, and has the figure {reading.value} without a reason",
        )
    for device in _all(devices):
        device.dark = False
    totals = _reads(source, [began + 2])
    for quantity in devices:
        _require(totals[quantity] == 0, f"{quantity} takes a first reading for a step")
        _require(totals.get(quantity + UNSEEN, 0.0) > 0, f"{quantity}: time unseen is not told")
    _require(source.new_notes(), "a reading that failed is not noted")


def _check_gap(make: Callable[[], MeterSource]) -> None:
    source, devices = on_devices(make)
    began = host.clocks()[0]
    _reads(source, [began + 1])
    for device in _all(devices):
        device.dark = True
    totals = _reads(source, [began + 1.5])
    for quantity in devices:
        _require(totals.get(quantity + UNSEEN, 0.0) > 0, f"{quantity}: time unseen is not told")


def _check_reset(make: Callable[[], MeterSource]) -> None:
    """A counter that began anew, and one that says what cannot be, lose that step and no more."""
    for restart in (True, False):
        source, devices = on_devices(make, level=1000.0)
        began = host.clocks()[0]
        before = _reads(source, [began + 1])
        for device in _all(devices):
            if restart:
                device.begin_anew(began + 1.5)
            else:
                device.level += LIFETIME
        after = _reads(source, [began + 1.5])
        for quantity in devices:
            step = after[quantity] - before[quantity]
            _require(step == 0, f"{quantity} takes a restart or jump for {step:g}")
            _require(after.get(quantity + UNSEEN, 0.0) > 0, f"{quantity}: the gap is not told")
        _require(not devices or source.new_notes(), "a counter that began anew is not noted")
