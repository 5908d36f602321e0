"""The header of a run record: which run, on which machine, with what versions, from which
commit."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenvis.meters.host import cpu_name

RUN_ENV = (
    "GREENVIS_RUN"  # "run id:pid": tells a child process that a tracker above it counts it already
)
RANK_ENVS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
CLOCK_S = 60.0  # by so much the wall clock may have been set since a process began
WORLD_ENVS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def ranks() -> tuple[int, int]:
    """Return (rank, world size) from the environment the launcher set; (0, 1) where there is
    none."""
    rank, world = (
        next((int(os.environ[k]) for k in names if os.environ.get(k, "").isdigit()), None)
        for names in (RANK_ENVS, WORLD_ENVS)
    )
    return (rank, world) if rank is not None and world is not None and rank < world else (0, 1)


def run_id(name: str, turn: int) -> str:
    """Return a new id; the same for all ranks of one launch.

    turn: how many runs this process tracked before; ranks do the same work, so it agrees among
    them. A launcher that names its launches (SLURM, torchrun --rdzv-id or --standalone) gives one
    id over all hosts; else it is one per host.
    """
    if ranks()[1] == 1:
        return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + os.urandom(4).hex()
    import hashlib

    parent = os.getppid()
    unique = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "none")
    where = (launch(),) if unique not in ("none", "") else (boot_id(), parent, _started(parent))
    key = (where, os.environ.get("TORCHELASTIC_RESTART_COUNT"), name, turn)
    return (
        time.strftime("%Y%m%d-", time.gmtime(_started(parent) or None))
        + "r"
        + hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    )


def launch() -> str:
    """Return what all ranks of one launch share over hosts: the meeting point. "" for a single
    process."""
    if ranks()[1] == 1:
        return ""
    return "/".join(
        os.environ.get(k, "")
        for k in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    )


def outer_run() -> str | None:
    """Return the run id of a tracker in a process above this one, which counts this process as its
    child."""
    run, _, pid = os.environ.get(RUN_ENV, "").rpartition(":")
    above = os.getppid()
    while run and above > 1:
        if str(above) == pid:
            return run
        above = _status(above)[0]
    return None


def _parents() -> list[int]:
    """Return the pids of the processes above this one, the nearest first: a tracker in one of them
    counts it."""
    out: list[int] = []
    above = os.getppid()
    while above > 1 and above not in out:
        out.append(above)
        above = _status(above)[0]
    return out


def describe() -> dict[str, Any]:
    """Return the header's facts about process, machine and code."""
    rank, world = ranks()
    return {
        "rank": rank, "world_size": world, "launch": launch(),
        "host": _host(), "boot_id": boot_id(), "pid": os.getpid(), "parents": _parents(),
        "clock_s": time.time(), "mono_s": time.monotonic(),
        "versions": versions(), "cpu": cpu(), "command": command(), "git": commit(here()),
    }  # fmt: skip


def is_running(header: Mapping[str, Any]) -> bool:
    """Whether the process that began a record still runs, here on this machine.

    Args:
        header: of the record.
    """
    pid, began_s = header.get("pid"), header.get("clock_s")
    if not (isinstance(pid, int) and isinstance(began_s, (int, float))):
        return False
    if (header.get("host"), header.get("boot_id")) != (_host(), boot_id()):
        return False
    import psutil  # late: a tracker's start pays for each import

    try:
        process = psutil.Process(pid)
        alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return alive and process.create_time() < began_s + CLOCK_S  # else its pid came round again
    except (psutil.Error, ValueError, OverflowError):
        return False


def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "?")


def command() -> list[str]:
    """Return the command to repeat this process with, without where this machine keeps its
    interpreter and folders."""
    script, *words = sys.argv or [""]
    if os.path.isabs(script):
        script = os.path.relpath(script, here())
    return [os.path.basename(sys.executable), script, *words]


def here() -> Path:
    """Return the working folder, absolute; as "." where it was deleted under the process."""
    try:
        return Path.cwd()
    except OSError:
        return Path()


def boot_id() -> str:
    """Return what identifies this boot of this machine, so that its counters are comparable among
    processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"up since {round((time.time() - time.monotonic()) / 60)} min"


def cpu() -> dict[str, Any]:
    """Return the processor's name, logical CPUs (and those this process may use), and whether this
    is a virtual machine."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace").split("processor\t: 1\n")[0]
    except OSError:
        flags = ""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": cpu_name(),
        "logical": os.cpu_count(),
        "allowed": allowed,
        "virtual": " hypervisor" in flags,
    }


def versions() -> dict[str, str]:
    """Return the versions that matter for repeating a run, without importing anything."""
    packages = ("greenvis", "torch", "torchvision", "timm", "transformers", "peft")
    out = {"python": sys.version.split()[0], "platform": sys.platform}
    for folder in filter(os.path.isdir, sys.path):
        for entry in os.listdir(folder):  # importlib.metadata says the same, after 20 ms of imports
            name, _, version = entry.removesuffix(".dist-info").partition("-")
            if entry.endswith(".dist-info") and name in packages:
                out.setdefault(name, version)
    return out


def commit(folder: Path) -> str | None:
    """Return the commit checked out in the repository `folder` lies in, read from its files; None
    outside of one."""
    for above in (folder, *folder.parents):
        git = above / ".git"
        try:
            if git.is_file():  # a worktree or submodule points elsewhere
                git = above / git.read_text().split("gitdir:", 1)[1].strip()
            elif not git.is_dir():
                continue
            head = (git / "HEAD").read_text().strip()
            if not head.startswith("ref: "):
                return head
            common = (
                git / (git / "commondir").read_text().strip()
                if (git / "commondir").exists()
                else git
            )
            return _resolve(common, head[5:])
        except (OSError, IndexError):
            return None
    return None


def _resolve(git: Path, ref: str) -> str | None:
    if (git / ref).exists():
        return (git / ref).read_text().strip()
    packed = (git / "packed-refs").read_text().splitlines()
    return next((line.split()[0] for line in packed if line.endswith(" " + ref)), None)


def _status(pid: int) -> tuple[int, int]:
    """Return (parent's pid, start time in clock ticks since boot) of a process; (0, 0) where it
    cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
        return int(fields[1]), int(fields[19])
    except (OSError, IndexError):
        return 0, 0


def _started(pid: int) -> int:
    """Return when a process started, in seconds of the wall clock; 0 where it cannot be read."""
    ticks = _status(pid)[1]
    if not ticks:
        return 0
    boot = next(
        int(line.split()[1])
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith("btime")
    )
    return boot + ticks // os.sysconf("SC_CLK_TCK")
