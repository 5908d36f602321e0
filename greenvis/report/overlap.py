"""Runs that overlap in time: what several of them saw of one counter, or of one process, is counted
once.

A record says on which host and boot, in which process and from when to when it was metered. At any
moment

- a run is *covered* where another, active run counts all that it uses: it lies in the other's
  process tree, or was begun and ended inside the other in the same process. It shows what it saw;
  the total takes that from the other.
- otherwise runs that saw the same counter (of a whole machine; of one process) *share* it, in equal
  parts: nothing in the records says whose a joule was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from greenvis.meters.record import Run, timeline
from greenvis.report.schema import possible

# facts that hold observations, or lists of them
OBSERVED = ("inference", "rounds", "operating_points", "passes", "task_observed")
TOLERANCE = (
    0.05  # of its length: so much later than what it lies in may a run end and still lie in it
)
# time itself is not divided, only what it is priced for
WALL, WALL_SHARE = ("wall_s", "wall_share_s")

Totals = dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Span:
    """One record on its machine. counters: by quantity, whether the whole machine is seen, and the
    devices read."""

    run: str
    nested_in: str | None
    machine: tuple[Any, Any]
    pid: Any
    parents: tuple[Any, ...]
    begin: float
    end: float
    counters: dict[str, tuple[bool, tuple[str, ...]]]


@dataclass
class Piece:
    """A time in which the same runs are active: whether it counts in the total, and the share by
    quantity."""

    begin: float
    end: float
    own: bool
    shares: dict[str, float] = field(default_factory=dict)


def span(run: Run) -> Span | None:
    """Return when and where a record was metered; None where it does not say."""
    h = run.header
    begin, end = h.get("mono_s"), run.last_s
    if not (
        isinstance(begin, (int, float)) and end is not None and h.get("host") and h.get("boot_id")
    ):
        return None
    counters = {
        str(c["observation"]): (
            c.get("scope") == "machine"
            or c["observation"] == WALL,  # watts by the clock are the machine's
            tuple(map(str, c.get("devices") or ())),
        )
        for c in h.get("components") or []
        if c.get("observation")
    }
    return Span(
        run.id,
        h.get("nested_in"),
        (h["host"], h["boot_id"]),
        h.get("pid"),
        tuple(h.get("parents") or ()),
        begin,
        end,
        counters,
    )


def pieces(spans: Sequence[Span]) -> dict[Span, list[Piece]]:
    """Return, for each record of which something is covered or shared, its whole time in pieces."""
    nested = {s.run: s.nested_in for s in spans}
    out: dict[Span, list[Piece]] = {}
    for one, others in _overlapping(spans):
        parts = list(_pieces(one, others, nested))
        if any(not p.own or any(share < 1 for share in p.shares.values()) for p in parts):
            out[one] = parts
    return out


def divided(
    run: Run, parts: Sequence[Piece], header: Mapping[str, Any]
) -> tuple[dict[str, Any], Totals, Totals]:
    """Return header, totals by phase of its share, and totals by phase of what of that counts in a
    sum of all runs."""
    shared: Totals = {}
    own: Totals = {}
    used = {q for piece in parts for q in piece.shares}
    for begin, end, phase, observed in timeline(run.path):
        into, counted = shared.setdefault(phase, {}), own.setdefault(phase, {})
        for quantity, value in observed.items():
            if not possible(quantity, value):
                continue
            share, once = _mean(parts, begin, end, quantity)
            target = WALL_SHARE if quantity == WALL and WALL in used else quantity
            if target != quantity:
                into[quantity] = into.get(quantity, 0.0) + value
            into[target] = into.get(target, 0.0) + value * share
            counted[target] = counted.get(target, 0.0) + value * once
    least = {q: min((p.shares.get(q, 1.0) for p in parts), default=1.0) for q in used}
    components = [
        _component(c, least.get(c.get("observation") or "", 1.0))
        for c in header.get("components") or []
    ]
    return {**header, "components": components}, shared, own


def facts(run_facts: Mapping[str, Any], parts: Sequence[Piece]) -> dict[str, Any]:
    """Return a record's facts with its share of what they observe of serving and tasks."""

    def shared(observed: Any) -> Any:
        if isinstance(observed, list):
            return [shared(one) for one in observed]
        if not isinstance(observed, Mapping):
            return observed
        if not {"from_s", "to_s"} <= observed.keys():
            return {
                key: shared(value) if key in OBSERVED else value for key, value in observed.items()
            }
        return {
            q: v * _mean(parts, observed["from_s"], observed["to_s"], q)[0]
            for q, v in observed.items()
        }

    return {key: shared(value) if key in OBSERVED else value for key, value in run_facts.items()}


