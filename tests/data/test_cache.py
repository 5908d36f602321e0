"""Kept outputs: what was put comes back, what changed is told, what is damaged is computed anew."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from greenvis.data.output_cache import Cache
from greenvis.errors import BadInput, GreenvisError

KEY = {"data": "abc", "transform": "resize 28", "weights": "f00"}


def _cache(
    folder: Path, notes: list[str] | None = None, key: dict[str, str] = KEY, **options: Any
) -> Cache:
    options = {"length": 10, **options}
    return Cache(folder, key, note=(notes if notes is not None else []).append, **options)


def test_fp32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    x = torch.randn(10, 2, 3)
    cache = _cache(tmp_path)
    assert cache.get([0]) is None
    cache.put([4, 2], x[[4, 2]])
    assert cache.get([0, 4]) is None
    assert cache.has([0, 4]).tolist() == [False, True]
    assert not cache.complete
    cache.put(torch.arange(10), x)
    cache.close()
    again = _cache(tmp_path)
    assert again.complete
    got = again.get(torch.tensor([9, 0, 4]))
    assert got is not None
    assert torch.equal(got, x[[9, 0, 4]])
    head = json.loads((again.path / "key.json").read_text())
    assert head["key"] == KEY
    assert head["shape"] == [2, 3]


def test_fp16_halves_the_file_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    x = torch.randn(10, 8)
    cache = _cache(tmp_path, dtype="fp16")
    cache.put(range(10), x)
    got = cache.get(range(10))
    assert got is not None
    assert torch.equal(got, x.half().float())
    assert (cache.path / "values.bin").stat().st_size == 10 * 8 * 2
    with pytest.raises(BadInput, match="do not fit in fp16"):
        cache.put([1], torch.full((1, 8), 1e6))


def test_top_k_keeps_the_softmax_of_the_greatest(tmp_path: Path) -> None:
    logits = torch.randn(10, 50) * 3
    cache = _cache(tmp_path, top_k=5)
    cache.put(range(10), logits)
    got = cache.get(range(10))
    assert got is not None
    full, kept = logits.softmax(1), got.softmax(1)
    at = logits.topk(5).indices
    assert torch.allclose(kept.gather(1, at), full.gather(1, at), atol=1e-6)
    left = kept.scatter(1, at, 0.0)
    assert torch.allclose(left.sum(1), 1 - full.gather(1, at).sum(1), atol=1e-5)
    assert torch.allclose(left.max(1).values, left.sum(1) / 45, atol=1e-6)
    with pytest.raises(BadInput, match="of more classes"):
        _cache(tmp_path, top_k=50).put([0], logits[:1])


def test_views_are_kept_apart(tmp_path: Path) -> None:
    cache = _cache(tmp_path, views=2)
    cache.put([3], torch.tensor([[1.0]]), view=0)
    assert cache.get([3], view=1) is None
    cache.put([3], torch.tensor([[2.0]]), view=1)
    first, second = cache.get([3], view=0), cache.get([3], view=1)
    assert first is not None
    assert second is not None
    assert (first.item(), second.item()) == (1.0, 2.0)


@pytest.mark.parametrize("part", ["data", "transform", "weights"])
def test_a_changed_key_is_another_cache_and_says_what_changed(tmp_path: Path, part: str) -> None:
    first = _cache(tmp_path)
    first.put(range(10), torch.ones(10, 1))
    notes: list[str] = []
    other = _cache(tmp_path, notes, key={**KEY, part: "new"})
    assert other.get([0]) is None
    assert notes == [f"cache: {part} changed: {KEY[part]} → new. Outputs are computed anew"]
    notes.clear()
    assert _cache(tmp_path, notes).complete
    assert notes == []


def test_a_flipped_bit_costs_that_sample_only(tmp_path: Path) -> None:
    x = torch.randn(10, 4)
    cache = _cache(tmp_path)
    cache.put(range(10), x)
    cache.close()
    with open(cache.path / "values.bin", "r+b") as file:
        file.seek(3 * 16 + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    notes: list[str] = []
    again = _cache(tmp_path, notes)
    assert again.get([2, 3]) is None
    assert len(notes) == 1
    assert "1 kept outputs are damaged" in notes[0]
    assert again.get([2, 4]) is not None
    assert not again.complete
    again.put([3], x[3:4])
    whole = again.get(range(10))
    assert whole is not None
    assert torch.equal(whole, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that holds what it has read")
def test_what_a_gpu_holds_is_what_lies_on_disk(tmp_path: Path) -> None:
    x = torch.randn(10, 4)
    cache = _cache(tmp_path)
    cache.put(range(10), x)
    for rows in ([1, 2, 3], [3, 2, 1], [*range(10)], [1, 9]):
        values = cache.get(rows, device="cuda:0")
        assert values is not None
        assert torch.equal(values.cpu(), x[rows])
    cache.put([9], x[:1])
    values = cache.get([9, 1], device="cuda:0")
    assert values is not None
    assert torch.equal(values.cpu(), x[[0, 1]])
    assert torch.equal(cache.get([9, 1]), x[[0, 1]])  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut values", "cut index", "no index", "bad key"])
def test_files_that_are_not_whole_are_made_anew(tmp_path: Path, damage: str) -> None:
    cache = _cache(tmp_path)
    cache.put(range(10), torch.ones(10, 4))
    cache.close()
    if damage == "no index":
        (cache.path / "index.bin").unlink()
    elif damage == "bad key":
        (cache.path / "key.json").write_text('{"key":')
    else:
        os.truncate(cache.path / f"{damage.split()[1]}.bin", 7)
    notes: list[str] = []
    again = _cache(tmp_path, notes)
    assert len(notes) == 1
    assert "made anew" in notes[0]
    assert again.get([0]) is None
    again.put(range(10), torch.ones(10, 4))
    assert again.complete


def test_a_file_cut_while_open_does_not_kill_the_run(tmp_path: Path) -> None:
    notes: list[str] = []
    cache = _cache(tmp_path, notes, length=10_000)
    cache.put(range(10_000), torch.ones(10_000, 4))
    os.truncate(cache.path / "values.bin", 0)
    assert cache.get([9_999]) is None
    assert len(notes) == 1
    cache.put([0], torch.ones(1, 4))
    assert cache.get([0]) is not None


def test_size_is_bounded_and_the_least_recently_used_make_room(tmp_path: Path) -> None:
    room = 2 * 10 * (400 + 8) + 3000
    caches = []
    for name in ("a", "b"):
        caches.append(_cache(tmp_path, key={"weights": name}, max_bytes=room))
        caches[-1].put([0], torch.ones(1, 100))
        os.utime(caches[-1].path / "key.json", (len(caches), len(caches)))
        caches[-1].close()
    notes: list[str] = []
    third = _cache(tmp_path, notes, key={"weights": "c"}, max_bytes=room)
    third.put([0], torch.ones(1, 100))
    assert not caches[0].path.exists()
    assert caches[1].path.exists()
    assert any("made room" in n for n in notes)
    second = _cache(tmp_path, key={"weights": "b"})  # in use: stays
    with pytest.raises(BadInput, match="what is there is in use"):
        _cache(tmp_path, key={"weights": "d"}, max_bytes=room).put([0], torch.ones(1, 100))
    assert second.path.exists()
    with pytest.raises(BadInput, match=r"take 4\.1 MB, more than max_bytes \(1\.0 MB\)"):
        _cache(tmp_path / "small", max_bytes=10**6, length=10_000).put([0], torch.ones(1, 100))
    assert not list((tmp_path / "small").glob("*/"))


def test_a_full_disk_is_an_error_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(GreenvisError, match="no room"):
        _cache(tmp_path).put([0], torch.ones(1, 1))
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    cache.put([0], torch.ones(1, 3))
    with pytest.raises(BadInput, match=r"outputs of shape \(4,\), but it holds \(3,\)"):
        cache.put([1], torch.ones(1, 4))
    with pytest.raises(BadInput, match="2 outputs for 1 samples"):
        cache.put([1], torch.ones(2, 3))
    for bad in ([10], [-1]):
        with pytest.raises(IndexError):
            cache.get(bad)
    with pytest.raises(BadInput, match="dtype is 'fp8'"):
        _cache(tmp_path, dtype="fp8")
    with pytest.raises(BadInput, match="at least 1"):
        _cache(tmp_path, length=0)


def _values(index: int) -> torch.Tensor:
    return torch.full((1, 16), math.sin(index))


def _fill(folder: Path, indices: range, forever: bool = False) -> None:
    cache = _cache(folder, length=400)
    while True:
        for i in indices:
            cache.put([i], _values(i))
        if not forever:
            break


def _right(folder: Path) -> int:
    """Return how many samples are there; each must be right."""
    cache = _cache(folder, length=400)
    there = [
        i for i in range(400) if (got := cache.get([i])) is None or torch.equal(got, _values(i))
    ]
    assert len(there) == 400
    return int(cache.has(range(400)).sum())


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    parts = [range(200), range(100, 300), range(200, 400)]
    workers = [spawn.Process(target=_fill, args=(tmp_path, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0
    assert _right(tmp_path) == 400


def test_a_killed_writer_leaves_only_right_values(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(
        target=_fill, args=(tmp_path, range(400), True)
    )
    worker.start()
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("*/values.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(600)
    _right(tmp_path)
