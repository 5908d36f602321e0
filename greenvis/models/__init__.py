"""Any vision model: built by reference, looked at by structure, folded, prepared for its images."""

from greenvis.core.attached import attach, attached
from greenvis.core.weights import fingerprint, load_weights
from greenvis.models.build import build, check, check_size, file_of, origin, published, save
from greenvis.models.preprocessing import (
    Pixels,
    Renormalise,
    classes_of,
    describe,
    description,
    order_of,
    pixels_of,
)

__all__ = [
    "Pixels",
    "Renormalise",
    "attach",
    "attached",
    "build",
    "check",
    "check_size",
    "classes_of",
    "describe",
    "description",
    "file_of",
    "fingerprint",
    "load_weights",
    "order_of",
    "origin",
    "pixels_of",
    "published",
    "save",
]