def _component(c: Mapping[str, Any], least: float) -> dict[str, Any]:
    out = dict(c)
    if c.get("observation") == WALL:
        out["observation"] = WALL_SHARE
    if least < 1:
        out["source"] = f"{c.get('source')}, shared"
        out["provenance"] = (
            "estimated" if c.get("provenance") == "measured" else c.get("provenance")
        )
    return out


def _overlapping(spans: Sequence[Span]) -> Iterator[tuple[Span, list[Span]]]:
    """Yield each record with those of other runs that overlap it on its machine."""
    by_machine: dict[tuple[Any, Any], list[Span]] = {}
    for s in spans:
        by_machine.setdefault(s.machine, []).append(s)
    for group in by_machine.values():
        active: list[Span] = []
        others: dict[Span, list[Span]] = {s: [] for s in group}
        for s in sorted(group, key=lambda s: (s.begin, s.run)):
            active = [a for a in active if a.end > s.begin]
            for a in active:
                if a.run != s.run:
                    others[a].append(s)
                    others[s].append(a)
            active.append(s)
        yield from ((s, rest) for s, rest in others.items() if rest)


def _pieces(one: Span, others: Sequence[Span], nested: Mapping[str, str | None]) -> Iterator[Piece]:
    moments = sorted(
        {
            one.begin,
            one.end,
            *(m for o in others for m in (o.begin, o.end) if one.begin < m < one.end),
        }
    )
    for begin, end in pairwise(moments):
        active = [o for o in others if o.begin <= begin and o.end >= end]
        above = [o for o in active if _covers(o, one, nested)]
        beside = [o for o in active if o not in above]
        shares = {q: _share(q, one, beside, nested) for q in one.counters}
        yield Piece(begin, end, not above, shares)


def _share(
    quantity: str, one: Span, beside: Sequence[Span], nested: Mapping[str, str | None]
) -> float:
    """Return one's part of a counter: the mean over the devices it reads of 1 / the number of runs
    that see the device."""
    machine, devices = one.counters[quantity]
    same = [o for o in beside if quantity in o.counters and (machine or o.pid == one.pid)]
    parts = []
    for device in devices or ("",):
        sharing = [
            o
            for o in same
            if not devices or not o.counters[quantity][1] or device in o.counters[quantity][1]
        ]
        outer = {o.run for o in sharing if not any(_covers(x, o, nested) for x in (*sharing, one))}
        parts.append(1 / (1 + len(outer)))
    return math.fsum(parts) / len(parts)


def _covers(outer: Span, inner: Span, nested: Mapping[str, str | None]) -> bool:
    """Whether all that one record counts is counted by another as well, as long as that is
    active."""
    if outer is inner or outer.machine != inner.machine:
        return False
    if outer.pid != inner.pid:
        return outer.pid in inner.parents or outer.run in _above(inner.run, nested)
    late = TOLERANCE * (inner.end - inner.begin)
    return (
        outer.run in _above(inner.run, nested)
        and outer.begin <= inner.begin
        and inner.end <= outer.end + late
    )


def _above(run: str, nested: Mapping[str, str | None]) -> list[str]:
    """Return the runs a run says it lies in, the nearest first."""
    out: list[str] = []
    while (above := nested.get(run)) is not None and above not in out:
        out.append(above)
        run = above
    return out


def _mean(parts: Iterable[Piece], begin: float, end: float, quantity: str) -> tuple[float, float]:
    """Return the mean share of a quantity from `begin` to `end`, and the mean of what of that
    counts in a sum."""
    share = once = length = 0.0
    for p in parts:
        both = min(end, p.end) - max(begin, p.begin)
        if both > 0 or (begin == end and p.begin <= begin <= p.end):
            weight, part = max(both, 1e-9), p.shares.get(quantity, 1.0)
            share, once, length = (
                share + weight * part,
                once + weight * part * p.own,
                length + weight,
            )
    return (share / length, once / length) if length else (1.0, 1.0)
