"""What each model library calls things, and how it loads weights. `models` is the door; nothing
else comes here."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from greenvis.core import weights
from greenvis.errors import BadInput, nearest, some
from greenvis.models import preprocessing

HF_WORDS = {
    "num_classes": "num_labels",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


class Request(NamedTuple):
    """A model reference taken apart. pretrained: a weight file, or whether to use the library's
    own; None: not said."""

    ref: str
    library: str
    name: str
    folder: Path
    pretrained: bool | Path | None
    options: dict[str, Any]  # as the user names them, without `pretrained` and `memory_format`
    file: Path | None
    memory_format: torch.memory_format | None


class Library(NamedTuple):
    """How one library's models are checked (raises BadInput, builds nothing) and built."""

    check: Callable[[Request], Any]
    build: Callable[[Request], nn.Module]


def _check_options(request: Request, options: Iterable[str], known: Iterable[str]) -> None:
    names = set(known)
    for option in options:
        if option not in names:
            raise BadInput(f"{request.ref} has no option '{option}'{nearest(option, names)}")


def _option_names(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of a builder's options, with those of the class it says it returns; None
    where that stays open."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, ValueError):
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {n for n, p in signature.parameters.items() if p.kind not in variadic}
    if all(p.kind not in variadic for p in signature.parameters.values()):
        return names
    built = signature.return_annotation
    if not inspect.isclass(built) or not issubclass(built, nn.Module) or built is nn.Module:
        return None
    for base in built.__mro__:  # up to the constructor that passes nothing on
        parameters = inspect.signature(base.__init__).parameters
        names |= {n for n, p in parameters.items() if p.kind not in variadic} - {"self"}
        if all(p.kind not in variadic for p in parameters.values()):
            break
    return names


def _fetch(request: Request, load: Callable[[], Any]) -> Any:
    """Fetch the weights a library publishes, from its local cache or the net; say what to do where
    neither has them."""
    try:
        return load()
    except (
        Exception
    ) as error:  # offline, not published, a broken file: each library has its own words
        raise BadInput(
            f"{request.ref}: the published weights are neither in the local cache nor within reach "
            f"({weights.first_line(error)}); give `pretrained` a local safetensors file"
        ) from error


def _timm_options(request: Request) -> dict[str, Any]:
    import timm

    if not timm.is_model(request.name):
        raise BadInput(
            "unknown model "
            f"'{request.ref}'{nearest(request.name.partition('.')[0], timm.list_models())}"
        )
    known = _option_names(timm.model_entrypoint(request.name.partition(".")[0]))
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
        _check_options(request, options, known)
    elif not timm.get_pretrained_cfg_value(request.name, "fixed_input_size"):
        options.pop("img_size", None)
    return options


def _build_timm(request: Request) -> nn.Module:
    import timm

    options = _timm_options(request)
    if not request.pretrained:
        return timm.create_model(request.name, **options)
    if request.pretrained is True:
        return _fetch(request, lambda: timm.create_model(request.name, pretrained=True, **options))
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


def _torchvision_options(request: Request) -> dict[str, Any]:
    from torchvision import models

    names = models.list_models(module=models)
    if request.name not in names:
        raise BadInput(f"unknown model '{request.ref}'{nearest(request.name, names)}")
    known = _option_names(models.get_model_builder(request.name))
    options = dict(request.options)
    if "img_size" in options:
        size = options.pop("img_size")
        if known is None or "image_size" in known:
            options["image_size"] = size
    if known is not None:
        _check_options(
            request,
            options,
            (known | {"num_classes", "in_chans", "img_size"}) - {"weights", "progress"},
        )
    return options


def _build_torchvision(request: Request) -> nn.Module:
    from torchvision import models

    options = _torchvision_options(request)
    channels = options.pop("in_chans", 3)
    if request.pretrained is not True:
        model = models.get_model(request.name, **options)
        set_in_chans(model, channels)
        if request.pretrained:
            _load_pretrained(model, weights.read_state(request.pretrained), str(request.pretrained))
        return model
    published = models.get_model_weights(request.name).DEFAULT  # type: ignore[attr-defined]
    state = _fetch(
        request,
        lambda: published.get_state_dict(progress=False, check_hash=True, weights_only=True),
    )
    model = models.get_model(request.name, **options)
    set_in_chans(model, channels)
    _load_pretrained(model, state, "the published weights")
    preset, names = published.transforms(), published.meta["categories"]
    same = options.get("num_classes", len(names)) == len(names)
    preprocessing.describe(model, mean=preset.mean, std=preset.std, classes=names if same else None)
    return model


def set_in_chans(model: nn.Module, channels: int) -> None:
    """Give the model's first convolution another number of input channels; its weights become
    theirs summed or shared."""
    name, conv = next(
        ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None)
    )
    if conv is None:
        raise BadInput(f"{type(model).__name__} has no convolution to take {channels} channels")
    if conv.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
    with torch.no_grad():
        new.weight.copy_(adapt_channels(conv.weight, channels))
        if new.bias is not None and conv.bias is not None:
            new.bias.copy_(conv.bias)
    model.set_submodule(name, new)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Turn a first convolution's weight (out, in, kh, kw) to other input channels, so that a grey
    image's output stays.

    To one channel: the sum over the old ones. To more: their mean repeated, over the ratio of
    channels.
    """
    if channels == weight.shape[1]:
        return weight
    grey = weight.sum(1, keepdim=True)
    return grey.expand(-1, channels, -1, -1) / channels


def _load_pretrained(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Place weights made for maybe other channels and classes: the stem is adapted, a head of
    another shape starts anew."""
    own = model.state_dict()
    stem = next((f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    if (
        stem in state
        and stem in own
        and state[stem].dim() == 4
        and state[stem].shape[1] != own[stem].shape[1]
    ):
        state = {**state, stem: adapt_channels(state[stem], own[stem].shape[1])}
    head = weights.head_names(model)
    same = all(n in state and state[n].shape == own[n].shape for n in head)
    weights.load_state(model, state, head="match" if same else "replace", source=source)


def _hf_config(request: Request) -> tuple[Any, Path | None]:
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
    _check_options(
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


def _build_hf(request: Request) -> nn.Module:
    from transformers import AutoModelForImageClassification as Classifier

    config, folder = _hf_config(request)
    has_weights = hf_weights(request) is not None
    if request.pretrained is False or (request.pretrained is None and not has_weights):
        return Classifier.from_config(config)
    if isinstance(request.pretrained, Path):
        model = Classifier.from_config(config)
        _load_pretrained(model, weights.read_state(request.pretrained), str(request.pretrained))
        return model
    channels = request.options.get("in_chans")
    if channels is not None:  # load for the weights' own channels, change after
        config, _ = _hf_config(
            request._replace(options={k: v for k, v in request.options.items() if k != "in_chans"})
        )
    options: dict[str, Any] = {
        "config": config,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
    }
    source = str(folder) if folder else request.name
    model, info = _fetch(
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


MOVED = {"greenvis.subset": "greenvis.data.subsets"}  # in recipes and model files made before


def _import_function(request: Request) -> Callable[..., Any]:
    """Import what `package.module:function` names; modules beside the recipe come after the
    installed ones."""
    module, _, name = request.name.partition(":")
    sys.path.append(str(request.folder.resolve()))
    try:
        home = importlib.import_module(MOVED.get(module, module))
    except Exception as error:  # whatever the module raises while it is imported
        raise BadInput(
            f"cannot import '{module}' for the model '{request.ref}': {weights.first_line(error)}"
        ) from error
    finally:
        sys.path.pop()
    function = getattr(home, name, None)
    if not callable(function):
        raise BadInput(
            f"'{module}' has no function "
            f"'{name}'{nearest(name, [n for n in dir(home) if n[0] != '_'])}"
        )
    known = _option_names(function)
    if known is not None:
        _check_options(request, request.options, known)
    return function


def _build_code(request: Request) -> nn.Module:
    function = _import_function(request)
    if request.pretrained is True:
        return function(pretrained=True, **request.options)
    model = function(**request.options)
    if isinstance(request.pretrained, Path):
        _load_pretrained(model, weights.read_state(request.pretrained), str(request.pretrained))
    return model


def _plain_function(request: Request) -> Callable[..., nn.Module]:
    from greenvis.models import plain

    names = [n for n, f in vars(plain).items() if inspect.isfunction(f)]
    if request.name not in names:
        raise BadInput(f"unknown model '{request.ref}'{nearest(request.name, names)}")
    if request.pretrained:
        raise BadInput(f"{request.ref} is published with no weights; leave out `pretrained`")
    function = getattr(plain, request.name)
    _check_options(request, request.options, _option_names(function) or ())
    return function


LIBRARIES = {
    "timm": Library(_timm_options, _build_timm),
    "torchvision": Library(_torchvision_options, _build_torchvision),
    "hf": Library(_hf_config, _build_hf),
    "plain": Library(_plain_function, lambda request: _plain_function(request)(**request.options)),
    "code": Library(_import_function, _build_code),
}
