"""Which images, with which labels, in which order: sources, data sets, transforms, streams, kept
outputs."""

from greenvis.data.datasets import Data, ImageSet, batches, check, load, order

__all__ = ["Data", "ImageSet", "batches", "check", "load", "order"]
