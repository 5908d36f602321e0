"""Models that a function returns: of a package (with trust), or of greenvis.models.plain."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from greenvis.core import weights
from greenvis.errors import BadInput, nearest
from greenvis.models.libraries._loading import Request, check_options, load_pretrained, option_names

MOVED = {"greenvis.subset": "greenvis.data.subsets"}  # in recipes and model files made before


def check(request: Request) -> Callable[..., Any]:
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
    known = option_names(function)
    if known is not None:
        check_options(request, request.options, known)
    return function


def build(request: Request) -> nn.Module:
    """Call the function named, and place the weights of a file where the request names one."""
    function = check(request)
    if request.pretrained is True:
        return function(pretrained=True, **request.options)
    model = function(**request.options)
    if isinstance(request.pretrained, Path):
        load_pretrained(model, weights.read_state(request.pretrained), str(request.pretrained))
    return model


def plain_function(request: Request) -> Callable[..., nn.Module]:
    """Return the builder of `plain/NAME`; raises BadInput for an unknown name, and for weights,
    which none of them has."""
    from greenvis.models import plain

    names = [n for n, f in vars(plain).items() if inspect.isfunction(f)]
    if request.name not in names:
        raise BadInput(f"unknown model '{request.ref}'{nearest(request.name, names)}")
    if request.pretrained:
        raise BadInput(f"{request.ref} is published with no weights; leave out `pretrained`")
    function = getattr(plain, request.name)
    check_options(request, request.options, option_names(function) or ())
    return function
