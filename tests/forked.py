"""greenvis in a process of its own that has nothing to import: forked from one that has.

A new interpreter takes six seconds of CPU until it trains; tests that kill, interrupt or starve a
process need one, but not a new interpreter.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(  # what a training and a report import
    [
        "pytest",  # which a child of it would import as its main module
        "timm",
        "torchmetrics",
        "torch._dynamo",
        "fvcore.nn",
        "rich.table",
        "matplotlib.figure",
        "greenvis.cli.models",
        "greenvis.cli.planning",
        "greenvis.cli.runs",
        "greenvis.experiment.on_ray",
        "greenvis.experiment.session",
        "greenvis.meters.flops",
        "greenvis.models.build",
        "greenvis.planning.plan",
        "greenvis.report.page",
    ]
)
HANGS_S = 600  # for a hang, not for slow machines
_started: list[Greenvis] = []


def end_all() -> None:
    """End what a failed test left running."""
    while _started:
        _started.pop().end()


class Greenvis:
    """A process that runs `greenvis WORDS`.

    Args:
        words: of the command line; a path of a Python file: that is run instead.
        cwd: where it runs.
        moment: where it ends itself by kill -9, a condition of `interrupted.py`; "": nowhere.
        limits: of the system, set before it begins: (resource.RLIMIT_…, bytes or number).
        env: set in its environment.
    """

    def __init__(
        self,
        *words: str,
        cwd: Path,
        moment: str = "",
        limits: Sequence[tuple[int, int]] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._out, self._err = NamedTemporaryFile(), NamedTemporaryFile()  # noqa: SIM115
        files = (self._out.name, self._err.name)
        arguments = (words, str(cwd), moment, limits, {**(env or {})}, files)
        self._process = FORKS.Process(target=_run, args=arguments)
        self._process.start()
        _started.append(self)

    @property
    def pid(self) -> int:
        """Its number in the system."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, -n where signal n ended it; None: it runs."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What it has written to standard output."""
        return Path(self._out.name).read_text()

    @property
    def stderr(self) -> str:
        """What it has written to standard error."""
        return Path(self._err.name).read_text()

    def wait(self, seconds: float = HANGS_S) -> int | None:
        """Return its exit code once it has one, or None after so many seconds."""
        self._process.join(seconds)
        return self.returncode

    def end(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.join()


def greenvis(
    *words: str, cwd: Path, moment: str = "", env: Mapping[str, str] | None = None
) -> Greenvis:
    """Run `greenvis WORDS` to its end."""
    process = Greenvis(*words, cwd=cwd, moment=moment, env=env)
    if process.wait() is None:
        process.end()
        raise AssertionError(f"greenvis {words} hangs: {process.stderr}")
    return process


def ranks(*words: str, cwd: Path) -> tuple[Greenvis, Greenvis]:
    """Run `greenvis WORDS`, or a Python file, as two processes that meet over gloo, as torchrun has
    them; torchrun itself is in the slow tests."""
    meeting = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.SystemRandom().randrange(10_000, 30_000)),  # nobody's by chance
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }
    first, second = both = tuple(
        Greenvis(*words, cwd=cwd, env={**meeting, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    )
    end = time.monotonic() + HANGS_S
    while None in (codes := [process.wait(0.05) for process in both]):
        if any(codes) or time.monotonic() > end:
            break
    assert codes == [0, 0], f"{words}: {first.stderr[-3000:]}{second.stderr[-3000:]}"
    return first, second


def _run(
    words: Sequence[str],
    cwd: str,
    moment: str,
    limits: Sequence[tuple[int, int]],
    env: Mapping[str, str],
    files: tuple[str, str],
) -> None:
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # unlike below a shell's "&"
    import brief
    import interrupted
    import torch

    from greenvis.cli import main as cli

    gc.freeze()
    # as in any other process; else each loader of images starts a server that imports all again
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    torch.set_num_threads(1)
    brief.measurements()
    os.environ.update(env)
    tempfile.tempdir = None  # the environment may say another
    os.chdir(cwd)
    script = words[0].endswith(".py")
    sys.argv = [*words] if script else ["greenvis", *words]
    if moment:
        interrupted.at(moment)
    for kind, most in limits:
        resource.setrlimit(kind, (most, most))
    if script:
        runpy.run_path(words[0], run_name="__main__")
    else:
        sys.exit(cli.main([*words]))
