"""The models the contract is tried on: those of `greenvis bench coverage`."""

from greenvis.bench._hosts import CLASSES, HOSTS, Plain

__all__ = ["CLASSES", "HOSTS", "Plain"]
