"""Any model class of transformers or diffusers, by its name or by a folder that holds one."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from greenvis.core import files, weights
from greenvis.errors import BadInput, nearest, some
from greenvis.models.completion import Completed, image_and_text, image_and_time
from greenvis.models.libraries._loading import Request, check_options, load_pretrained

MOST_BYTES = 2**20  # of a config.json
WORDS = {
    "num_classes": ("num_labels", "num_class_embeds", "num_embeds_ada_norm"),
    "in_chans": ("num_channels", "in_channels"),
    "img_size": ("image_size", "sample_size"),
    "patch_size": ("patch_size",),
    "embed_dim": ("hidden_size",),
    "depth": ("num_hidden_layers", "num_layers"),
    "num_heads": ("num_attention_heads",),
    "tokens": ("vocab_size",),
    "length": ("max_position_embeddings",),
}
OF_TEXT = ("tokens", "length")  # words that are of a text part alone
OF_IMAGES = ("in_chans", "img_size", "patch_size")
PARTS = ("text_config", "vision_config")
# tokens that are no words: 0 pads, the last but one begins a text, the last ends it
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


class Resolved(NamedTuple):
    """A class, what its constructor or configuration is to be called with, and whose weights."""

    cls: Any
    values: dict[str, Any]
    folder: Path | None


def check_transformers(request: Request) -> Resolved:
    """Return the class and configuration that `transformers/NAME` names."""
    import transformers

    resolved = _find(request, transformers, "PreTrainedModel", "architectures")
    config = resolved.cls.config_class
    if config is None:
        raise BadInput(f"{request.ref} is a base class: name one that builds on it")
    defaults = {"num_labels": None, **config().to_dict()}
    values = _with_words(request, {**defaults, **resolved.values}, resolved.values, defaults)
    if values.get("num_labels") is not None:  # names of as many as the folder has
        values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
    return resolved._replace(values=values)


def build_transformers(request: Request) -> nn.Module:
    """Build a model of transformers; a dual encoder is called with images and tokens."""
    resolved = check_transformers(request)
    derived = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype")
    values = {k: v for k, v in resolved.values.items() if k not in derived}
    config = resolved.cls.config_class(**values)
    if request.pretrained in (None, True) and local_weights(request) is not None:
        model = _from_folder(request, resolved, config)
    else:
        model = resolved.cls._from_config(config)
        _load(model, request, resolved._replace(folder=None))
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        from greenvis.models.dual import DualEncoder

        text = getattr(config, "text_config", config)
        if not resolved.cls.can_generate():
            return DualEncoder(model, int(getattr(text, "max_position_embeddings", 77)))
    model.register_forward_pre_hook(Completed(image_and_text), with_kwargs=True)
    return model


def check_diffusers(request: Request) -> Resolved:
    """Return the class and arguments that `diffusers/NAME` names."""
    diffusers = _diffusers()
    resolved = _find(request, diffusers, "ModelMixin", "_class_name")
    known = {
        name: p.default
        for name, p in inspect.signature(resolved.cls.__init__).parameters.items()
        if name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD
    }
    stated = {k: v for k, v in resolved.values.items() if k in known}
    values = _with_words(request, {**known, **stated}, stated, known)
    if "in_chans" in request.options and "out_channels" in known:
        values.setdefault("out_channels", request.options["in_chans"])
    return resolved._replace(values=values)


def build_diffusers(request: Request) -> nn.Module:
    """Build a network of diffusers: called with noisy images, a time, and what it is told of them.

    See `core.example.Example` for a batch of these.
    """
    resolved = check_diffusers(request)
    model = resolved.cls(**resolved.values)
    _load(model, request, resolved)
    model.register_forward_pre_hook(Completed(image_and_time), with_kwargs=True)
    return model


def local_weights(request: Request) -> Path | None:
    """Return the folder whose weights a reference begins with, if it is one that holds any."""
    folder = _folder(request)
    return folder if folder is not None and _weight_files(folder) else None


def _diffusers() -> Any:
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of what is said about torchao, which nobody asked for
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise BadInput(
            "models of diffusers need it: get it with `pip install 'greenvis[generation]'`"
        ) from error
    finally:
        logger.setLevel(level)


def _folder(request: Request) -> Path | None:
    folder = (request.folder / Path(request.name).expanduser()).resolve()
    return folder if folder.is_dir() else None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if len(p.suffixes) == 1)


def _find(request: Request, library: Any, base: str, key: str) -> Resolved:
    """Return the class that a name or a folder's config.json names, of those built on `base`."""
    folder, name, values = _folder(request), request.name, {}
    if folder is not None:
        if (folder / "model_index.json").is_file():
            parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
            raise BadInput(
                f"{request.ref} is a pipeline: name one of its parts, as {request.ref}/"
                f"{_drawing_part(parts)}"
            )
        if not (folder / "config.json").is_file():
            raise BadInput(f"{request.ref}: no config.json in {folder}")
        values = files.read_json(folder / "config.json", "configuration", MOST_BYTES)
        name = values.get(key) if isinstance(values, dict) else None
        name = name[0] if isinstance(name, list) and name else name
        if not isinstance(name, str):
            raise BadInput(f"{folder / 'config.json'} names no class as its '{key}'")
        values = {k: v for k, v in values.items() if not k.startswith("_") and k != "auto_map"}
    cls = getattr(library, name, None) if name.isidentifier() else None
    if not inspect.isclass(cls) or not issubclass(cls, getattr(library, base)):
        names = [n for n in dir(library) if n[:1].isupper() and ("Model" in n or "For" in n)]
        alike = [n for n in names if n.lower() == name.lower()]
        raise BadInput(
            f"unknown model '{request.ref}'{nearest(name, alike or names)} Neither a folder in "
            f"{request.folder.resolve()} nor a model class of {library.__name__}; one of the hub "
            "is first brought here by `hf download NAME --local-dir FOLDER`"
        )
    if request.pretrained is True and (folder is None or not _weight_files(folder)):
        raise BadInput(
            f"{request.ref} comes without weights: leave out `pretrained`, give it a safetensors "
            "file, or name a folder that holds config.json and weights"
        )
    return Resolved(cls, values, folder)


