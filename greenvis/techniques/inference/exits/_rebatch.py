"""Samples of several batches that are not sure yet wait behind an exit until there are enough of
them for a whole batch.

Dynamic rebatching (DREX: Liu et al., 2025, arXiv:2512.15705), for images: without it the batch
behind each exit is what the exits before it left of one batch, and small batches use a machine less
well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from greenvis.core.technique import logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.rows import followed, joined, rows_of
from greenvis.techniques.inference.exits._early_exit_runtime import (
    BatchExhausted,
    Exits,
    Pass,
    under_way,
)


class Waiting:
    """Who waits behind each exit: the samples' numbers in the stream, what patience counted, and
    what the block gave."""

    def __init__(self, exits: Exits, size: int) -> None:
        self.exits, self.size = exits, size
        self.waiting: list[list[tuple[Pass, Any]]] = [[] for _ in exits.heads]

    def number(self, k: int) -> int:
        """Return how many wait behind exit k."""
        return sum(len(queued.rows) for queued, _ in self.waiting[k])

    def exchange(self, k: int, now: Pass, output: Any) -> Any:
        """Take in the samples of this forward; where there are enough, return what the block gave
        for those who go on instead.

        Raises BatchExhausted where there are too few: nobody goes on.
        """
        if len(now.rows):
            self.waiting[k].append(
                (Pass(now.mode, now.rows, before=now.before, count=now.count), output)
            )
        if self.number(k) < self.size:
            raise BatchExhausted
        return self.take_over(k, now)

    def take_over(self, k: int, now: Pass) -> Any:
        """Let those who have waited longest behind exit k, a batch at most, be the samples of this
        forward."""
        queue = self.waiting[k]
        sizes = [len(queued.rows) for queued, _ in queue]
        output = joined([o for _, o in queue], sizes)
        rows = torch.cat([queued.rows for queued, _ in queue])
        merged = Pass(
            now.mode,
            rows,
            before=_joined(queued.before for queued, _ in queue),
            count=_joined(queued.count for queued, _ in queue),
        )
        queue.clear()
        total, index = len(rows), torch.arange(len(rows), device=rows.device)
        if total > self.size:
            rest = replace(merged)
            rest.select(index[self.size :])
            queue.append((rest, rows_of(output, index[self.size :], total)))
            merged.select(index[: self.size])
            output = rows_of(output, index[: self.size], total)
        now.rows, now.before, now.count, now.since = merged.rows, merged.before, merged.count, None
        return output


def _joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    present = [p for p in parts if p is not None]
    return torch.cat(present) if present else None


class _Answers:
    """Logits by the number of their sample, given back in order."""

    def __init__(self) -> None:
        self.first = 0  # number of the first sample held
        self.logits = torch.empty(0)
        self.answered = torch.zeros(0, dtype=torch.bool)
        self.batches: list[int] = []

    def expect(self, size: int) -> None:
        self.batches.append(size)
        self.answered = torch.cat([self.answered, torch.zeros(size, dtype=torch.bool)])

    def take(self, rows: Tensor, logits: Tensor) -> None:
        at = rows - self.first
        known = self.logits if len(self.logits) else logits[:0]
        self.logits = torch.cat(
            [known, known.new_empty(len(self.answered) - len(known), *logits.shape[1:])]
        )
        self.logits[at] = logits.to(self.logits.dtype)
        self.answered[at.cpu()] = True

    def completed(self) -> Iterator[Tensor]:
        """Yield the batches that are answered, the first that is not ending it."""
        while self.batches and bool(self.answered[: self.batches[0]].all()):
            size = self.batches.pop(0)
            self.first += size
            done, self.logits, self.answered = (
                self.logits[:size],
                self.logits[size:],
                self.answered[size:],
            )
            yield done


def answer(exits: Exits, batches: Iterable[Tensor], size: int | None) -> Iterator[Tensor]:
    """Yield the logits of each batch, as `early_exit.rebatched` says."""
    if exits.training or exits.model.training:
        raise GreenvisError("samples leave early in eval only: call model.eval() first")
    if followed(exits.model):
        raise BadInput(
            "samples cannot wait for others where tokens merge or are pruned: what is known of "
            "them would have to wait, too; answer batch by batch"
        )
    waiting, answers, start, one = Waiting(exits, size or 0), _Answers(), 0, None
    for x in batches:
        answers.expect(len(x))
        if len(x):
            waiting.size, one = waiting.size or len(x), x[:1]
        _run(exits, x, torch.arange(start, start + len(x), device=x.device), waiting, None, answers)
        start += len(x)
        if one is not None:
            _go_on(exits, one, waiting, waiting.size, answers)
        yield from answers.completed()
    if one is not None:
        _go_on(exits, one, waiting, 1, answers)
    yield from answers.completed()


def _go_on(exits: Exits, one: Tensor, waiting: Waiting, enough: int, answers: _Answers) -> None:
    """Run those who wait behind any exit, a batch at a time, for as long as there are enough."""
    for k in range(len(exits.heads)):
        while waiting.number(k) >= enough:
            _run(exits, one, one.new_zeros(0, dtype=torch.long), waiting, k, answers)


def _run(
    exits: Exits, x: Tensor, rows: Tensor, waiting: Waiting, since: int | None, answers: _Answers
) -> None:
    """Run one forward. since: an exit; the samples that wait there go on, and the image `x` only
    takes the forward there."""
    now = Pass("leave", rows, waiting=waiting, since=since)
    with torch.inference_mode(), under_way(exits, now), suppress(BatchExhausted):
        now.answers.append(logits_of(exits.model(x)))
        now.left.append(now.rows)
        exits.tally[-1] += len(now.rows)
    for at, logits in zip(now.left, now.answers, strict=True):
        answers.take(at, logits if exits.dtype is None else logits.to(exits.dtype))
