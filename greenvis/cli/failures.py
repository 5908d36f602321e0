"""What a failure of the machine, or of our own, is called on one line. Standard library only."""

from __future__ import annotations

import errno
import re
import traceback

ON = "the same command goes on from the last checkpoint"
_MEMORY = "out of memory: set train.batch_size lower, or use a smaller model"
_LOADER = "a process that loads images was killed: set train.workers lower"
_DISK = "the disk is full, or takes no more"
_WORDS = (
    (r"DataLoader worker .*(exited|killed)", _LOADER),
    (
        r"(Connection (closed|reset) by peer|Broken pipe|gloo/|NCCL)",
        "another process of this training ended, or its network did",
    ),
    (r"(out of memory|can't allocate|cannot allocate|bad_alloc|failed to map segment)", _MEMORY),
    (
        r"(No space left|file write failed|unexpected pos|PytorchStreamWriter)",
        f"{_DISK}: free some space",
    ),
)


def describe(error: BaseException) -> str:
    """Return what happened, where, and what to do; of what we did not foresee, where in the
    code."""
    number = getattr(error, "errno", None)
    name = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{_DISK}{name}: free some space; {ON}"
    if number in (errno.EMFILE, errno.ENFILE):
        return (
            f"too many open files{name}: raise the limit (ulimit -n), or set train.workers lower; "
            f"{ON}"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write{name}: choose another folder with --runs or --out"
    if isinstance(error, MemoryError):
        return f"{_MEMORY}; {ON}"
    first = str(error).strip().partition("\n")[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, (ConnectionError, EOFError)) and any(
        "torch/utils/data/" in frame.filename for frame in frames
    ):
        return f"{_LOADER}; {ON} ({first})"
    if isinstance(error, (RuntimeError, OSError, ImportError)):
        for pattern, words in _WORDS:
            if re.search(pattern, str(error), re.IGNORECASE):
                return f"{words}; {ON} ({first})"
    frame = frames[-1] if frames else None
    where = f", in {frame.filename.rpartition('greenvis/')[2]}:{frame.lineno}" if frame else ""
    return (
        f"{type(error).__name__}: {first}{where}. This should not happen: GREENVIS_DEBUG=1 shows "
        "the whole traceback; please "
        "report it with the command"
    )
