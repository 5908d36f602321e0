"""`track`: meter anything, on any machine, and lose nothing. No torch is imported here.

with gv.track("pets", live, country="FRA") as run:
    for x, y in run.steps(loader):
        ...
    with run.phase("eval"):
        run.log(epoch=epoch, accuracy=evaluate(model))
gv.report([run.path], out="reports/pets")
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from greenvis.errors import BadInput, GreenvisError
from greenvis.meters import carbon, devices, endings, labels, pricing, steps
from greenvis.meters import header as headers
from greenvis.meters.energy import Meter, Source
from greenvis.meters.ledger import Ledger
from greenvis.meters.phase import DeferSignals, Phase
from greenvis.meters.record import SCHEMA, SUFFIX, Reading, replaced
from greenvis.meters.record_writer import Writer
from greenvis.meters.units import duration

if TYPE_CHECKING:
    from greenvis.meters.crosscheck import CrossCheck
    from greenvis.meters.step_flops import StepFlops

B = TypeVar("B")
P = ParamSpec("P")
R = TypeVar("R")
# how often this process has tracked a name: part of the ranks' common run id
_turns: dict[str, int] = {}


def track(
    name: str,
    live: Any = None,
    *,
    dir: str | os.PathLike[str] = "runs",
    country: str | None = None,
    intensity: float | None = None,
    pue: float = 1.0,
    embodied: Mapping[str, float] | None = None,
    header: Mapping[str, Any] | None = None,
    codecarbon: bool = False,
    interval_s: float = 1.0,
    coefficients: str | os.PathLike[str] | None = None,
    wall_meter: Callable[[], float] | None = None,
    source: Source | None = None,
    quiet: bool = False,
) -> Tracker:
    """Return a tracker of energy, carbon, FLOPs, memory and time: a context manager and a
    decorator.

    Args:
        name: of the run, and of its folder below `dir`.
        live: what `gv.wrap` returned, or a plain model: its parameters become facts, and its
            techniques' phases are cut.
        dir: folder of run records.
        country: a zone of `meters.grid` ("FRA", "USA-CA").
        intensity: of the grid, in g CO2e per kWh, instead of a zone.
        pue: power usage effectiveness of the building, a ratio of 1 or more.
        embodied: {"kg", "lifetime_years", "share"} of making the machine.
        header: further values for the record's header (arm, seed, inputs).
        codecarbon: run codecarbon beside it as a cross-check.
        interval_s: seconds between two samples.
        coefficients: see `meters.energy.Meter`.
        wall_meter: see `meters.energy.Meter`.
        source: replaces the live meter (`meters.energy.Replay`).
        quiet: print no line at its end.

    Returns:
        The tracker; it meters from `start()`, or from entering its `with` block.

    Raises:
        BadInput: for a bad name, zone, PUE or coefficients file, before anything runs.

    Example:
        >>> with gv.track("mine", dir=folder) as tracker:
        ...     with tracker.phase("train"):
        ...         model(x).sum().backward()
        ...     tracker.log(epoch=1, loss=0.5)
        >>> tracker.path.name.endswith(".jsonl")
        True
    """
    _check(name, live, interval_s)
    fields = carbon.header(country=country, intensity=intensity, pue=pue, embodied=embodied) | dict(
        header or {}
    )
    folder = Path(dir) / _slug(name)
    if "arm" in fields and "seed" in fields:
        folder = folder / _slug(str(fields["arm"])) / f"seed{fields['seed']}"

    def open_source() -> Source:
        return source if source is not None else Meter(coefficients, wall_meter)

    return Tracker(
        name, folder, fields, open_source, live,
        codecarbon=codecarbon, interval_s=interval_s, quiet=quiet,
    )  # fmt: skip


def _check(name: str, live: Any, interval_s: float) -> None:
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f'track() takes a name for the run, not {name!r}: track("pets")')
    if not interval_s > 0:
        raise BadInput(f"interval_s is {interval_s}: give seconds between samples, above 0")
    if live is not None and not hasattr(getattr(live, "model", live), "parameters"):
        raise BadInput(
            f"track() takes what gv.wrap returned, or a model, as `live`, not {type(live).__name__}"
        )


class Tracker:
    """One tracked run of this process. Cheap to call into; the disk never makes it raise; its data
    outlive any end.

    id: the run's id; path: its record (None in a forked child, whose run is its parent's); notes:
    warnings so far; on_log: called with what is logged.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        header: dict[str, Any],
        open_source: Callable[[], Source],
        live: Any = None,
        *,
        codecarbon: bool = False,
        interval_s: float = 1.0,
        quiet: bool = False,
    ) -> None:
        self.name, self.live, self.id = name, live, ""
        self.notes: list[str] = []
        self.on_log: Callable[[Mapping[str, Any]], None] | None = None
        self._again = functools.partial(
            Tracker,
            name,
            folder,
            header,
            open_source,
            live,
            codecarbon=codecarbon,
            interval_s=interval_s,
            quiet=quiet,
        )
        self._quiet = quiet
        self._folder, self._header, self._open_source = folder, header, open_source
        self._codecarbon, self._interval_s = codecarbon, interval_s
        self._state = "new"
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._halt = threading.Event()
        self._warned = False
        self._step_flops: StepFlops | None = None
        self._crosscheck: CrossCheck | None = None

    # -- begin and end ----------------------------------------------------------------------------

    def start(self) -> Tracker:
        """Begin metering; `with` does it for you. The record exists when this returns."""
        if self._state != "new":
            raise GreenvisError(
                f"the run '{self.name}' was started already; a new track(…) makes a new run"
            )
        self._identify()
        self._thread_id = threading.get_ident()
        # of another thread's tracker nothing says that it is around
        around = (self._thread_id, threading.main_thread().ident)
        active = [
            t
            for t in reversed(endings.active())
            if isinstance(t, Tracker) and t._thread_id in around
        ]
        outer = next((t.id for t in active), None) or headers.outer_run()
        described = headers.describe()
        source = self._open_source()
        self.header: dict[str, Any] = {
            "run": self.id, "name": self.name, "arm": self.name, "seed": 0, "inputs": self.id,
            "attempt": 1,
            "nested_in": outer, **described, "components": source.components,
            "pricing": pricing.MODEL, **self._header,
        }  # fmt: skip
        if self._codecarbon:
            from greenvis.meters.crosscheck import CrossCheck

            self._crosscheck = CrossCheck(self.header)
        self._ledger = Ledger(source, self._interval_s)
        self._writer = Writer(self.path, self.header)
        self._state = "running"
        self._outer_env = os.environ.get(headers.RUN_ENV)
        os.environ[headers.RUN_ENV] = f"{self.id}:{os.getpid()}"
        endings.enter(self)
        self._describe_live()
        self._correct()
        self._thread = threading.Thread(target=self._sample, name="greenvis-track", daemon=True)
        self._thread.start()
        return self

    def stop(self, status: str = "done", reason: str = "") -> None:
        """End the run ("done", "failed" or "stopped") and close its record. A second call does
        nothing."""
        if self._state != "running":
            return
        with self._defer_signals():
            self._ledger.cut()
            self._flush()
            # a signal leaves no time for another's end
            if self._crosscheck is not None and status != "stopped":
                self._witness(self._crosscheck)
            for name in (
                self.live.unmoved() if status == "done" and hasattr(self.live, "unmoved") else ()
            ):
                self.note(
                    f"{name}: none of the parameters it trains has moved since the first step"
                )
            self._correct()  # while a note can still be written
            self._writer.close(status, reason)
            self._check_disk()
            self._state = "ended"
        self._halt.set()
        if status != "stopped" and not self._quiet and headers.ranks()[0] == 0:
            self._announce()
        endings.leave(self)
        if self._outer_env is None:
            os.environ.pop(headers.RUN_ENV, None)
        else:
            os.environ[headers.RUN_ENV] = self._outer_env

    def __enter__(self) -> Tracker:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.stop()
        elif isinstance(error, KeyboardInterrupt):
            self.stop("stopped", "SIGINT (KeyboardInterrupt)")
        else:
            self.stop("failed", f"{type(error).__name__}: {error}"[:500])

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function: each call is a run of its own."""

        @functools.wraps(function)
        def tracked(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._again():
                return function(*args, **kwargs)

        return tracked

    # -- what the user calls ----------------------------------------------------------------------

    def phase(self, name: str) -> Phase:
        """Return a context whose use is counted as `name`, below the phase it is entered in."""
        if not isinstance(name, str) or not name.strip("/ "):
            raise BadInput(f'a phase needs a name, not {name!r}: run.phase("eval")')
        return Phase(self, name.strip("/"))

    @property
    def current_phase(self) -> str:
        """The path of the innermost open phase; "" outside of any."""
        return self._ledger.phase if self._state == "running" else ""

    def steps(
        self,
        loader: Iterable[B],
        phase: str | None = "train",
        total: int | None = None,
        progress: bool = True,
    ) -> Iterator[B]:
        """Yield the loader's batches in a phase, counting steps, samples and FLOPs.

        FLOPs are counted on the first step of each kind (shapes, mode, what learns) and looked up
        after; the arithmetic of the step is not touched.

        Args:
            loader: any iterable of batches.
            phase: in which they are counted; None for the current one.
            total: batches to come, for the progress bar, where the loader has no length.
            progress: a bar on stderr where that is a terminal.
        """
        return steps.steps(self, loader, phase, total, progress)

    def log(self, **values: Any) -> None:
        """Record values of the training at this moment: epoch, accuracy, loss."""
        with self._defer_signals():
            if self._state == "running":
                self._ledger.cut(full=False)
                self._flush()
                self._writer.line("log", {"phase": self._ledger.phase, **_when(), **values})
        if self.on_log is not None:
            self.on_log(values)

    def fact(self, **values: Any) -> None:
        """Record what holds for the whole run: accuracy, macs, params. A later fact replaces an
        earlier one."""
        self._line("fact", values)

    def labels(self, kind: str, count: int, why: str = "training", name: str = "") -> None:
        """Record labels that the run uses or buys. Said again under the same kind, purpose and
        name, as by a resumed run or another process, they count once; names add up.

        Args:
            kind: One of `meters.labels.KINDS`: "class", "mask", "review", ….
            count: How many.
            why: "training", "threshold", "selection" (early stopping, choosing a model), or
                "bought" in the course of the training.
            name: Of these labels among others, such as "round 2".

        Raises:
            BadInput: For a kind, purpose or count that cannot be.
        """
        line = labels.labels_line(kind, count, why, name)
        self._line("labels", {**line, "phase": self.current_phase, **_when()})

    def images(self, role: str, count: int, name: str = "") -> None:
        """Record images that the run uses, likewise.

        Args:
            role: "labelled", "unlabelled", "target" or "synthetic".
            count: How many different ones.
            name: Of these images among others of that role.

        Raises:
            BadInput: For a role or count that cannot be.
        """
        line = labels.images_line(role, count, name)
        self._line("images", {**line, "phase": self.current_phase, **_when()})

    def note(self, text: str) -> None:
        """Record a warning in words; reports show it."""
        self.notes.append(text)
        self._line("note", {"text": text})

    def uses(
        self,
        role: str,
        name: str,
        runs: Iterable[str],
        energy_j: Reading | Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Record that this run builds on others (a teacher, a base), whose energy is shown beside
        it, never added.

        energy_j: what they cost; or observed: the same as observations (`pricing.observed`), priced
        when it is read.
        """
        if isinstance(energy_j, Reading):
            energy_j = {k: v for k, v in energy_j._asdict().items() if k != "name"}
        cost = {} if energy_j is None else {"energy_j": dict(energy_j)}
        if "observed" in more and self._state == "running":
            more["observed"] = pricing.alike(more["observed"], self.header["components"])
        self._line("uses", {"role": role, "name": name, "runs": list(runs), **cost, **more})

    def add(self, phase: str | None = None, **quantities: float) -> None:
        """Add counts (samples, steps, flops) to a phase by its path; None: the current one."""
        with self._defer_signals():
            if self._state == "running":
                self._ledger.add(phase, **quantities)

    def energy(self) -> Reading:
        """Return the energy of this run so far, in joules, every counter read anew."""
        if self._state == "new":
            return Reading("energy_j", None, reason="the run was not started")
        return pricing.joules(self.observed(), self.header["components"])

    def observed(self) -> dict[str, float]:
        """Return what was observed in this run so far (CPU-seconds, GB-seconds, a counter's joules,
        …), all read anew."""
        with self._defer_signals():
            if self._state == "running":
                self._ledger.cut()
            return {} if self._state == "new" else self._ledger.sums()

    def flops(self, batch: Any) -> AbstractContextManager[Any]:
        """Return a context that adds the FLOPs of the step run in it to the current phase."""
        if self._state != "running" or "torch" not in sys.modules:
            return nullcontext()
        if self._step_flops is None:
            # imports torch, which is there already
            from greenvis.meters.step_flops import StepFlops

            self._step_flops = StepFlops(getattr(self.live, "model", self.live))
        return self._step_flops.step(self, batch)

    @property
    def lost(self) -> str:
        """Why the record on the disk is not whole; "" where it is."""
        return self._writer.problem if self._state != "new" and self._writer.lost else ""

    # -- inside -----------------------------------------------------------------------------------

    def busy_here(self) -> bool:
        """Say whether the calling thread is just changing this tracker's state (a signal handler
        asks)."""
        return self._owner == threading.get_ident()

    def forget(self) -> None:
        """Become inert: a forked child calls it, for the run is its parent's."""
        self._state, self._lock, self._owner = "forked", threading.RLock(), None

    def _defer_signals(self) -> DeferSignals:
        return DeferSignals(self)

    def _line(self, kind: str, values: Mapping[str, Any]) -> None:
        with self._defer_signals():
            if self._state == "running":
                self._writer.line(kind, values)

    def _flush(self) -> None:
        when = _when()
        for phase, totals in self._ledger.changed():
            self._writer.line("sample", {"phase": phase, **totals, **when})

    def _sample(self) -> None:
        copied = False
        while not self._halt.wait(self._interval_s):
            with self._defer_signals():
                if self._state != "running":
                    return
                if not copied:
                    self._writer.line("header", {"schema": SCHEMA, **self.header})
                    copied = True
                self._ledger.cut()
                self._flush()
                self._correct()

    def _correct(self) -> None:
        """Write what the source and the disk say of themselves that was not known before."""
        for component in self._ledger.source.corrections():
            self.header["components"] = replaced(self.header["components"], component)
            self._writer.line("component", component)
        for text in self._ledger.new_notes():
            self.note(text)
        self._check_disk()

    def _check_disk(self) -> None:
        """Warn once, and only in words, of a disk that does not take the record."""
        if self._writer.problem and not self._warned:
            import logging  # never raises, whatever the program does with warnings

            self._warned = True
            text = "greenvis: %s; the run goes on, its record is held in memory meanwhile"
            logging.getLogger("greenvis").warning(text, self._writer.problem)
            self.note(self._writer.problem)

    def _announce(self) -> None:
        """Say in a line what the run took, and where its record is."""
        wall = duration(self.observed().get("wall_s"))
        where = self.lost or os.path.relpath(self.path)
        with contextlib.suppress(OSError, ValueError):  # a closed or broken terminal
            print(f"greenvis: {self.name}: {self.energy()}, {wall}; {where}", file=sys.stderr)

    def _identify(self) -> None:
        rank = headers.ranks()[0]
        # ranks' ids follow from their launcher, which may have launched the same before
        while True:
            turn = _turns[self.name] = _turns.get(self.name, -1) + 1
            self.id = headers.run_id(self.name, turn)
            self.path = headers.here() / self._folder / f"{self.id}.rank{rank}{SUFFIX}"
            if not self.path.exists():
                return

    def _witness(self, crosscheck: CrossCheck) -> None:
        reading = crosscheck.stop()
        if reading is not None:
            self.fact(codecarbon=reading)
        elif crosscheck.problem:
            self.note(crosscheck.problem)

    def _describe_live(self) -> None:
        model = getattr(self.live, "model", self.live)
        if model is None:
            return
        if hasattr(self.live, "meter"):
            self.live.meter(self)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        if isinstance(self._ledger.source, Meter):
            self._ledger.source.model_on = {
                devices.kind_of(p.device.type) for p in model.parameters()
            }
        task = getattr(self.live, "task", None)
        facts: dict[str, Any] = {} if task is None else {"task": task.facts()}
        facts |= {
            "params": sum(n for n, _ in sizes),
            "trainable_params": sum(n for n, grad in sizes if grad),
        }
        if hasattr(self.live, "recipe_form"):
            facts["techniques"] = self.live.recipe_form()
        self.fact(**facts)


def _when() -> dict[str, float]:
    return {"mono_s": time.monotonic(), "clock_s": time.time()}


def _slug(name: str) -> str:
    """Return a folder name: what is safe on every file system; the header keeps the name as
    given."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "run"
