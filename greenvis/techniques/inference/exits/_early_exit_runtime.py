"""Let samples leave a forward early: heads behind blocks, a batch that shrinks in the model's own
forward, answers in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from greenvis.core.technique import logits_of
from greenvis.errors import GreenvisError
from greenvis.models.structure.probing import is_learning, is_probing
from greenvis.techniques._shared.doors import refuse_tracing
from greenvis.techniques._shared.rows import notify, rows_of
from greenvis.techniques.inference.exits._confidence import NEVER, agreements, certainty

Mode = Literal["collect", "record", "leave", "stop"]
_ANSWERS = ("logits", "image_embeds", "pooler_output", "out")  # where `logits_of` finds them
_running = threading.local()  # the forwards under way in this thread: one model may serve several


class ExitHead(nn.Module):
    """A classifier on what a block returns: pooled features or a class token, layer norm, linear.

    Args:
        width: channels of what the block returns.
        classes: of the answer, (batch, classes).
        channels: their axis, 1 or −1.
        prefix: tokens before the patches.
        pool: "token" (the first), "mean" (of the patches or of the map) or "both".
        kind: device and dtype.
    """

    def __init__(
        self, width: int, classes: int, channels: int, prefix: int, pool: str, **kind: Any
    ) -> None:
        super().__init__()
        self.channels, self.prefix, self.pool = channels, prefix, pool
        features = 2 * width if pool == "both" else width
        self.norm = nn.LayerNorm(features, **kind)
        self.linear = nn.Linear(features, classes, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), or channels last; (batch, tokens, channels); (batch,
        channels)."""
        return self.linear(self.norm(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        """Return (batch, features)."""
        if x.dim() == 2:
            return x
        if x.dim() == 4:
            return x.mean((2, 3) if self.channels == 1 else (1, 2))
        parts = [x[:, 0]] if self.pool in ("token", "both") else []
        parts += [x[:, self.prefix :].mean(1)] if self.pool in ("mean", "both") else []
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


@dataclass
class Pass:
    """One forward under way.

    Attributes:
        rows: where the samples still in stood in the batch, or their numbers in a stream.
        waiting: where samples of several batches wait behind exits to go on together (`_rebatch`).
        since: an exit; those who wait there take this forward over.
    """

    mode: Mode
    rows: Tensor
    # of each exit, all samples ("collect", "record")
    logits: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)  # of those that left ("leave", "stop")
    left: list[Tensor] = field(default_factory=list)  # where those stood
    before: Tensor | None = None
    count: Tensor | None = None
    waiting: Any = None
    since: int | None = None

    def select(self, rows: Tensor) -> None:
        """Go on with these of the samples still in, int64 (remaining,)."""
        self.rows = self.rows[rows]
        if self.before is not None and self.count is not None:
            self.before, self.count = self.before[rows], self.count[rows]


class BatchExhausted(Exception):
    """No sample goes on, so the rest of the forward is not run. Caught by whoever began the pass,
    never seen outside."""


class Exits:
    """The exits of one model, and what they are to do.

    Attributes:
        thresholds: one per exit; at `NEVER` no sample leaves.
    """

    def __init__(self, model: nn.Module, criterion: str, detach: bool) -> None:
        self.model, self.criterion, self.detach = model, criterion, detach
        self.heads: list[nn.Module] = []
        self.thresholds: list[float] = []
        self.last_logits: list[Tensor] | None = (
            None  # the exits' logits of the last training forward
        )
        self.recorded: list[Tensor] = []
        self.tally: list[int] = []
        self.recording = False
        self.only: int | None = None  # everybody leaves at this exit
        self.template: Any = None  # an output of the model, for its type
        self.dtype: torch.dtype | None = None  # of the model's logits, where an exit's differ

    def attach(self, path: str, seat: nn.Module, child: str, head: nn.Module) -> None:
        """Add the next exit behind the module at `path`; its head lives in `seat`."""
        seat.add_module(child, head.train(seat.training))
        self.model.get_submodule(path).register_forward_hook(
            ExitHook(self, len(self.heads)), with_kwargs=False
        )
        self.heads.append(head)
        self.thresholds.append(NEVER)
        self.tally = [0] * (len(self.heads) + 1)

    @property
    def training(self) -> bool:
        """Whether the exits train; the model need not, where its frozen part is held in eval."""
        return any(head.training for head in self.heads)

    @property
    def mode(self) -> Mode | None:
        """What the next forward does; None: nothing but the model's own work."""
        if is_learning(self.model):
            return "collect"
        if self.training:
            return "collect" if torch.is_grad_enabled() else None
        if self.only is not None:
            return "stop"
        if self.recording:
            return "record"
        if any(t < NEVER for t in self.thresholds) and not is_probing(self.model):
            return "leave"
        return None

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """Run every exit within, let nobody leave; the list holds the exits' logits of the last
        forward."""
        self.recording = True
        try:
            yield self.recorded
        finally:
            self.recording = False
            self.recorded.clear()

    def leaving(self, k: int, now: Pass, logits: Tensor) -> Tensor:
        """Return who leaves at exit k, bool (still in,)."""
        if self.criterion == "patience":
            predicted = logits.argmax(-1)
            now.count = agreements(predicted, now.before, now.count)
            now.before = predicted
            return now.count >= self.thresholds[k]
        return certainty(logits, self.criterion) >= self.thresholds[k]


class ExitHook:
    """Behind a block: asks the exit's head, and returns the block's output for those that go on."""

    _greenvis_passing = True  # where the block is skipped, the head is handed what was kept

    def __init__(self, exits: Exits, number: int) -> None:
        self.exits, self.number = exits, number

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook."""
        exits, k = self.exits, self.number
        x = output[0] if isinstance(output, tuple) else output
        refuse_tracing(x, "who leaves early")
        now = current(exits)
        if now is None:
            # checkpointing runs the block again, and wants the same work
            if exits.training and torch.is_grad_enabled():
                exits.heads[k](x.detach() if exits.detach else x)
            return None
        if now.mode == "stop":
            if k == exits.only:
                now.answers.append(exits.heads[k](x))
                # whoever traces keeps a stack that exceptions would upset
                if not torch.compiler.is_compiling():
                    raise BatchExhausted
            return None
        if now.since is not None:
            return now.waiting.take_over(k, now) if k == now.since else None
        if now.mode == "leave" and exits.criterion != "patience" and exits.thresholds[k] == NEVER:
            return None
        logits = exits.heads[k](x.detach() if exits.detach and now.mode == "collect" else x)
        if now.mode != "leave":
            now.logits.append(logits)
            return None
        return self._leave(now, logits, output)

    def _leave(self, now: Pass, logits: Tensor, output: Any) -> Any:
        sure = self.exits.leaving(self.number, now, logits)
        if not len(sure):  # a batch of none
            return None
        go = (~sure).nonzero().squeeze(1)
        if len(go) < len(sure):
            gone = sure.nonzero().squeeze(1)
            now.answers.append(logits[gone])
            now.left.append(now.rows[gone])
            self.exits.tally[self.number] += len(gone)
        if now.waiting is not None:
            now.select(go)
            return now.waiting.exchange(self.number, now, rows_of(output, go, len(sure)))
        if not len(go):
            raise BatchExhausted
        if len(go) == len(sure):
            return None
        now.select(go)
        notify(self.exits.model, go, len(sure))
        return rows_of(output, go, len(sure))


class Outer:
    """Stands in for the model's `forward`: starts a pass, runs the model's own forward, and puts
    the answers in order."""

    def __init__(self, exits: Exits, inner: Callable[..., Any]) -> None:
        # the name by which inspect.signature finds the model's own
        self.exits, self.__wrapped__ = (exits, inner)

    @property
    def __code__(self) -> Any:
        """The model's own, by which torch.export says where a forward stands."""
        return self.__wrapped__.__code__  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        exits, mode = self.exits, self.exits.mode
        if (begun := current(exits)) is not None and begun.waiting is not None:
            return self.__wrapped__(*args, **kwargs)
        if mode is None:
            output = self.__wrapped__(*args, **kwargs)
            if not exits.training and not torch.compiler.is_compiling():
                exits.tally[-1] += len(logits_of(output))
            return output
        tensors = [
            (name, t) for name, t in (*enumerate(args), *kwargs.items()) if isinstance(t, Tensor)
        ]
        if not tensors:
            return self.__wrapped__(*args, **kwargs)
        batch = len(tensors[0][1])
        if mode == "leave":
            _refuse_companions(tensors, batch)
        now = Pass(mode, torch.arange(batch, device=tensors[0][1].device))
        output = None
        with under_way(exits, now), suppress(BatchExhausted):
            output = self.__wrapped__(*args, **kwargs)
        if mode == "collect":
            exits.last_logits = now.logits
        elif mode == "record":
            exits.recorded[:] = [*now.logits, logits_of(output)]
        elif mode == "stop":
            return self._rebuilt(now.answers[0], None, kwargs)
        else:
            exits.tally[-1] += len(now.rows) if output is not None else 0
            return self._in_order(now, output, kwargs)
        return output

    def keep_type(self, output: Any) -> None:
        """Note what the model gives, for forwards that nobody is left to finish."""
        self.exits.template = self._rebuilt(logits_of(output).new_empty(0), output, {})

    def _in_order(self, now: Pass, output: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the output with everybody's answer where they stood. Untouched where nobody
        left."""
        if not now.left:
            return output
        answers, rows = now.answers, now.left
        if output is not None:
            last = logits_of(output)
            answers, rows = [*(a.to(last.dtype) for a in answers), last], [*rows, now.rows]
        order = torch.cat(rows).argsort()
        return self._rebuilt(torch.cat(answers)[order], output, kwargs)

    def _rebuilt(self, logits: Tensor, output: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return an output of the model's type that holds these answers, and None for all that
        those who left do not have."""
        exits = self.exits
        if output is None:
            logits = logits if exits.dtype is None else logits.to(exits.dtype)
            output = (logits,) if kwargs.get("return_dict") is False else exits.template
        if isinstance(output, Mapping) or hasattr(output, "to_tuple"):
            kind: Any = type(output)
            return kind(
                **{next(key for key in _ANSWERS if getattr(output, key, None) is not None): logits}
            )
        if isinstance(output, (tuple, list)):
            twins = len(output) == 2 and getattr(output[0], "shape", 0) == getattr(
                output[1], "shape", 1
            )
            return type(output)(
                (logits, logits) if twins else (logits, *[None] * (len(output) - 1))
            )
        return logits


def _refuse_companions(tensors: list[tuple[Any, Tensor]], batch: int) -> None:
    beside = [name for name, t in tensors[1:] if t.dim() and len(t) == batch]
    if beside:
        raise GreenvisError(
            f"samples that leave early cannot be taken out of the argument '{beside[0]}': call the "
            "model with the images alone, and compute the loss from its output"
        )


def current(exits: Exits) -> Pass | None:
    """Return the pass that this thread runs, if any."""
    return getattr(_running, "passes", {}).get(id(exits))


@contextmanager
def under_way(exits: Exits, now: Pass) -> Iterator[None]:
    """Run a forward within as this pass."""
    if not hasattr(_running, "passes"):
        _running.passes = {}
    before = _running.passes.get(id(exits))
    _running.passes[id(exits)] = now
    try:
        yield
    finally:
        if before is None:
            del _running.passes[id(exits)]
        else:
            _running.passes[id(exits)] = before
