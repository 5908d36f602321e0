"""Outputs of frozen parts: computed once, read back after; another part, data set or transform is
another cache."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from greenvis.core.technique import Samples
from greenvis.data.output_cache_entries import checksums_of
from greenvis.errors import BadInput
from greenvis.meters.flop_mode import FlopMode
from greenvis.techniques._shared.frozen import FrozenOutputs, fingerprint

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def _samples(
    folder: Path, at: list[int], view: int = 0, views: int | None = 2, transform: str = "crop"
) -> Samples:
    return Samples(
        folder, {"images": "abc", "transform": transform}, len(X), views, torch.tensor(at), view
    )


class _Part:
    """A frozen layer that counts how often it runs."""

    def __init__(self, width: int = 3) -> None:
        torch.manual_seed(1)
        self.layer, self.runs = nn.Linear(6, width), 0

    def of(self, at: list[int]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.runs += 1
            return self.layer(X[at])

        return run


def test_computed_once_and_the_same_after(tmp_path: Path) -> None:
    part, notes = _Part(), []
    cached = FrozenOutputs("teacher: logits", fingerprint(part.layer), note=notes.append)
    first = cached.outputs(_samples(tmp_path, [3, 1, 7]), part.of([3, 1, 7]))
    again = cached.outputs(_samples(tmp_path, [7, 3, 1]), part.of([7, 3, 1]))
    assert part.runs == 1
    assert not first.requires_grad
    assert torch.equal(first, part.layer(X[[3, 1, 7]]))
    assert torch.equal(again, first[[2, 0, 1]])
    cached.outputs(_samples(tmp_path, [3, 1, 7], view=1), part.of([3, 1, 7]))
    cached.outputs(_samples(tmp_path, [3, 2]), part.of([3, 2]))
    assert part.runs == 3  # another version of the images, and a batch of which one is missing
    facts = cached.facts()
    assert (facts["hits"], facts["misses"], facts["earlier"]) == (3, 8, 0)
    assert facts["bytes"] == 2 * len(X) * (3 * 4 + 8)
    cached.close()
    other = FrozenOutputs("teacher: logits", fingerprint(part.layer), note=notes.append)
    assert torch.equal(
        other.outputs(_samples(tmp_path, [3, 2, 1]), part.of([3, 2, 1]))[2], first[1]
    )
    assert (part.runs, other.facts()["earlier"], other.facts()["checked"]) == (
        4,
        3,
        3,
    )  # the first batch is compared
    other.outputs(_samples(tmp_path, [1, 2]), part.of([1, 2]))
    assert (part.runs, other.facts()["hits"]) == (4, 5)
    assert len(notes) == 1
    assert "'teacher: logits' were computed by an earlier run" in notes[0]


def test_unknown_samples_are_computed(tmp_path: Path) -> None:
    part = _Part()
    cached = FrozenOutputs("teacher", fingerprint(part.layer))
    for _ in range(2):
        assert torch.equal(cached.outputs(None, part.of([0, 1])), part.layer(X[:2]))
    assert part.runs == 2
    assert list(tmp_path.iterdir()) == []


def test_endless_augmentation_is_refused(tmp_path: Path) -> None:
    part = _Part()
    with pytest.raises(
        BadInput, match=r"'teacher' can be used again.*set data\.views.*or data\.augment: none"
    ):
        FrozenOutputs("teacher", fingerprint(part.layer)).outputs(
            _samples(tmp_path, [0], views=None), part.of([0])
        )
    assert part.runs == 0


def test_what_changed_is_told(tmp_path: Path) -> None:
    part, notes = _Part(), []

    def use(name: str, layer: nn.Module, samples: Samples) -> None:
        FrozenOutputs(name, fingerprint(layer), note=notes.append).outputs(samples, part.of([0]))

    use("teacher", part.layer, _samples(tmp_path, [0]))
    use("base", part.layer, _samples(tmp_path, [0]))  # another part altogether: nothing to tell
    assert notes == []
    use("teacher", part.layer, _samples(tmp_path, [0], transform="none"))
    assert "transform changed: crop → none" in notes.pop()
    use(
        "teacher",
        part.layer,
        replace(_samples(tmp_path, [0]), key={"images": "new", "transform": "crop"}),
    )
    assert "images changed: abc → new" in notes.pop()
    torch.nn.init.zeros_(part.layer.weight)
    use("teacher", part.layer, _samples(tmp_path, [0]))
    assert "weights changed" in notes.pop()
    assert notes == []
    assert part.runs == 5


def test_the_same_weights_in_another_structure_are_another_part() -> None:
    layer = nn.Linear(6, 6)
    relu, tanh = nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Tanh())
    assert fingerprint(relu) != fingerprint(tanh)
    assert fingerprint(relu) == fingerprint(nn.Sequential(layer, nn.ReLU()))


def test_rounded_alike_when_computed_and_when_read(tmp_path: Path) -> None:
    part = _Part(8)
    for options in ({"dtype": "fp16"}, {"top_k": 3}):
        cached = FrozenOutputs(f"teacher {options}", fingerprint(part.layer), **options)  # type: ignore[arg-type]
        first = cached.outputs(_samples(tmp_path, [4, 5]), part.of([4, 5]))
        assert not torch.equal(first, part.layer(X[[4, 5]]))
        assert torch.equal(
            cached.outputs(_samples(tmp_path, [5, 4]), part.of([5, 4])), first.flip(0)
        )


def test_several_layers(tmp_path: Path) -> None:
    a, b = _Part(3), _Part(5)
    cached = FrozenOutputs("teacher", fingerprint(a.layer))
    at = [2, 9]

    def compute() -> dict[str, Tensor]:
        return {"low": a.of(at)().relu(), "high": b.of(at)()}

    first = cached.layers(_samples(tmp_path, at), compute, ("low", "high"))
    again = cached.layers(_samples(tmp_path, at), compute, ("low", "high"))
    assert a.runs == 1
    assert all(torch.equal(first[n], again[n]) for n in ("low", "high"))
    cached.layers(_samples(tmp_path, at), lambda: {"high": b.of(at)()}, ("high",))
    assert b.runs == 1


def test_a_damaged_file_is_computed_anew(tmp_path: Path) -> None:
    part, notes = _Part(), []
    cached = FrozenOutputs("teacher", fingerprint(part.layer), note=notes.append)
    cached.outputs(_samples(tmp_path, [3, 1]), part.of([3, 1]))
    cached.close()
    (file,) = tmp_path.glob("*/values.bin")
    raw = bytearray(file.read_bytes())
    raw[3 * 12] ^= 1
    file.write_bytes(raw)
    assert torch.equal(
        cached.outputs(_samples(tmp_path, [3, 1]), part.of([3, 1])), part.layer(X[[3, 1]])
    )
    assert part.runs == 2
    assert "damaged" in notes[0]


def _forge(folder: Path, factor: float, at: slice) -> None:
    """Change values in every cache there, and give them the checksums that fit."""
    for path in folder.glob("*/values.bin"):
        index = np.memmap(path.with_name("index.bin"), np.uint64, "r+")
        values = np.memmap(path, np.uint8, "r+").reshape(len(index), -1)
        there = np.flatnonzero(index)[at]
        values[there] = (values[there].view(np.float32) * factor).view(np.uint8)
        index[there] = checksums_of(values[there].copy().view(f"V{values.shape[1]}")[:, 0])


def _epochs(cached: FrozenOutputs, part: _Part, folder: Path, number: int) -> list[Tensor]:
    every = range(0, len(X), 4)
    return [
        cached.outputs(_samples(folder, [*range(i, i + 4)]), part.of([*range(i, i + 4)]))
        for _ in range(number)
        for i in every
    ]


@pytest.mark.parametrize("factor", [0.0, 1.01, -1.0, float("nan"), float("inf")])
def test_changed_values_whose_checksum_fits_are_noticed(tmp_path: Path, factor: float) -> None:
    part, notes = _Part(), []
    first = FrozenOutputs("teacher", fingerprint(part.layer))
    _epochs(first, part, tmp_path, 1)
    first.close()
    _forge(tmp_path, factor, slice(None))
    again = FrozenOutputs("teacher", fingerprint(part.layer), note=notes.append)
    seen = _epochs(again, part, tmp_path, 2)
    assert torch.equal(torch.cat(seen[3:]), part.layer(X))
    assert torch.equal(torch.cat(seen[:3]), part.layer(X))
    assert notes == [
        "cache: kept outputs of 'teacher' are not what it gives now; all are computed anew"
    ]
    assert (again.misses, again.hits, again.earlier) == (12, 12, 0)
    again.close()
    unchanged = FrozenOutputs("teacher", fingerprint(part.layer))
    _epochs(unchanged, part, tmp_path, 2)
    assert (unchanged.misses, unchanged.hits, unchanged.earlier) == (0, 24, 24)


def test_what_is_changed_in_one_place_shows_in_time_and_is_said(tmp_path: Path) -> None:
    part, notes = _Part(), []
    first = FrozenOutputs("teacher", fingerprint(part.layer))
    _epochs(first, part, tmp_path, 1)
    first.close()
    _forge(tmp_path, 2.0, slice(8, 12))  # the last batch of three
    again = FrozenOutputs("teacher", fingerprint(part.layer), note=notes.append)
    seen = _epochs(again, part, tmp_path, 400)
    assert torch.equal(torch.cat(seen[-3:]), part.layer(X))
    assert any("were read before that showed: --fresh" in note for note in notes)
    assert again.checked < again.hits / 20


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"top_k": 3}])
def test_what_was_rounded_is_compared_as_it_was_rounded(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    part, notes = _Part(8), []
    for _ in range(2):
        cached = FrozenOutputs("teacher", fingerprint(part.layer), note=notes.append, **options)
        _epochs(cached, part, tmp_path, 1)
        cached.close()
    assert (cached.misses, cached.hits, cached.checked) == (0, 12, 4)
    assert not any("not what it gives" in note for note in notes)


def test_top_k_of_classes_that_there_are_not_is_damage(tmp_path: Path) -> None:
    part, notes = _Part(8), []
    first = FrozenOutputs("teacher", fingerprint(part.layer), top_k=3)
    _epochs(first, part, tmp_path, 1)
    first.close()
    _forge(tmp_path, -8.0, slice(None))  # the places are changed with the values
    again = FrozenOutputs("teacher", fingerprint(part.layer), top_k=3, note=notes.append)
    _epochs(again, part, tmp_path, 1)
    assert again.misses == 12
    assert all("damaged" in note for note in notes)
    assert len(notes) == 3


def test_half_precision_agrees_with_itself_in_batches_of_other_sizes(tmp_path: Path) -> None:
    part, notes = _Part(), []
    with torch.autocast("cpu", torch.bfloat16):
        first = FrozenOutputs("teacher", fingerprint(part.layer))
        _epochs(first, part, tmp_path, 1)
        first.close()
        again = FrozenOutputs("teacher", fingerprint(part.layer), note=notes.append)
        again.outputs(_samples(tmp_path, [*range(7)]), part.of([*range(7)]))
    assert (again.hits, again.checked) == (7, 7)
    assert not any("not what it gives" in note for note in notes)


def test_a_comparison_adds_no_flops_to_the_steps(tmp_path: Path) -> None:
    part = _Part()
    for flops in (12 * 6 * 3 * 2, 0):
        cached = FrozenOutputs("teacher", fingerprint(part.layer))
        with FlopMode(lambda: "") as mode:
            _epochs(cached, part, tmp_path, 1)
        cached.close()
        assert sum(mode.by_phase.values()) == flops


def test_other_precision_is_another_cache(tmp_path: Path) -> None:
    part = _Part()
    cached = FrozenOutputs("teacher", fingerprint(part.layer))
    full = cached.outputs(_samples(tmp_path, [0]), part.of([0]))
    with torch.autocast("cpu", torch.bfloat16):
        half = cached.outputs(_samples(tmp_path, [0]), part.of([0]))
    assert part.runs == 2
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)


def _fill(folder: Path, turn: int) -> None:
    part = _Part()
    cached = FrozenOutputs("teacher", fingerprint(part.layer))
    for epoch in range(20):
        at = torch.randperm(len(X), generator=torch.Generator().manual_seed(epoch + turn)).tolist()
        for start in range(0, len(X), 4):
            some = at[start : start + 4]
            got = cached.outputs(_samples(folder, some), part.of(some))
            assert torch.allclose(got, part.layer(X[some]), atol=1e-6)
    assert cached.facts()["hits"] > 0


@pytest.mark.slow
def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, turn)) for turn in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [w.exitcode for w in workers] == [0, 0]
    assert len(list(tmp_path.glob("*/values.bin"))) == 1
