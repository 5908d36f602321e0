"""Models of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from greenvis.core import weights
from greenvis.errors import BadInput, nearest
from greenvis.models.libraries._loading import Request, check_options, fetch, option_names


def check(request: Request) -> dict[str, Any]:
    """Return the options to build with; raises BadInput for an unknown name or option."""
    import timm

    if not timm.is_model(request.name):
        raise BadInput(
            "unknown model "
            f"'{request.ref}'{nearest(request.name.partition('.')[0], timm.list_models())}"
        )
    known = option_names(timm.model_entrypoint(request.name.partition(".")[0]))
    options = dict(request.options)
    if known is not None:
        if "img_size" not in known:
            options.pop("img_size", None)
        known = (known | {"num_classes", "in_chans", "img_size"}) - {
            "pretrained",
            "block_args",
            "cfg",
            "device",
            "dtype",
        }
        check_options(request, options, known)
    elif not timm.get_pretrained_cfg_value(request.name, "fixed_input_size"):
        options.pop("img_size", None)
    return options


def build(request: Request) -> nn.Module:
    """Build a model of timm, with the weights the request asks for."""
    import timm

    options = check(request)
    if not request.pretrained:
        return timm.create_model(request.name, **options)
    if request.pretrained is True:
        return fetch(request, lambda: timm.create_model(request.name, pretrained=True, **options))
    state = weights.read_state(request.pretrained)
    # the same nets under the names of another EfficientNet package
    if "_conv_stem.weight" in state:
        state = weights.in_order(state, timm.create_model(request.name))
    cfg = timm.get_pretrained_cfg(request.name)
    assert cfg is not None
    heads = [cfg.classifier] if isinstance(cfg.classifier, str) else list(cfg.classifier or [])
    # Load with the weights' own number of classes, where timm checks every name; the head asked for
    # comes after.
    rows = next((len(state[f"{h}.weight"]) for h in heads if f"{h}.weight" in state), 0)
    stem = state.get(f"{cfg.first_conv}.weight")
    channels = stem.shape[1] if stem is not None else 3
    overlay = {
        "state_dict": state,
        "num_classes": rows,
        "input_size": (channels, *cfg.input_size[1:]),
    }
    arguments = {"in_chans": channels, **options, "num_classes": rows}
    model = timm.create_model(
        request.name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    )
    vars(model)["pretrained_cfg"]["state_dict"] = (
        None  # else the model keeps a second copy of the weights, and copies it
    )
    classes = options.get("num_classes", rows)
    if classes != rows:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model
