"""What a run used beside energy: labels and images, as counts. Standard library only.

A line of the record states how many there are under a name: the same line again, from a resumed
start or another process, states the same and adds nothing; other names add up. What a label takes
a person is known on reading (`seconds`, `hours`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from greenvis.errors import BadInput, nearest

# what a person says of a sample; review: looks again at a label there is
Kind = Literal[
    "class", "multilabel", "mask", "box", "bag", "candidate", "caption", "pair", "number", "review"
]
# what labels were spent on; bought: in the course of the training
Purpose = Literal["training", "threshold", "selection", "bought"]
Role = Literal["labelled", "unlabelled", "target", "synthetic"]  # of images
KINDS: tuple[str, ...] = get_args(Kind)
PURPOSES: tuple[str, ...] = get_args(Purpose)
ROLES: tuple[str, ...] = get_args(Role)
SECONDS = Path(__file__).with_name("label_seconds.json")
MOST_SECONDS = 1e6  # of one label
BOUNDS = ("low", "central", "high")


def labels_line(kind: str, count: int, why: str, name: str) -> dict[str, Any]:
    """Return a line of the record on labels.

    Raises:
        BadInput: For a kind, purpose or count that cannot be.
    """
    _check("kind of label", kind, KINDS)
    _check("purpose of labels", why, PURPOSES)
    return {"kind": kind, "why": why, "name": name, "count": _count("labels", count)}


def images_line(role: str, count: int, name: str) -> dict[str, Any]:
    """Return a line of the record on images.

    Raises:
        BadInput: For a role or count that cannot be.
    """
    _check("role of images", role, ROLES)
    return {"role": role, "name": name, "count": _count("images", count)}


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInput(f"no {what} '{value}'{nearest(value, known)}")


def _count(what: str, count: Any) -> int:
    if isinstance(count, bool) or int(count) != count or count < 0:
        raise BadInput(f"{count!r} {what}: give how many, a whole number of 0 or more")
    return int(count)


class Counts(NamedTuple):
    """Labels by (kind, purpose), and images by role."""

    labels: dict[tuple[str, str], float]
    images: dict[str, float]


def counts(
    labels: Iterable[Mapping[str, Any]], images: Iterable[Mapping[str, Any]]
) -> Counts | None:
    """Return what the lines of all starts and processes of one run state together.

    Args:
        labels: Lines of any order; of several under one (kind, why, name) the largest counts.
        images: Lines of (role, name), likewise.

    Returns:
        Sums over names; None where there is no line.
    """
    spent = _largest(labels, ("kind", "why"))
    shown = _largest(images, ("role",))
    if not spent and not shown:
        return None
    by_kind: dict[tuple[str, str], float] = {}
    for (kind, why, _), n in spent.items():
        by_kind[kind, why] = by_kind.get((kind, why), 0.0) + n
    by_role: dict[str, float] = {}
    for (role, _), n in shown.items():
        by_role[role] = by_role.get(role, 0.0) + n
    return Counts(by_kind, by_role)


def _largest(
    lines: Iterable[Mapping[str, Any]], keys: tuple[str, ...]
) -> dict[tuple[str, ...], float]:
    out: dict[tuple[str, ...], float] = {}
    for line in lines:
        key = (*(str(line[k]) for k in keys), str(line.get("name") or ""))
        out[key] = max(out.get(key, 0.0), float(line["count"]))
    return out


def of_data(facts: Mapping[str, Any]) -> Counts | None:
    """Return what a record without such lines used: all labels of `train`, and those held out.

    Args:
        facts: The fact `data` of a record.
    """
    known = {
        key: n
        for key in ("train", "chosen_from", "held_out")
        if isinstance(n := facts.get(key), (int, float)) and not isinstance(n, bool) and n >= 0
    }
    if "train" not in known:
        return None
    used = float(known.get("chosen_from", known["train"]))  # a subset is chosen by its labels
    spent = {("class", "training"): used}
    if known.get("held_out"):
        spent["class", "selection"] = float(known["held_out"])
    return Counts(spent, {"labelled": used})


def seconds(asked: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the seconds that a label of each kind takes: {"low", "central", "high", "source"},
    and "asked" where they are not ours.

    Args:
        asked: "KIND=SECONDS", or "KIND=LOW,CENTRAL,HIGH", in place of ours.

    Raises:
        BadInput: For an unknown kind, or seconds that cannot be.
    """
    table: dict[str, dict[str, Any]] = json.loads(SECONDS.read_text())
    for entry in asked:
        kind, _, text = entry.partition("=")
        _check("kind of label", kind.strip(), KINDS)
        try:
            values = [float(v) for v in text.split(",")]
        except ValueError:
            values = []
        low, central, high = values if len(values) == 3 else (values * 3 if values else (-1.0,) * 3)
        if len(values) not in (1, 3) or not 0 <= low <= central <= high <= MOST_SECONDS:
            raise BadInput(
                f"'{entry}' gives no seconds per label: write {kind or 'class'}=5, or "
                f"{kind or 'class'}=1,5,60 for low, central and high"
            )
        table[kind.strip()] = {
            **dict(zip(BOUNDS, (low, central, high), strict=True)),
            "source": "Given by the reader of this report",
            "asked": True,
        }
    return table


def hours(spent: Mapping[str, float], table: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return {"low", "central", "high"} hours of labels; they are never turned into joules.

    Args:
        spent: How many of each kind.
        table: Of `seconds`; a kind that it lacks is left out.
    """
    known = {kind: n for kind, n in spent.items() if kind in table}
    return {b: sum(n * table[kind][b] for kind, n in known.items()) / 3600 for b in BOUNDS}
