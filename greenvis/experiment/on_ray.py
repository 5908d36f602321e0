"""A recipe's jobs on a Ray cluster: one task for each arm and seed, its records written as files
where all machines see them.

Ray is an optional extra (`pip install 'greenvis[ray]'`). Nothing but the choice of the machine
differs from one after another: each job is trained by the same code into the same folder, and is
skipped, resumed and reported in the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment.jobs import Job, forget
from greenvis.experiment.recipe import Recipe, load_recipe
from greenvis.experiment.run_folder import locked
from greenvis.experiment.session import Session

TRIES = 3


@dataclass
class Unit:
    """One job as the driver sees it: what to run where, what it waits for, how often it was
    tried."""

    job: Job
    overrides: tuple[str, ...]
    needs: tuple[Path, ...]
    tries: int = 0

    @property
    def name(self) -> str:
        """How progress calls it."""
        return f"{self.job.name} seed {self.job.seed}"


@dataclass(frozen=True)
class Order:
    """What a worker is told: which job of which recipe to finish, and a file that it sees if it
    sees the folder of runs."""

    recipe: Path
    overrides: tuple[str, ...]
    runs: Path
    folder: Path
    witness: Path
    trust: bool
    command: tuple[str, ...]
    log_with: tuple[str, ...] = field(default=())


def run(
    recipes: Sequence[tuple[Recipe, Sequence[str]]],
    *,
    runs: str | Path = "runs",
    fresh: bool = False,
    trust: bool = False,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    log_with: Sequence[str] = (),
) -> tuple[list[Path], dict[str, str]]:
    """Train every arm of the recipes with every seed on Ray; return the folders of their records,
    and why jobs failed, by name.

    recipes: with the overrides that made each (`greenvis.experiment.sweep.load`). Uses the cluster
    that RAY_ADDRESS names or that runs on this machine, else starts one here. A job whose worker
    dies, or that fails otherwise than by a `GreenvisError`, is tried up to three times in all; what
    its lost attempts spent stays in the totals, for their records are files. A job takes as many
    CPUs as the arm's `threads` (1 where absent), and a GPU where the cluster has some. `runs` must
    lie where every machine sees it. A counter of the whole machine's energy sees all jobs that run
    on it at once. Raises BadInput before anything is trained, as one after another does, and where
    Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(
            "running on Ray needs the package ray, which is not installed: pip install "
            "'greenvis[ray]'"
        )
    folder = Path(runs).resolve()
    units = _units(recipes, lambda: Session(folder, trust, command, say, log_with))
    with ExitStack() as held:
        for recipe, _ in recipes:
            held.enter_context(locked(folder / recipe.name))
        if fresh:
            own = [recipe for recipe, _ in recipes]
            for unit in units.values():
                if any(unit.job.recipe is recipe for recipe in own):
                    forget(unit.job)
        witness = folder / f".ray-{uuid.uuid4().hex}"
        witness.touch()
        held.callback(witness.unlink)
        ray = held.enter_context(_cluster())

        def order(unit: Unit) -> Order:
            path = unit.job.recipe.path.resolve()
            return Order(
                path, unit.overrides, folder, unit.job.folder, witness, trust, tuple(command),
                tuple(log_with)
            )  # fmt: skip

        failed = _Driver(ray, units, order, say).work()
    return [folder / recipe.name for recipe, _ in recipes], failed


def _units(
    recipes: Sequence[tuple[Recipe, Sequence[str]]], session: Callable[[], Session]
) -> dict[Path, Unit]:
    """Return all jobs by their folder, each once, after those it needs."""
    units: dict[Path, Unit] = {}
    for recipe, overrides in recipes:
        for job in session().plan(recipe):
            made = tuple(overrides) if job.recipe is recipe else ()
            units.setdefault(
                job.folder, Unit(job, made, tuple(used.folder for used in job.uses.values()))
            )
    return units


class _Driver:
    """Hands jobs out as what they need is there, and takes in how they ended."""

    def __init__(
        self,
        ray: Any,
        units: dict[Path, Unit],
        order: Callable[[Unit], Order],
        say: Callable[[str], None],
    ) -> None:
        self.ray, self.units, self.order, self.say = ray, units, order, say
        self.done: set[Path] = set()
        self.failed: dict[Path, str] = {}
        self.running: dict[Any, Path] = {}
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self.remote = ray.remote(max_retries=0, num_gpus=gpus)(finish)

    def work(self) -> dict[str, str]:
        """Run all that can be run; return why the others were not, by name."""
        for folder, unit in self.units.items():
            if unit.job.done() is not None:
                self.done.add(folder)
                self.say(f"{unit.name}: done before, kept")
        while True:
            self._hand_out()
            if not self.running:
                return {self.units[folder].name: why for folder, why in self.failed.items()}
            ready, _ = self.ray.wait(list(self.running), num_returns=1)
            self._take_in(ready[0])

    def _hand_out(self) -> None:
        waiting = [
            f
            for f in self.units
            if f not in self.done and f not in self.failed and f not in self.running.values()
        ]
        for folder in waiting:
            unit = self.units[folder]
            lost = [self.units[needed].name for needed in unit.needs if needed in self.failed]
            if lost:
                self.failed[folder] = f"it needs {lost[0]}, which failed"
            elif all(needed in self.done for needed in unit.needs):
                unit.tries += 1
                cpus = unit.job.arm.train.threads or 1
                task = self.remote.options(num_cpus=cpus, name=unit.name).remote(self.order(unit))
                self.running[task] = folder
                self.say(f"{unit.name}: handed out")

    def _take_in(self, task: Any) -> None:
        folder = self.running.pop(task)
        unit = self.units[folder]
        try:
            self.ray.get(task)
        except GreenvisError as error:  # of a job itself: it would come again
            self._lose(folder, str(getattr(error, "cause", error)))
        except (
            Exception
        ) as error:  # a worker died, a machine is out of memory, …: whatever it was may be over
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            if unit.tries < TRIES:
                self.say(f"{unit.name}: {why}; once more (try {unit.tries + 1} of {TRIES})")
            else:
                self._lose(folder, f"{why}, {TRIES} times")
        else:
            self.done.add(folder)
            self.say(f"{unit.name}: done, {len(self.done)} of {len(self.units)}")

    def _lose(self, folder: Path, why: str) -> None:
        self.failed[folder] = why
        self.say(f"{self.units[folder].name}: failed: {why}")


def finish(order: Order) -> None:
    """Finish one job: what a worker does. Raises GreenvisError where it does not see the folder of
    runs."""
    if not order.witness.exists():
        raise GreenvisError(
            f"{os.uname().nodename} does not see {order.runs}: give --runs a folder that every "
            "machine of the cluster shares"
        )
    session = Session(
        order.runs,
        order.trust,
        order.command,
        lambda text: None,
        order.log_with,
        fresh_process=True,
    )
    jobs = session.jobs.of(load_recipe(order.recipe, order.overrides))
    job = next(job for job in jobs if job.folder == order.folder)
    session.run_job(job)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Connect to a cluster, or start one here for as long as the block lasts."""
    # nobody here asked to send anything anywhere
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = importlib.import_module("ray")
    joined = ray.is_initialized()
    if not joined:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if not joined:
            ray.shutdown()
