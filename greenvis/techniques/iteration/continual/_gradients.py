"""Gradients of single samples, by which continual learning weighs parameters and chooses images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from greenvis.core.technique import logits_of

_CHUNK = 2**24  # gradient values held at once


def sample_gradients(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield (rows, gradients): of the cross entropy of each sample, by parameter, (n, *its shape),
    as many as fit at once.

    x: (batch, …), y: int64 (batch,). rows: which samples these are, int64 (n,). Give the model in
    eval mode.
    """
    weights = {n: model.get_parameter(n).detach() for n in names}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(
            logits_of(functional_call(model, parameters, (image[None],))), label[None]
        )

    size = max(1, _CHUNK // max(sum(p.numel() for p in weights.values()), 1))
    for rows in torch.arange(len(x)).split(size):
        try:
            gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(
                weights, x[rows], y[rows]
            )
        except (
            RuntimeError
        ):  # not every operation has a rule for batches of functions: one sample at a time, then
            singles = [grad(loss)(weights, x[i], y[i]) for i in rows]
            gradients = {n: torch.stack([s[n] for s in singles]) for n in names}
        yield rows, {n: g.detach() for n, g in gradients.items()}


def closeness(model: nn.Module, x: Tensor, y: Tensor, others_x: Tensor, others_y: Tensor) -> Tensor:
    """Return 1 + the greatest cosine between each sample's gradient and those of others, (batch,),
    0 to 2.

    1 where there are no others. Gradients are those of the cross entropy, over all parameters that
    learn.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if not len(others_x):
        return torch.ones(len(x))
    others = torch.cat(
        [_flat(gradients) for _, gradients in sample_gradients(model, names, others_x, others_y)]
    )
    own = [
        (_flat(gradients) @ others.T).amax(1)
        for _, gradients in sample_gradients(model, names, x, y)
    ]
    return 1 + torch.cat(own).cpu()


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    # norms overflow in half
    return F.normalize(torch.cat([g.flatten(1).float() for g in gradients.values()], 1), dim=1)
