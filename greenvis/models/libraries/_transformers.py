"""Image classifiers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from greenvis.core import weights
from greenvis.errors import BadInput, nearest, some
from greenvis.models.libraries._loading import (
    Request,
    check_options,
    fetch,
    load_pretrained,
    set_in_chans,
)

HF_WORDS = {
    "num_classes": "num_labels",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


def check(request: Request) -> tuple[Any, Path | None]:
    """Return the configuration with the request's options, and the local folder it came from, if
    any."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as TYPES,
    )

    folder: Path | None = (request.folder / Path(request.name).expanduser()).resolve()
    try:
        if (folder / "config.json").is_file():
            stored = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            config_dict, _ = type(stored).get_config_dict(str(folder), local_files_only=True)
        elif request.name in TYPES:
            folder, stored, config_dict = None, AutoConfig.for_model(request.name), {}
        else:
            folder, stored = None, AutoConfig.from_pretrained(request.name, trust_remote_code=False)
            config_dict, _ = type(stored).get_config_dict(request.name)
    except Exception as error:  # not cached, offline, no such name, a broken file
        raise BadInput(
            f"unknown model '{request.ref}'{nearest(request.name, TYPES)} Neither a folder with a "
            f"config.json in {request.folder.resolve()}, nor a vision model type of transformers, "
            f"nor to be had: {weights.first_line(error)}"
        ) from error
    if stored.model_type not in TYPES:
        raise BadInput(
            f"{request.ref} is of type '{stored.model_type}', which transformers has no image "
            "classifier for"
        )
    try:
        config = _with_hf_options(request, stored, config_dict)
        if isinstance(TYPES[stored.model_type], tuple) and not config.architectures:
            config.architectures = [TYPES[stored.model_type][0]]  # of several, the plain classifier
        return config, folder
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"{request.ref} refuses {request.options}: {weights.first_line(error)}"
        ) from error


def _with_hf_options(request: Request, stored: Any, config_dict: dict[str, Any]) -> Any:
    """Make the configuration anew from what was `given` and the options in its own words.

    Anew, because a configuration derives values from others when it is made. The options belong to
    the vision part where there is one (CLIP).
    """
    full = stored.to_dict()
    full = full.get("vision_config", full)
    words = {
        option: word for option, word in HF_WORDS.items() if word in full and option not in full
    }
    check_options(
        request, request.options, {*full, *words, "num_classes", "num_labels", "img_size"}
    )
    new = {words.get(o, o): v for o, v in request.options.items() if o in full or o in words}
    if "hidden_size" in new and "intermediate_size" in full:
        new.setdefault(
            "intermediate_size",
            round(full["intermediate_size"] * new["hidden_size"] / full["hidden_size"]),
        )
    derived = ("out_features", "out_indices", "stage_names", "model_type", "transformers_version")
    values = {k: v for k, v in config_dict.items() if k not in derived}
    if hasattr(stored, "vision_config"):
        values["vision_config"] = {**values.get("vision_config", {}), **new}
    else:
        values.update(new)
    config = type(stored)(**values)
    classes = request.options.get("num_classes", request.options.get("num_labels"))
    if classes is not None:
        config.num_labels = classes
    return config


def hf_weights(request: Request) -> Path | None:
    """Return the local folder whose weights `hf/PATH` begins with, if it is one that holds any."""
    folder = (request.folder / Path(request.name).expanduser()).resolve()
    return (
        folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None
    )


def build(request: Request) -> nn.Module:
    """Build a classifier of transformers, with the weights the request asks for."""
    from transformers import AutoModelForImageClassification as Classifier

    config, folder = check(request)
    has_weights = hf_weights(request) is not None
    if request.pretrained is False or (request.pretrained is None and not has_weights):
        return Classifier.from_config(config)
    if isinstance(request.pretrained, Path):
        model = Classifier.from_config(config)
        load_pretrained(model, weights.read_state(request.pretrained), str(request.pretrained))
        return model
    channels = request.options.get("in_chans")
    if channels is not None:  # load for the weights' own channels, change after
        config, _ = check(
            request._replace(options={k: v for k, v in request.options.items() if k != "in_chans"})
        )
    options: dict[str, Any] = {
        "config": config,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
    }
    source = str(folder) if folder else request.name
    model, info = fetch(
        request,
        lambda: Classifier.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, **options
        ),
    )
    names = {
        n if isinstance(n, str) else n[0]
        for kind in ("missing_keys", "mismatched_keys")
        for n in info[kind]
    }
    if wrong := sorted(names - weights.head_names(model)):
        raise BadInput(
            f"{request.ref}: with these options its weights do not fit; missing or of another "
            f"shape: {some(wrong)}"
        )
    if channels is not None:
        set_in_chans(model, channels)
        for module in (*model.modules(), model.config):
            if isinstance(getattr(module, "num_channels", None), int):
                module.num_channels = channels  # type: ignore[assignment]
    return model
