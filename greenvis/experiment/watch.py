"""What hears how a session goes: which run is at work, and what it logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from greenvis.experiment.jobs import Job
    from greenvis.meters.track import Tracker
    from greenvis.tasks.base import Measure


class Watch:
    """Says in lines which run is at work.

    Args:
        say: Takes a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def planned(self, jobs: Sequence[Job]) -> None:
        """Hear of all jobs, in the order they run; some may be done."""

    def skipped(self, job: Job, why: str) -> None:
        """Hear that a job was done before. why: what there is to say of that, or ""."""
        self.say(f"{title(job)}: done before, kept{why}")

    def began(self, job: Job, why: str) -> None:
        """Hear that a job is at work. why: what there is to say of that, or ""."""
        self.say(f"{title(job)}: training{why}")

    def metered(self, tracker: Tracker, measure: Measure) -> None:
        """Hear what meters the job, and what it is judged by."""

    def ended(self, job: Job, tracker: Tracker, metrics: dict[str, float]) -> None:
        """Hear that a job is done. metrics: of its last evaluation, by name."""


def title(job: Job) -> str:
    """Return what lines call a job."""
    return f"{job.name} seed {job.seed}"


def epochs_of(job: Job) -> int:
    """Return the epochs that a job trains in all: those of its stages, and of each task of its
    stream or round of labels."""
    arm = job.arm
    each = sum(stage.train.epochs for stage in arm.stages) or arm.train.epochs
    if arm.stream is not None:
        return each * arm.stream.tasks
    return each * arm.active.rounds if arm.active is not None else each
