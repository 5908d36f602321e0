"""Which experts a token takes, and the two layers of a multi-layer perceptron that follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Assignment:
    """Tokens by the experts that take them.

    Attributes:
        tokens: int64 (pairs,), those of the first expert first.
        counts: Tokens of each expert.
        gates: (pairs, 1), how much each answer counts; None where each counts 1.
    """

    tokens: Tensor
    counts: list[int]
    gates: Tensor | None


def assign(logits: Tensor, active: int, choice: bool, weigh: bool) -> Assignment:
    """Route tokens to experts.

    Args:
        logits: (tokens, experts), of the router.
        active: Experts per token; on average with `choice`.
        choice: Each expert chooses its tokens (Zhou et al., 2022), and a token that none chose
            goes to its best; else each token chooses its experts (Shazeer et al., 2017).
        weigh: Gates are softmax probabilities, renormalised to a sum of 1 per token.

    Returns:
        The pairs of tokens and experts.
    """
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    if choice:
        most = -(-len(logits) * active // logits.shape[1])
        chosen.scatter_(0, logits.softmax(1).topk(min(most, len(logits)), dim=0).indices, True)
        alone = ~chosen.any(1)
        chosen |= F.one_hot(logits.argmax(1), logits.shape[1]).bool() & alone[:, None]
    else:
        chosen.scatter_(1, logits.topk(active, dim=1).indices, True)
    experts, tokens = chosen.T.nonzero().unbind(1)
    gates = None
    if weigh:
        shares = logits.softmax(1) * chosen
        total = shares.sum(1, keepdim=True)
        # of a single expert the sum itself would take all the gradient away
        total = torch.where(chosen.sum(1, keepdim=True) > 1, total, total.detach())
        gates = (shares / total)[tokens, experts].unsqueeze(1)
    return Assignment(tokens, chosen.sum(0).tolist(), gates)


class Routing(nn.Module):
    """The router of one multi-layer perceptron, and where its tokens went in this forward.

    Args:
        width: Of the tokens.
        experts: E.
        active: k; where it is E every expert answers, and there is no router.
        choice: See `assign`.
        copies: Whether experts are copies, whose answers are weighed.
        like: A tensor of the wanted type, on the wanted device.
    """

    def __init__(
        self, width: int, experts: int, active: int, choice: bool, copies: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.experts, self.active, self.choice, self.copies = experts, active, choice, copies
        shape = {"device": like.device, "dtype": like.dtype}
        self.layer = (
            None if active == experts and not copies else nn.Linear(width, experts, **shape)
        )
        self.dense = self.layer is None
        self.every = False  # all experts answer, one by one: to hold the parts against the sum
        self.assignment: Assignment | None = None
        self.leading: tuple[int, ...] = ()  # axes of the tokens
        self.logits: Tensor | None = None
        self.load = [0] * experts

    def route(self, x: Tensor) -> Assignment:
        """Return where tokens (…, dim) go, for this layer and those behind it."""
        self.leading, x = tuple(x.shape[:-1]), x.flatten(0, -2)
        if self.layer is None or self.every:
            tokens = torch.arange(len(x), device=x.device).repeat(self.experts)
            gates = x.new_full((len(tokens), 1), 1 / self.experts) if self.copies else None
            self.assignment = Assignment(tokens, [len(x)] * self.experts, gates)
            return self.assignment
        # what is not weighed has no gradient
        with torch.set_grad_enabled(self.copies and torch.is_grad_enabled()):
            logits = self.layer(x).float()
        if self.training and self.copies:  # equal copies part by noise alone
            logits = logits + torch.randn_like(logits) / self.experts
        self.logits = logits if torch.is_grad_enabled() else None
        out = assign(logits, self.active, self.choice, self.copies)
        self.load = [a + b for a, b in zip(self.load, out.counts, strict=True)]
        self.assignment = out
        return out


class Up(nn.Module):
    """A first layer (or its gate): each expert's rows, of the tokens it takes.

    Args:
        layer: The layer; its rows lie expert by expert.
        routing: Of the perceptron.
        leads: Whether this layer routes; one behind it follows.
    """

    def __init__(self, layer: nn.Linear, routing: Routing, leads: bool) -> None:
        super().__init__()
        copies = routing.experts if routing.copies else 1
        self.weight, self.bias = _copied(layer.weight, copies), _copied(layer.bias, copies)
        self.leads, self.followed = leads, (routing,)  # a child of the leading layer alone
        if leads:
            self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, dim). Returns (pairs, width of an expert), the first expert's tokens first."""
        routing = self.followed[0]
        if routing.dense:
            return F.linear(x, self.weight, self.bias)
        todo = routing.route(x) if self.leads else routing.assignment
        assert todo is not None
        weights = self.weight.chunk(routing.experts)
        none = [None] * routing.experts
        biases = none if self.bias is None else self.bias.chunk(routing.experts)
        return _by_expert(
            x.flatten(0, -2).index_select(0, todo.tokens), todo.counts, weights, biases
        )


class Down(nn.Module):
    """A last layer: each expert's columns, of the tokens it took, added up.

    Args:
        layer: The layer; its columns lie expert by expert.
        routing: Of the perceptron.
    """

    def __init__(self, layer: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        if routing.copies:
            self.weight = nn.Parameter(layer.weight.detach().repeat(1, routing.experts))
            self.bias = None if layer.bias is None else _copied(layer.bias[None], routing.experts)
        self.followed = (routing,)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (pairs, width of an expert). Returns (…, dim), as the first layer's input."""
        routing = self.followed[0]
        if routing.dense:
            return F.linear(hidden, self.weight, self.bias)
        todo = routing.assignment
        assert todo is not None
        own: Any = self.bias if routing.copies else None
        biases = [None] * routing.experts if own is None else own.unbind()
        weights = self.weight.chunk(routing.experts, 1)
        out = _by_expert(hidden, todo.counts, weights, biases)
        if todo.gates is not None:
            out = out * todo.gates.to(out.dtype)
        size = math.prod(routing.leading)
        if self.bias is None or routing.copies:
            total = out.new_zeros(size, out.shape[-1])
        else:
            total = self.bias.to(out.dtype).expand(size, -1).clone()
        return total.index_add_(0, todo.tokens, out).unflatten(0, routing.leading)


def _by_expert(
    x: Tensor, counts: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Any]
) -> Tensor:
    """Return each expert's linear answers to its tokens, one behind the other."""
    parts = zip(x.split(counts), weights, biases, strict=True)
    if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled(x.device.type):
        return torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])
    out = x.new_empty(len(x), weights[0].shape[0])  # without a copy: an eighth of the time
    for (part, weight, bias), rows in zip(parts, out.split(counts), strict=True):
        if bias is None:
            torch.mm(part, weight.T, out=rows)
        else:
            torch.addmm(bias, part, weight.T, out=rows)
    return out


def _copied(tensor: Any, copies: int) -> Any:
    if tensor is None or copies == 1:
        return tensor
    repeats = (copies, *[1] * (tensor.dim() - 1))
    return nn.Parameter(tensor.detach().repeat(repeats))
