"""What each model library calls things, and how it loads weights. `models` is the door; nothing
else comes here."""

from __future__ import annotations

from greenvis.models.libraries import _classes, _code, _timm, _torchvision, _transformers
from greenvis.models.libraries._classes import PARTS
from greenvis.models.libraries._loading import Library, Request, adapt_channels, set_in_chans

__all__ = ["LIBRARIES", "PARTS", "Library", "Request", "adapt_channels", "set_in_chans"]

LIBRARIES = {
    "timm": Library(_timm.check, _timm.build),
    "torchvision": Library(_torchvision.check, _torchvision.build),
    "hf": Library(_transformers.check, _transformers.build, _transformers.hf_weights),
    "transformers": Library(
        _classes.check_transformers, _classes.build_transformers, _classes.local_weights
    ),
    "diffusers": Library(
        _classes.check_diffusers, _classes.build_diffusers, _classes.local_weights
    ),
    "plain": Library(
        _code.plain_function, lambda request: _code.plain_function(request)(**request.options)
    ),
    "code": Library(_code.check, _code.build),
}
