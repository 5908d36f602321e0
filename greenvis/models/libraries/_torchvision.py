"""Models of torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

from greenvis.core import weights
from greenvis.errors import BadInput, nearest
from greenvis.models import preprocessing
from greenvis.models.libraries._loading import (
    Request,
    check_options,
    fetch,
    load_pretrained,
    option_names,
    set_in_chans,
)


def check(request: Request) -> dict[str, Any]:
    """Return the options to build with; raises BadInput for an unknown name or option."""
    from torchvision import models

    names = [
        name
        for module in (models, models.segmentation, models.detection)
        for name in models.list_models(module=module)
    ]
    if request.name not in names:
        raise BadInput(f"unknown model '{request.ref}'{nearest(request.name, names)}")
    known = option_names(models.get_model_builder(request.name))
    options = dict(request.options)
    if "img_size" in options:
        size = options.pop("img_size")
        if known is None or "image_size" in known:
            options["image_size"] = size
    if known is not None:
        check_options(
            request,
            options,
            (known | {"num_classes", "in_chans", "img_size"})
            - {"weights", "weights_backbone", "progress"},
        )
        if "weights_backbone" in known:  # else the library fetches some
            options["weights_backbone"] = None
    if request.name in models.list_models(module=models.detection) and (
        options.get("in_chans", 3) != 3
    ):
        raise BadInput(f"'{request.ref}' takes images of 3 channels: set data.in_chans to 3")
    return options


def build(request: Request) -> nn.Module:
    """Build a model of torchvision, with the weights the request asks for."""
    from torchvision import models

    options = check(request)
    channels = options.pop("in_chans", 3)
    if request.pretrained is not True:
        model = models.get_model(request.name, **options)
        set_in_chans(model, channels)
        if request.pretrained:
            load_pretrained(model, weights.read_state(request.pretrained), str(request.pretrained))
        return model
    published = models.get_model_weights(request.name).DEFAULT  # type: ignore[attr-defined]
    state = fetch(
        request,
        lambda: published.get_state_dict(progress=False, check_hash=True, weights_only=True),
    )
    model = models.get_model(request.name, **options)
    set_in_chans(model, channels)
    load_pretrained(model, state, "the published weights")
    preset, names = published.transforms(), published.meta["categories"]
    same = options.get("num_classes", len(names)) == len(names)
    shown = {name: getattr(preset, name) for name in ("mean", "std") if hasattr(preset, name)}
    preprocessing.describe(model, **shown, classes=names if same else None)
    return model
