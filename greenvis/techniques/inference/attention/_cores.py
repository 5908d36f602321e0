"""What stands in place of softmax attention: sums over tokens that cost O(N).

Queries, keys and values are (batch, heads, tokens, dim); `weights` (batch, 1, tokens, 1) say how
much each key counts, 1 where None. Sums are in float32 at least, also under autocast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def weighted_sum(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None, mean: bool = False
) -> Tensor:
    """Return linear attention of mapped queries and keys: q (kᵀ v) / (q · Σ k + ε) (Katharopoulos
    et al., 2020, eq. 6).

    Args:
        q: (batch, heads, queries, features), not negative.
        k: (batch, heads, tokens, features), not negative.
        v: (batch, heads, tokens, dim).
        weights: (batch, 1, tokens, 1).
        mean: Divide both sums by the number of tokens before ε is added (PolaFormer).

    Returns:
        (batch, heads, queries, dim).
    """
    if weights is not None:
        k = k * weights
    total = k.sum(-2, keepdim=True)
    products = k.transpose(-2, -1) @ v
    if mean:
        count: Any = k.shape[-2] if weights is None else weights.sum(-2, keepdim=True)
        total, products = total / count, products / count
    below = q @ total.transpose(-2, -1)
    return q @ products / (below + EPS if mean else _positive(below))


def _positive(below: Tensor) -> Tensor:
    """Add ε; random features may sum up to less than nothing."""
    return (below + EPS).clamp(min=EPS)


def elu(x: Tensor) -> Tensor:
    """Return elu(x) + 1 (Katharopoulos et al., 2020, eq. 7)."""
    return F.elu(x) + 1


def random_fourier(x: Tensor, omega: Tensor, temperature: float | None = None) -> Tensor:
    """Return √(2/D) [cos u, sin u], u = √τ x ω (Rahimi and Recht, 2007; of unit vectors and τ = 1:
    RFA, Peng et al., 2021, eq. 5).

    Args:
        x: (…, dim).
        omega: (dim, D / 2), drawn from a normal distribution.
        temperature: τ; 1 / √dim where None.

    Returns:
        (…, D).
    """
    scale = x.shape[-1] ** -0.5 if temperature is None else temperature
    u = x * math.sqrt(scale) @ omega
    return torch.cat([u.cos(), u.sin()], -1) * math.sqrt(1 / omega.shape[1])


def favor(x: Tensor, omega: Tensor, temperature: float | None = None) -> Tensor:
    """Return [exp(u - |x|²/2), exp(-u - |x|²/2)] / √D with x scaled by √τ, u = x ω (Performer:
    Choromanski et al., 2021, lemma 1).

    Args:
        x: (…, dim).
        omega: (dim, D / 2).
        temperature: τ; 1 / √dim where None.

    Returns:
        (…, D), positive.
    """
    x = x * math.sqrt(x.shape[-1] ** -0.5 if temperature is None else temperature)
    u, half = x @ omega, x.square().sum(-1, keepdim=True) / 2
    return torch.cat([u - half, -u - half], -1).exp() / math.sqrt(2 * omega.shape[1])


def polarity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    power: Tensor,
    alpha: float = 4.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return polarity-aware linear attention (PolaFormer: Meng et al., 2025, eq. 6 and 8): equal
    signs speak to the first half of the values, opposite ones to the second.

    Args:
        q: Queries.
        k: Keys.
        v: Values, of an even dim.
        power: (1, heads, 1, dim); features are raised to 1 + α · sigmoid(power).
        alpha: α.
        weights: As above.

    Returns:
        (batch, heads, queries, dim).
    """
    exponent = 1 + alpha * power.sigmoid()
    q_plus, q_minus = F.relu(q) ** exponent, F.relu(-q) ** exponent
    keys = torch.cat([F.relu(k) ** exponent, F.relu(-k) ** exponent], -1)
    same, opposite = v.chunk(2, -1)
    return torch.cat(
        [
            weighted_sum(torch.cat([q_plus, q_minus], -1), keys, same, weights, mean=True),
            weighted_sum(torch.cat([q_minus, q_plus], -1), keys, opposite, weights, mean=True),
        ],
        -1,
    )


