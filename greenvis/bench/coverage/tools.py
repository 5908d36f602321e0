"""Wrapped models under the tools people train with: compiled, exported, autocast, checkpointed,
copied, pickled, on two ranks.

Each check takes a function that builds the same wrapped model anew, and raises `Broken` where the
tool and the technique do not go together.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from greenvis.bench._hosts import HOSTS
from greenvis.core.technique import logits_of
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.techniques import registry
from greenvis.testing import Broken

ON = ("timm-vit", "timm-resnet")
RANKS = 2
Build = Callable[[], Wrapped]


def table(
    techniques: Sequence[str], hosts: Sequence[str] = ON, tools: Sequence[str] | None = None
) -> list[dict[str, str]]:
    """Return a row for each technique and host: by tool "works", "fails: …", or "refuses: …" where
    the two do not fit."""
    requested = [*TOOLS, "DDP"] if tools is None else list(tools)
    pairs = [(technique, host) for technique in techniques for host in hosts]
    refused = {pair: _refusal(*pair) for pair in pairs}
    ranks = _ddp([p for p in pairs if not refused[p]]) if "DDP" in requested else {}
    rows = []
    for pair in pairs:
        row = {"technique": pair[0], "host": pair[1]}
        for tool in requested:
            row[tool] = (
                f"refuses: {refused[pair]}"
                if refused[pair]
                else ranks[pair]
                if tool == "DDP"
                else _try(tool, *pair)
            )
        rows.append(row)
    return rows


def build(technique: str, host: str) -> Wrapped:
    """Return a host with a technique live, with the first of its examples that fits; the same each
    time.

    Raises BadInput, with the reason of the first, where none does.
    """
    kind, refusal = registry.find(technique), BadInput(f"{technique} has no example")
    for i, example in enumerate(kind.examples):
        model = HOSTS[host].build()
        torch.manual_seed(2)
        try:
            settings = {
                k: v(model) if callable(v) and not isinstance(v, nn.Module) else v
                for k, v in example.items()
            }
            live = wrap(model, kind(**settings))
        except BadInput as error:
            refusal = refusal if i else error
            continue
        live.plan(8)
        return live
    raise refusal


def _refusal(technique: str, host: str) -> str:
    try:
        build(technique, host)
    except BadInput as error:
        return str(error)
    return ""


def _try(tool: str, technique: str, host: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TOOLS[tool](lambda: build(technique, host), *HOSTS[host].batch())
        except Exception as error:  # whatever a tool raises means: not with this
            return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "works"


# -- one process ----------------------------------------------------------------------------------


def compiled(new: Build, x: Tensor, y: Tensor) -> None:
    """torch.compile, through autograd (backend "aot_eager"): same outputs, same gradients."""
    torch._dynamo.reset()
    plain, live = new(), new()
    fast: Any = torch.compile(live.model, backend="aot_eager")
    _same_gradients(_gradients(live, fast, x, y), _gradients(plain, plain.model, x, y), 1e-4)
    _same(_answers(fast, live.model, x), _answers(plain.model, plain.model, x), 1e-4)


def exported(new: Build, x: Tensor, y: Tensor) -> None:
    """torch.export of the model in eval: the program gives the same outputs."""
    live = new()
    want = _answers(live.model, live.model, x)
    with torch.no_grad():
        program = torch.export.export(live.model.eval(), (x,)).module()
        _same(logits_of(program(x)), want, 1e-4)


def autocast(new: Build, x: Tensor, y: Tensor) -> None:
    """bf16 autocast: finite loss and gradients for all that learns, near those of fp32."""
    live = new()
    want = _answers(live.model, live.model, x)
    with torch.autocast("cpu", torch.bfloat16):
        _same(_answers(live.model, live.model, x).float(), want, 0.1)
        grads = _gradients(live, live.model, x, y)
    if bad := [n for n, g in grads.items() if not g.isfinite().all()]:
        raise Broken(f"no finite gradient for {bad[0]}")


def checkpointed(new: Build, x: Tensor, y: Tensor) -> None:
    """Gradient checkpointing, as timm's models have it: the gradients are those without."""
    live, plain = new(), new()
    model: Any = live.model
    model.set_grad_checkpointing(True)
    _same_gradients(_gradients(live, model, x, y), _gradients(plain, plain.model, x, y), 1e-5)


