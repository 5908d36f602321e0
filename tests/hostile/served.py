"""Run greenvis again and again, each time in a child of this process, in which everything is
imported.

What is received asks for runs that begin together: a list of {"words", "cwd", "env", "growth",
"seconds"}; what is sent answers: a list of {"code", "out", "err", "cpu_s", "grown"}.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import greenvis
from greenvis.cli import main as cli
from greenvis.errors import GreenvisError
from tests.hostile import bounds


def import_all() -> None:
    """Import greenvis's modules, and what they import late."""
    for module in pkgutil.walk_packages(greenvis.__path__, "greenvis."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError, GreenvisError):  # of an extra
                importlib.import_module(module.name)
    for name in ("timm", "torchvision.models", "transformers", "matplotlib.figure", "codecarbon"):
        importlib.import_module(name)


def child(request: dict[str, Any], out: Path, err: Path) -> int:
    """Become a process that runs a command; return its exit code."""
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.alarm(bounds.HANG)
    seconds, most = request["seconds"], bounds.data() + request["growth"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        code = cli.main(request["words"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code


def together(requests: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run commands that begin together; return what each did."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held, hold = os.pipe()
    pids = []
    for i, request in enumerate(requests):
        pid = os.fork()
        if not pid:
            os.close(hold)
            os.read(held, 1)  # until the parent has closed its end, too
            os.close(held)
            os._exit(child(request, folder / f"out{i}", folder / f"err{i}"))
        pids.append(pid)
    os.close(hold)
    os.close(held)
    answers = []
    for i, pid in enumerate(pids):
        _, status, used = os.wait4(pid, 0)
        answers.append(
            {
                "code": os.waitstatus_to_exitcode(status),
                "out": (folder / f"out{i}").read_text("utf-8", "replace"),
                "err": (folder / f"err{i}").read_text("utf-8", "replace"),
                "cpu_s": used.ru_utime + used.ru_stime,
                "grown": max(0, 1024 * used.ru_maxrss - pages * os.sysconf("SC_PAGE_SIZE")),
            }
        )
    return answers


def serve(asked: Connection) -> None:
    """See above."""
    import_all()
    # as in any other process; else each loader of images starts a server that imports all again
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    gc.freeze()  # so that children share these pages
    with contextlib.suppress(EOFError):
        while requests := asked.recv():
            with tempfile.TemporaryDirectory() as folder:
                asked.send(together(requests, Path(folder)))
