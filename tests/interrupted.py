"""Run greenvis and end it by kill -9 at an exact moment: right after the checkpoint that a
condition is true of was written.

python interrupted.py "'student/seed0' in path and epoch == 1 and batch == 3" run tiny.yaml …

The condition sees path (the checkpoint's, as text) and what `loop.Progress` holds. In the
environment, INTERRUPTED_FILE names
a file to write instead, with the process at rest from then on: for those who have several processes
to kill.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import brief

from greenvis.cli import main as cli
from greenvis.experiment import checkpoint

EVERY_STEP = (
    "train.checkpoint_every_s=1e-9"  # for --set: so that a checkpoint is written after every step
)


def at(moment: str) -> None:
    """Make this process end itself right after the checkpoint that the condition is true of."""
    condition, save = compile(moment, "condition", "eval"), checkpoint.save

    def save_and_end(
        path: Path, live: Any, optimizer: Any, scheduler: Any, accelerator: Any, progress: Any
    ) -> None:
        save(path, live, optimizer, scheduler, accelerator, progress)
        if eval(condition, {"path": str(path), **asdict(progress)}):
            if file := os.environ.get("INTERRUPTED_FILE"):
                Path(file).touch()
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save_and_end


def main() -> int:
    """Run until the moment has come."""
    brief.measurements()
    at(sys.argv[1])
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
