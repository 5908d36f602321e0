"""CPU-seconds and resident memory of this process and everything it started, counted once each.

CPU-seconds = own + reaped children (the kernel adds a child's time to its parent's when the parent
waits for it, so one that lived and died between two readings is there) + live descendants, each
with what it has reaped itself. A parent is read
before its children: a child reaped in between is missed for a moment, and made up at the next
reading, but never doubled.
"""

from __future__ import annotations

import os
import sys
import time

GB = 1e9
TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
WALK_EVERY_S = 0.05  # the tree is listed again at most this often; its clocks are read each time
SHARE_EVERY_S = 10.0  # a process' share of shared pages costs milliseconds: look rarely


def open_tree() -> ProcessTree | PortableTree:
    """Return the reader for this system: /proc where there is one, psutil elsewhere."""
    return ProcessTree() if sys.platform == "linux" else PortableTree()


class ProcessTree:
    """Reads /proc. One instance belongs to one process; a fork needs its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # live descendants: start time in ticks, CPU-seconds when last read
        self._seen: dict[int, tuple[int, float]] = {}
        self._orphans: set[int] = set()
        self._walked = -1.0
        self._raw = self._total = self._lost = 0.0
        self._share: dict[int, tuple[float, float]] = {}

    def cpu_s(self) -> float:
        """Return CPU-seconds so far, user and system; never falls."""
        raw = 0.0
        for _ in range(3):
            reaped = _reaped_s()
            live = self._live() if self._seen or has_children() else 0.0
            raw = time.process_time() + reaped + live
            if raw >= self._raw - 2 * TICK_S:
                break
        else:  # a drop that stays: descendants ended that nobody of ours waited for
            self._lost += self._raw - raw
        self._raw = raw
        self._total = max(self._total, raw + self._lost)
        return self._total

    def resident_gb(self) -> float:
        """Return resident memory in GB (1e9 bytes) of what runs; pages shared with children are
        divided between them."""
        if not self._seen:
            return _resident(self._pid) / GB
        now = time.monotonic()
        return (
            sum(
                _resident(p) * self._share_of(p, now)
                for p in (self._pid, *self._seen)
                if not _stopped(p)
            )
            / GB
        )

    def _live(self) -> float:
        now = time.monotonic()
        if now - self._walked >= WALK_EVERY_S:
            self._walked = now
            self._walk()
        else:
            for pid in list(self._seen):
                self._look(pid)
        return sum(seconds for _, seconds in self._seen.values())

    def _walk(self) -> None:
        queue = children(self._pid)
        reached = set()
        for pid in queue:
            if pid not in reached and self._look(pid):
                reached.add(pid)
                queue.extend(children(pid))
        for pid in [p for p in self._seen if p not in reached]:
            if self._look(pid):  # alive, but its parent ended: it goes on counting as ours
                self._orphans.add(pid)

    def _look(self, pid: int) -> bool:
        """Read one process; False where it has ended (or its number now belongs to another)."""
        stat = _stat(pid)
        known = self._seen.get(pid)
        if stat is not None and (known is None or known[0] == stat[0]):
            self._seen[pid] = stat
            return True
        if known is not None:
            del self._seen[pid]
            self._share.pop(pid, None)
            if pid in self._orphans:  # init waited for it: the kernel adds its time to none of ours
                self._orphans.discard(pid)
                self._lost += known[1]
                self._raw -= known[1]
        return False

    def _share_of(self, pid: int, now: float) -> float:
        at, share = self._share.get(pid, (-SHARE_EVERY_S, 1.0))
        if now - at >= SHARE_EVERY_S:
            share = _proportional_share(pid)
            self._share[pid] = (now, share)
        return share


class PortableTree:
    """The same two readings by psutil, for systems without /proc."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._me = psutil.Process()
        self._total = 0.0

    def cpu_s(self) -> float:
        """Return CPU-seconds so far, user and system; never falls."""
        t = os.times()
        total = time.process_time() + t.children_user + t.children_system
        for child in self._me.children(recursive=True):
            try:
                c = child.cpu_times()
            except self._psutil.Error:
                continue
            total += (
                c.user
                + c.system
                + getattr(c, "children_user", 0.0)
                + getattr(c, "children_system", 0.0)
            )
        self._total = max(self._total, total)
        return self._total

    def resident_gb(self) -> float:
        """Return resident memory of this process and its descendants in GB."""
        total = 0
        for process in (self._me, *self._me.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except self._psutil.Error:
                continue
        return total / GB


def has_children() -> bool:
    """Say whether this process has a child, running or waiting to be reaped, in one call and
    without reaping it."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except (OSError, AttributeError):
        return True
    return True


def children(pid: int) -> list[int]:
    """Return the children of a process, whichever of its threads started them; none where it has
    ended."""
    try:
        # a kernel without that file, or an ended process
        if not os.path.exists(f"/proc/{pid}/task/{pid}/children"):
            return [
                p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(p) == pid
            ]
        return [
            int(c)
            for t in os.listdir(f"/proc/{pid}/task")
            for c in _read(f"/proc/{pid}/task/{t}/children").split()
        ]
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(_read(f"/proc/{pid}/stat").rsplit(b")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


def _reaped_s() -> float:
    import resource  # not on every system

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stat(pid: int) -> tuple[int, float] | None:
    """Return (start time in ticks, CPU-seconds with what it reaped), or None where there is no such
    process."""
    try:
        fields = _read(f"/proc/{pid}/stat").rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return int(fields[19]), sum(map(int, fields[11:15])) * TICK_S


def _stopped(pid: int) -> bool:
    """Say whether a process is stopped by a signal: it holds its memory, but does nothing with
    it."""
    try:
        return _read(f"/proc/{pid}/stat").rsplit(b")", 1)[1].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def _resident(pid: int) -> int:
    try:
        return int(_read(f"/proc/{pid}/statm").split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def _proportional_share(pid: int) -> float:
    """Return PSS / RSS: forked workers share most pages with their parent, and these exist once."""
    try:
        values = dict(
            line.split()[:2] for line in _read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]
        )
        return int(values[b"Pss:"]) / max(int(values[b"Rss:"]), 1)
    except (OSError, KeyError, ValueError):
        return 1.0


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 16384)
    finally:
        os.close(fd)
