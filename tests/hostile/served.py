"""Run greenvis again and again, each time in a child of this process, in which everything is
imported.

A line of JSON on standard input asks for a run: {"words", "cwd", "env", "growth", "seconds"}; a
line on standard output answers: {"code", "out", "err", "cpu_s", "grown"}.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import greenvis
from greenvis.cli import main as cli
from tests.hostile import bounds


def import_all() -> None:
    """Import greenvis's modules, and what they import late."""
    for module in pkgutil.walk_packages(greenvis.__path__, "greenvis."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
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


def main() -> None:
    """See above."""
    import_all()
    resident = Path("/proc/self/statm")
    gc.freeze()  # so that children share these pages
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            before = os.sysconf("SC_PAGE_SIZE") * int(resident.read_text().split()[1])
            pid = os.fork()
            if not pid:
                os._exit(child(request, out, err))
            _, status, used = os.wait4(pid, 0)
            answer = {
                "code": os.waitstatus_to_exitcode(status),
                "out": out.read_text("utf-8", "replace"),
                "err": err.read_text("utf-8", "replace"),
                "cpu_s": used.ru_utime + used.ru_stime,
                "grown": max(0, 1024 * used.ru_maxrss - before),
            }
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
