"""What trainers do around a forward: unused parameters are searched for, parts are computed again;
no gradient is lost."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

import greenvis as gv
from greenvis.core.technique import logits_of
from greenvis.core.trainers import UsedInTerms, _joined
from greenvis.errors import BadInput

X, Y = (
    torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0, 1, 2, 3]),
)


def _vit(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": width, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, **sizes)


def _hf() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 4
    return ViTForImageClassification(config)


class _Own(nn.Module):
    """A model of one's own that checkpoints its blocks by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.reentrant, self.img_size = _vit(), False, 16
        vit: Any = self.vit
        for block in vit.blocks:
            block.forward = self._wrap(block.forward)

    def _wrap(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest, **more: (
            checkpoint(forward, x, *rest, use_reentrant=True) if self.reentrant else forward(x)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


def _gradients(
    model: nn.Module, techniques: list[gv.Technique], turn_on: Callable[[], None] | None
) -> dict[str, Tensor]:
    live = gv.wrap(model, techniques)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in live.trainable.values():
            p.add_(0.02 * torch.randn_like(p))
    if turn_on is not None:
        turn_on()
    model.train()
    torch.manual_seed(5)
    out = model(X)
    (F.cross_entropy(logits_of(out), Y) + live.loss(X, Y, out)).backward()
    return {n: p.grad for n, p in live.trainable.items() if p.grad is not None}


CHECKPOINTED: dict[str, Callable[[], list[gv.Technique]]] = {
    "lora": lambda: [gv.Lora(rank=2, targets=("attention", "mlp"))],
    "adapter": lambda: [gv.Adapter()],
    "bitfit": lambda: [gv.Bitfit()],
    "token_prune": lambda: [gv.TokenPrune(blocks=(1, 2))],
    "token_merge": lambda: [gv.TokenMerge(r=2)],
    "early_exit": lambda: [gv.EarlyExit(at=(1, 2))],
    "prompt": lambda: [gv.Prompt()],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_loses_no_gradient_or_is_refused(name: str, reentrant: bool) -> None:
    wanted = _gradients(_hf(), CHECKPOINTED[name](), None)
    model = _hf()
    how = {"use_reentrant": reentrant}
    turn_on = lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # noqa: E731
    if reentrant and name in ("lora", "adapter", "token_prune"):
        with pytest.raises(
            BadInput,
            match=f"loses the gradients of '{name}': use the other kind, use_reentrant=False",
        ):
            _gradients(model, CHECKPOINTED[name](), turn_on)
        return
    got = _gradients(model, CHECKPOINTED[name](), turn_on)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[n], g, atol=1e-5, rtol=1e-3) for n, g in wanted.items())


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_checkpoint_of_ones_own_is_noticed_too(name: str) -> None:
    model = _Own()
    with pytest.raises(BadInput, match="re-entrant gradient checkpointing"):
        _gradients(model, CHECKPOINTED[name](), lambda: setattr(model, "reentrant", True))


def test_an_output_of_any_kind_is_joined_with_the_parameters() -> None:
    weight, logits = nn.Parameter(torch.ones(2)), torch.ones(3, requires_grad=True)
    outputs: list[Any] = [
        logits, (torch.zeros(1), logits), [logits], {"loss": None, "logits": logits},
        ImageClassifierOutput(logits=logits),
    ]  # fmt: skip
    for output in outputs:
        new, done = _joined(output, [weight], lambda t: t.requires_grad)
        assert done
        assert type(new) is type(output)
        tensor = logits_of(new) if not isinstance(output, (tuple, list)) else new[-1]
        assert any(
            edge is not None and getattr(edge[0], "variable", None) is weight
            for edge in tensor.grad_fn.next_functions
        )
        logits.grad = None
        tensor.sum().backward()
        assert torch.equal(logits.grad, torch.ones(3))
        assert weight.grad is None
    assert _joined({"a": None}, [weight], lambda t: t.requires_grad) == ({"a": None}, False)
    assert pickle.loads(pickle.dumps(UsedInTerms(["a"]))).names == {"a"}


IN_TERMS: dict[str, Callable[[], list[gv.Technique]]] = {
    "early_exit": lambda: [gv.EarlyExit(at=(1, 2))],
    "early_exit, frozen": lambda: [gv.EarlyExit(at=(1, 2), base="freeze")],
    "hint": lambda: [gv.Distill(teacher=_vit(24), losses=[{"kind": "hint"}])],
    "lora": lambda: [gv.Lora(rank=2)],
}


def _job() -> None:
    """As one of two processes: train two steps of each and compare with one process on all
    images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, techniques in IN_TERMS.items():
        live = gv.wrap(_vit(), techniques())
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in live.trainable.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model = DistributedDataParallel(live.model, find_unused_parameters=True).train()
        for _ in range(2):
            x, y = (t.tensor_split(2)[dist.get_rank()] for t in (X, Y))
            live.model.zero_grad()
            out = model(x)
            (F.cross_entropy(logits_of(out), y) + live.loss(x, y, out)).backward()
        got = {n: p.grad.clone() for n, p in live.trainable.items() if p.grad is not None}
        total = {n: torch.zeros_like(g) for n, g in got.items()}
        for x, y in zip(X.split(2), Y.split(2), strict=True):
            live.model.zero_grad()
            out = live.model(x)
            (F.cross_entropy(logits_of(out), y) + live.loss(x, y, out)).backward()
            for n in total:
                total[n] += live.trainable[n].grad / 2  # type: ignore[operator]
        assert len(total) > 1, name
        assert all(torch.allclose(got[n], g, atol=1e-6, rtol=1e-4) for n, g in total.items()), name
    dist.destroy_process_group()


def test_parameters_that_only_terms_use_get_their_gradient_from_two_processes(
    tmp_path: Path,
) -> None:
    forked.ranks(__file__, cwd=tmp_path)


if __name__ == "__main__":
    _job()
