"""Which of a machine's NVIDIA GPUs this process may use, told by UUID. Pure functions: no driver,
no torch.

CUDA numbers GPUs fastest first unless CUDA_DEVICE_ORDER is PCI_BUS_ID; NVML numbers them by bus. A
number is a card only where both agree; a UUID always is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

MASK, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


class Card(NamedTuple):
    """A GPU as NVML lists it, in the order of the bus: "GPU-…", its model's name, the UUIDs of its
    MIG slices."""

    uuid: str
    name: str
    slices: tuple[str, ...] = ()
    split: bool = False  # MIG is on: CUDA sees slices only, whether or not they are listed


def visible(
    cards: Sequence[Card], environ: Mapping[str, str], uuids: Sequence[str] | None = None
) -> tuple[list[int], str]:
    """Return the places in `cards` of those that CUDA shows to this process, in CUDA's order; or
    none, with the reason.

    uuids: what torch says of its devices (with or without "GPU-"), once it has opened them; it
    comes before the mask.
    """
    if uuids is not None:
        chosen, why = _by_uuid(cards, uuids, strict=True)
    elif (mask := environ.get(MASK)) is None:
        chosen, why = list(range(len(cards))), ""
    else:
        words = [w.strip() for w in mask.split(",")]
        if words[0].startswith(("GPU-", "MIG-")):
            chosen, why = _by_uuid(cards, words)
        else:
            chosen, why = _by_number(cards, words, environ.get(ORDER) == "PCI_BUS_ID")
    if why:
        return [], why
    split = next((cards[i] for i in chosen if cards[i].split or cards[i].slices), None)
    if split is not None:
        return [], _slice(split.uuid, "what is visible")
    return chosen, "" if chosen else f"{MASK} hides every GPU from this process"


def _by_uuid(
    cards: Sequence[Card], words: Sequence[str], *, strict: bool = False
) -> tuple[list[int], str]:
    chosen: list[int] = []
    for word in words:
        bare = word.removeprefix("GPU-").removeprefix("MIG-")
        parent = next(
            (c for c in cards if any(bare and _bare(s).startswith(bare) for s in c.slices)), None
        )
        if parent is not None or word.startswith("MIG-"):
            return [], _slice(parent.uuid if parent else "", word)
        matches = [i for i, c in enumerate(cards) if bare and _bare(c.uuid).startswith(bare)]
        if len(matches) == 1 and matches[0] not in chosen:
            chosen.append(matches[0])
        elif strict:
            return [], f"NVML does not know the GPU {word} that torch uses"
        else:
            break  # as CUDA does: from the first entry on that is no card, all are ignored
    return chosen, ""


def _by_number(cards: Sequence[Card], words: Sequence[str], by_bus: bool) -> tuple[list[int], str]:
    chosen: list[int] = []
    for word in words:
        if not (word.isdecimal() and int(word) < len(cards)):
            break  # as CUDA does
        if int(word) in chosen:
            return [], f"{MASK} names GPU {word} twice, so CUDA shows none"
        chosen.append(int(word))
    if by_bus or len({c.name for c in cards}) == 1 or len(chosen) in (0, len(cards)):
        return chosen, ""
    names = ", ".join(sorted({c.name for c in cards}))
    return [], (
        f"{MASK}={','.join(words)} counts in CUDA's order, fastest first, and the driver's "
        "counters in the bus's; the cards "
        f"differ ({names}), so which one is meant cannot be told: set {ORDER}=PCI_BUS_ID, or name "
        "the card by UUID"
    )


def _slice(parent: str, word: str) -> str:
    where = f" of {parent}" if parent else ""
    return (
        f"{word} is a MIG slice{where}: a slice has no energy counter of its own, and the card's "
        "counts its neighbours' work"
    )


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-")
