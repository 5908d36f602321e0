"""A run's folder: which files lie in it, and who may write to it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from greenvis.core import distributed, files
from greenvis.errors import GreenvisError

DONE_FILE, WEIGHTS_FILE = "done.json", "model.safetensors"
CHECKPOINT_FILE, PLAN_FILE, CACHE_FOLDER = "checkpoint.pt", "plan.json", ".cache"
BOUNDARY = "stages.safetensors"  # what the stages that are over left behind
SUBSET_FILE = "subset.safetensors"
SYNTHESIS_FILE = "synthesis.safetensors"
ROUNDS_FILE = "rounds.json"  # which labels were bought
SEARCH_FILE = "search.json"  # which structures were tried


@contextmanager
def locked(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the folder for one process, or for those that train together. The lock goes with the
    process, however it ends.

    wait: called before it waits for another process that holds the folder; without, that is a
    GreenvisError.
    """
    if distributed.rank():
        if not (folder / ".lock").exists():
            raise GreenvisError(
                f"process {distributed.rank()} on {os.uname().nodename} does not see {folder}: "
                "give --runs a folder that all share"
            )
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(files.lock(folder / ".lock"), "w")
    except OSError as error:
        raise GreenvisError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder with "
            "--runs"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if wait is None:
                raise GreenvisError(
                    f"another process is running this recipe into {folder}; wait for it, or use "
                    "another --runs"
                ) from error
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        files.sweep(folder)
        yield


def write_json(path: Path, content: Any) -> None:
    """Write `content`, whole or not at all."""
    files.write(path, json.dumps(content, indent=2, default=str))
