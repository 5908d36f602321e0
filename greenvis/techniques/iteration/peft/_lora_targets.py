"""Which layers low-rank adaptation changes: roles and patterns, and why a layer is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from greenvis.core.surgery import find
from greenvis.errors import BadInput, nearest, some
from greenvis.models.structure import View
from greenvis.techniques._shared.lora_layers import inner_linears

if TYPE_CHECKING:
    from greenvis.techniques.iteration.peft.lora import Lora

ROLES = ("attention", "qkv", "mlp", "conv", "linear")
_KINDS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


def targets(request: Lora, model: nn.Module, structure: View) -> list[str]:
    """Return the paths to change, in the model's order. Raises BadInput before anything is
    touched."""
    chosen: dict[str, None] = {}
    for target in request.targets:
        if target in ROLES:
            paths = structure.role(target)
            why = {p: why_not(request, model, structure, p, merging=True) for p in paths}
            good = [p for p in paths if not why[p]]
            if not good:
                raise BadInput(
                    f"lora cannot change any '{target}' layer of this model: {why[paths[0]]}"
                )
            chosen.update(dict.fromkeys(good))
        else:
            chosen.update(dict.fromkeys(matches(request, model, structure, target)))
    return [p for p, _ in model.named_modules() if p in chosen]


def matches(request: Lora, model: nn.Module, structure: View, pattern: str) -> list[str]:
    """Return the layers below a name or pattern that can be changed. Raises BadInput where there
    are none, or one of them cannot."""
    try:
        hits = find(model, [pattern], _KINDS)
    except BadInput:
        try:
            hits = find(model, [pattern])
        except BadInput as error:
            raise BadInput(
                f"{error}{nearest(pattern, ROLES) if pattern.isalpha() else ''}"
            ) from None
    inner = inner_linears(model)
    outer = [p for p in hits if p not in inner]
    if not outer:
        raise BadInput(
            f"'{hits[0]}' is read as a weight by its nn.MultiheadAttention: target "
            f"'{inner[hits[0]]}' itself"
        )
    named = [
        p for p in outer if not structure.in_classifier(p) and p != structure.patch_embed
    ] or outer
    if request.head == "train" and all(map(structure.in_classifier, named)):
        raise BadInput(
            f"'{pattern}' names the classifier {some(named)}, which trains in full; set head: "
            "freeze"
        )
    ran = {*structure.linears, *structure.convs, *(a.path for a in structure.attention)}
    live = [p for p in named if p in ran]
    if not live:
        raise BadInput(
            f"{some(named)} matches '{pattern}' but never runs in a forward, so it would learn "
            "nothing"
        )
    for path in live:
        if reason := why_not(request, model, structure, path, merging=False):
            raise BadInput(f"'{pattern}' names '{path}', which lora cannot change: {reason}")
    return live


def why_not(request: Lora, model: nn.Module, structure: View, path: str, merging: bool) -> str:
    """Return why a layer cannot be changed, or "". merging: also where the change could not be
    merged."""
    module = model.get_submodule(path)
    if not isinstance(module, _KINDS):
        return f"'{path}' is a {type(module).__name__}, not a Linear, Conv2d or MultiheadAttention"
    if path in structure.computed:
        return f"'{path}' does not use its weight as it is (a standardised {type(module).__name__})"
    if request.init == "lora_ga" and (
        not isinstance(module, nn.Linear) or path in structure.functional
    ):
        return (
            f"'{path}' is not a Linear that runs itself, and PEFT starts no other with "
            "lora_ga; use another init"
        )
    if isinstance(module, nn.Conv2d) and request.variant == "adalora":
        if (
            module.groups > 1
            or type(module).forward is not nn.Conv2d.forward
            or module.padding_mode != "zeros"
        ):
            return (
                f"'{path}' is a convolution of {module.groups} groups or with padding of its "
                "own, unknown to AdaLoRA"
            )
    elif isinstance(module, nn.Conv2d):
        if module.groups > 1 and (merging or request.rank % module.groups):
            return (
                f"'{path}' is a convolution of {module.groups} groups; PEFT cannot merge it "
                "and needs a rank they divide"
            )
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            return (
                f"'{path}' has dilation {module.dilation} and padding '{module.padding_mode}', "
                "which PEFT ignores"
            )
    if isinstance(module, nn.Conv2d) and path in structure.functional:
        return f"'{path}' is a convolution whose weight another module reads"
    multihead = isinstance(module, nn.MultiheadAttention)
    if multihead and not module._qkv_same_embed_dim:
        return f"'{path}' has q, k and v of different widths, which PEFT does not support"
    if multihead or path in structure.functional:
        how = "an nn.MultiheadAttention" if multihead else "read as a weight by another module"
        if request.variant in ("dora", "adalora"):
            name = {"dora": "DoRA", "adalora": "AdaLoRA"}[request.variant]
            return f"'{path}' is {how}, for which there is no {name}; use variant lora or rslora"
        if request.dropout:
            return f"'{path}' is {how}, so dropout cannot act on its input; set dropout: 0"
    return ""