def copied(new: Build, x: Tensor, y: Tensor) -> None:
    """copy.deepcopy: the copy answers alike, and neither changes with the other."""
    live = new()
    want = _answers(live.model, live.model, x)
    other = copy.deepcopy(live.model)
    _same(_answers(other, other, x), want, 0)
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.requires_grad):
            parameter.add_(
                0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    _same(_answers(live.model, live.model, x), want, 0)
    if torch.equal(_answers(other, other, x), want):
        raise Broken("the copy's own parameters do not act on its outputs")


def pickled(new: Build, x: Tensor, y: Tensor) -> None:
    """state_dict through torch.save and torch.load(weights_only=True) into a new model: the same
    outputs."""
    live, other = new(), new()
    with torch.no_grad():
        for parameter in (p for p in live.model.parameters() if p.requires_grad):
            parameter.add_(
                0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    file = io.BytesIO()
    torch.save(live.model.state_dict(), file)
    file.seek(0)
    other.model.load_state_dict(torch.load(file, weights_only=True))
    _same(_answers(other.model, other.model, x), _answers(live.model, live.model, x), 0)


TOOLS: dict[str, Callable[[Build, Tensor, Tensor], None]] = {
    "torch.compile": compiled,
    "torch.export": exported,
    "bf16 autocast": autocast,
    "gradient checkpointing": checkpointed,
    "copy.deepcopy": copied,
    "pickle": pickled,
}


# -- two processes --------------------------------------------------------------------------------


def _ddp(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Train two steps on half of the batch each; rank 0 says of each pair whether the gradients are
    the means of both."""
    if not pairs:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.pt"
        arguments = (list(pairs), f"file://{folder}/meet", str(out))
        torch.multiprocessing.spawn(_rank, arguments, nprocs=RANKS)  # type: ignore[attr-defined]
        return torch.load(out, weights_only=True)


def _rank(rank: int, pairs: list[tuple[str, str]], meet: str, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    outcomes = {}
    for technique, host in pairs:
        try:
            _alike_on_ranks(rank, technique, host)
            outcomes[technique, host] = "works"
        except Exception as error:  # whatever is raised means: not with this
            outcomes[technique, host] = (
                f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
    if rank == 0:
        torch.save(outcomes, out)
    dist.destroy_process_group()


def _alike_on_ranks(rank: int, technique: str, host: str) -> None:
    live, x, y = build(technique, host), *HOSTS[host].batch()
    model = DistributedDataParallel(live.model)
    halves = [(a, b) for a, b in zip(x.chunk(RANKS), y.chunk(RANKS), strict=True)]
    apart = [build(technique, host) for _ in halves]
    # DDP misses parameters without a gradient only at the second forward
    _gradients(live, model, *halves[rank])
    got = _gradients(live, model, *halves[rank])
    for one, half in zip(apart, halves, strict=True):
        _gradients(one, one.model, *half)
    want = [_gradients(one, one.model, *half) for one, half in zip(apart, halves, strict=True)]
    _same_gradients(got, {n: torch.stack([w[n] for w in want]).mean(0) for n in want[0]}, 1e-4)


# -- means ----------------------------------------------------------------------------------------


def _gradients(live: Wrapped, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each parameter that learns, of one training step's loss."""
    model.train()
    live.model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    x, y = live.batch(x, y)
    if live.pretext:
        loss = live.loss(x, y, None)
    else:
        logits = logits_of(model(x))
        loss = live.criterion(F.cross_entropy)(logits.float(), y) + live.loss(x, y, logits)
    loss.backward()
    learning = live.declared if live.pretext else live.trainable  # a pretext trains no classifier
    missing = [n for n, p in learning.items() if p.grad is None]
    if missing:
        raise Broken(f"no gradient for {missing[0]}")
    return {n: p.grad.clone() for n, p in live.trainable.items() if p.grad is not None}


def _answers(model: nn.Module, owner: nn.Module, x: Tensor) -> Tensor:
    owner.eval()
    with torch.no_grad():
        return logits_of(model(x)).clone()


def _same(a: Tensor, b: Tensor, tolerance: float) -> None:
    error = (a - b).abs().max().item()
    if not error <= tolerance * max(1.0, b.abs().max().item()):
        raise Broken(f"outputs differ by {error:.1e}")


def _same_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    largest = max(g.abs().max().item() for g in b.values())
    for name, gradient in b.items():
        error = (a[name] - gradient).abs().max().item()
        if not error <= tolerance * max(1e-3, largest):
            raise Broken(f"the gradient of {name} differs by {error:.1e}")