def token_statistics(w: Tensor, temperature: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return token statistics self-attention (ToST: Wu et al., 2025, eq. 13): no token meets
    another.

    Args:
        w: One projection of the tokens, (batch, heads, tokens, dim).
        temperature: (heads, 1).
        weights: As above.

    Returns:
        (batch, heads, tokens, dim).
    """
    counted = w if weights is None else w * weights.sqrt()
    lengths = counted.square().sum(-2, keepdim=True).sqrt().clamp(min=1e-12)
    belongs = ((w / lengths).square().sum(-1) * temperature).softmax(1).unsqueeze(-1)
    share = belongs if weights is None else belongs * weights
    moments = (share / (share.sum(-2, keepdim=True) + 1e-8)).transpose(-2, -1) @ w.square()
    return -(w * belongs) / (1 + moments)


class Core(nn.Module):
    """One of `CORES`. kind: which, as a buffer, so that weights of a converted model fit no other.

    Args:
        kind: A name of `CORES`.
        heads: Of the attention.
        dim: Of each head.
        features: Random ones, of rfa.
        like: A tensor of the wanted type, on the wanted device.
    """

    kind: Tensor

    def __init__(self, kind: str, heads: int, dim: int, features: int, like: Tensor) -> None:
        super().__init__()
        self.name = kind
        number = torch.tensor(CORES.index(kind), dtype=torch.uint8, device=like.device)
        self.register_buffer("kind", number)
        if kind == "rfa":
            self.register_buffer("omega", torch.randn(dim, features, dtype=like.dtype).to(like))
        if kind == "polaformer":
            self.power = nn.Parameter(like.new_zeros(1, heads, 1, dim))
            # softplus of it is 1
            self.scale = nn.Parameter(like.new_full((1, heads, 1, dim), math.log(math.e - 1)))
        if kind == "hedgehog":
            eye = torch.eye(dim, dtype=like.dtype, device=like.device)
            self.queries = nn.Parameter(eye.repeat(heads, 1, 1))
            self.keys = nn.Parameter(eye.repeat(heads, 1, 1))
        if kind == "ssd":
            self.steps = nn.Parameter(like.new_zeros(heads, dim, dim))
        if kind == "tssa":
            self.temperature = nn.Parameter(like.new_ones(heads, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return (batch, heads, queries, dim), in the values' type."""
        with torch.autocast(v.device.type, enabled=False):
            wide = torch.promote_types(v.dtype, torch.float32)
            more = None if weights is None else weights.to(wide)
            return self._answer(q.to(wide), k.to(wide), v.to(wide), more).to(v.dtype)

    def _answer(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> Tensor:
        own: Any = self

        def learned(name: str) -> Tensor:  # of a model held in half precision, too
            return getattr(own, name).to(q.dtype)

        match self.name:
            case "elu":
                return weighted_sum(elu(q), elu(k), v, weights)
            case "relu":
                return weighted_sum(F.relu(q), F.relu(k), v, weights)
            case "rfa":
                omega = learned("omega")
                q, k = (random_fourier(F.normalize(x, dim=-1), omega, 1.0) for x in (q, k))
                return weighted_sum(q, k, v, weights)
            case "polaformer":
                scale = F.softplus(learned("scale"))
                return polarity(q / scale, k / scale, v, learned("power"), weights=weights)
            case "hedgehog":
                q, k = hedgehog(q, learned("queries")), hedgehog(k, learned("keys"))
                return weighted_sum(q, k, v, weights)
            case "ssd":
                return state_space(q, k, v, learned("steps"), weights)
            case _:
                return token_statistics(v, learned("temperature"), weights)


def hedgehog(x: Tensor, projection: Tensor) -> Tensor:
    """Return [softmax(xW), softmax(-xW)] (Hedgehog: Zhang et al., 2024, eq. 5).

    Args:
        x: (batch, heads, tokens, dim).
        projection: W, (heads, dim, features), learned.

    Returns:
        (batch, heads, tokens, 2 · features).
    """
    u = x @ projection
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)


def state_space(
    q: Tensor, k: Tensor, v: Tensor, steps: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the non-causal state-space dual form (EfficientViM: Lee et al., 2025, eq. 6): q (A ∘
    k)ᵀ v, where A = softmax over tokens of the steps k W, one per state.

    Args:
        q: C of the state space, (batch, heads, tokens, dim).
        k: B of it.
        v: Its input.
        steps: W, (heads, dim, dim), learned.
        weights: As above.

    Returns:
        (batch, heads, tokens, dim).
    """
    dt = k @ steps
    if weights is not None:
        dt = dt + weights.log()
    return q @ ((dt.softmax(-2) * k).transpose(-2, -1) @ v)


CORES = ("elu", "relu", "rfa", "polaformer", "hedgehog", "ssd", "tssa")
