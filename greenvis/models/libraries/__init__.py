"""What each model library calls things, and how it loads weights. `models` is the door; nothing
else comes here."""

from __future__ import annotations

from greenvis.models.libraries import _code, _timm, _torchvision, _transformers
from greenvis.models.libraries._loading import Library, Request, adapt_channels, set_in_chans
from greenvis.models.libraries._transformers import hf_weights

__all__ = ["LIBRARIES", "Library", "Request", "adapt_channels", "hf_weights", "set_in_chans"]

LIBRARIES = {
    "timm": Library(_timm.check, _timm.build),
    "torchvision": Library(_torchvision.check, _torchvision.build),
    "hf": Library(_transformers.check, _transformers.build),
    "plain": Library(
        _code.plain_function, lambda request: _code.plain_function(request)(**request.options)
    ),
    "code": Library(_code.check, _code.build),
}