def _drawing_part(parts: list[str]) -> str:
    """Return the part of a pipeline that draws; "unet" where none has a name that is known."""
    return next((p for p in ("unet", "transformer") if p in parts), (parts or ["unet"])[0])


def _with_words(
    request: Request,
    known: Mapping[str, Any],
    stated: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a class is made of: what its folder says, and the options in its own words; of a
    model with parts, in those they are of."""
    check_options(request, request.options, {*known, *WORDS})
    out = {k: dict(v) if isinstance(v, Mapping) else v for k, v in stated.items()}
    for option, value in request.options.items():
        if option in known:
            merged = isinstance(value, Mapping) and isinstance(out.get(option), dict)
            out[option] = {**out[option], **value} if merged else value
            continue
        parts = [p for p in PARTS if isinstance(defaults.get(p), Mapping) or p in known]
        if option in OF_TEXT:
            parts = parts[:1]
        elif option in OF_IMAGES:
            parts = parts[1:]
        words = [w for w in WORDS[option] if w in known]
        if words:
            out[words[0]] = value
        elif parts and option != "num_classes":
            for part in parts:
                out[part] = {WORDS[option][0]: value, **(out.get(part) or {})}
    if "tokens" in request.options:
        text = out.get("text_config", out)
        for name, end in ENDS.items():
            if name in (defaults.get("text_config") or known):
                text.setdefault(name, request.options["tokens"] - end if end else 0)
    return out


def _load(model: nn.Module, request: Request, resolved: Resolved) -> None:
    """Place the weights a request asks for: a file's, or those beside the configuration."""
    if request.pretrained is False:
        return
    sources: list[Path] = []
    if isinstance(request.pretrained, Path):
        sources = [request.pretrained]
    elif resolved.folder is not None:
        sources = _weight_files(resolved.folder)
    if sources:
        state: dict[str, Tensor] = {}
        for source in sources:
            state |= weights.read_state(source)
        load_pretrained(model, state, str(sources[0].parent))


def _from_folder(request: Request, resolved: Resolved, config: Any) -> nn.Module:
    """Return a model of transformers with the weights beside its configuration, whose names are
    not always the model's: the library knows them."""
    options: dict[str, Any] = {"config": config, "use_safetensors": True, "local_files_only": True}
    model, info = resolved.cls.from_pretrained(
        str(resolved.folder), output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    kinds = ("missing_keys", "mismatched_keys")
    names = {n if isinstance(n, str) else n[0] for kind in kinds for n in info[kind]}
    if wrong := sorted(names - weights.head_names(model)):
        raise BadInput(
            f"{request.ref}: with these options its weights do not fit; missing or of another "
            f"shape: {some(wrong)}"
        )
    return model
