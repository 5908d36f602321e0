"""The models the contract is tried on: those of `greenvis bench coverage`."""

from greenvis.bench.coverage.hosts import CLASSES, HOSTS, Plain

__all__ = ["CLASSES", "HOSTS", "Plain"]
