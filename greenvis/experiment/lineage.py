"""What a model was made from: the `uses` lines of its run's record, and the card that its weight
file carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from greenvis import models
from greenvis.core import weights
from greenvis.errors import BadInput
from greenvis.experiment._card import MOST_ROWS, checked, cost, is_card
from greenvis.experiment.jobs import Job, model_files
from greenvis.experiment.run_folder import WEIGHTS_FILE
from greenvis.meters import pricing, record
from greenvis.meters.record import Reading
from greenvis.tasks.base import Measure

NOT_KNOWN = {"value": None, "low": None, "high": None}  # joules of what others made


def ancestors(job: Job) -> list[dict[str, Any]]:
    """Return what a job builds on, and what that builds on in its turn: {"role", "name", "seed",
    "runs", "observed", "of"}.

    role: "base" or "teacher". runs: ids of its records; observed: what they took together
    (`pricing.spent` prices it). of: the names of those of its children that are in this family, so
    that a family tree can be drawn. Each stands there once, however many build on it.
    Weights that others made are among them, by name, with no runs, and an energy nobody knows.
    """
    lines: dict[str, dict[str, Any]] = {}
    _collect(job, lines)
    return list(lines.values())


def card(job: Job, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return what a finished job's weight file says of itself: data, recipe, cost, and all that it
    was made from.

    Args:
        job: The job.
        metrics: What it reached, by the names of its task's metrics.
    """
    attempts = _attempts(job)
    last = attempts[-1][0] if attempts else None
    facts = last.facts if last else {}
    measure = job.arm.task.primary
    return {
        "run": last.id if last else "",
        "arm": job.name,
        "seed": job.seed,
        "metric": {**measure._asdict(), "value": metrics.get(measure.name)},
        "observed": pricing.observed(attempts),
        "data": facts.get("data"),
        "techniques": facts.get("techniques"),
        "uses": ancestors(job),
        "recipe": job.recipe.text(),
    }


def read_card(location: str | Path) -> dict[str, Any]:
    """Return the card of a weight file, or of a finished run's folder, with "file", "ref",
    "energy_j" and "total_j". Under "metric", what it reached: name, unit, higher_is_better, value.

    total_j: its own energy and that of all it was made from, each counted once; its value is None
    where one is not known. Raises BadInput where there is no card.
    """
    path = Path(location)
    if (
        path.is_dir()
        and not (path / WEIGHTS_FILE).is_file()
        and (seeds := sorted(path.glob(f"*/{WEIGHTS_FILE}")))
    ):
        raise BadInput(
            f"{path} holds several models, one a seed: give one of them, as {seeds[0].parent}"
        )
    path = path / WEIGHTS_FILE if path.is_dir() else path
    stored = weights.metadata(path)
    stored_card = stored.get("card") or {}
    if not is_card(stored_card):
        raise BadInput(
            f"{path} holds a model, but no card of how it was made: no run of greenvis wrote it"
        )
    stored_card = _priced(checked(path, stored_card))
    if "metric" not in stored_card:  # as cards of classification were first
        value = stored_card.pop("accuracy", None)
        stored_card["metric"] = {**Measure("accuracy")._asdict(), "value": value}
    stored_card["uses"] = [_priced(use) for use in stored_card.get("uses", ())]
    parts = [_reading(entry["energy_j"]) for entry in (stored_card, *stored_card["uses"])]
    known = all(part.value is not None for part in parts)
    total = (
        pricing.add(parts)
        if known
        else Reading("energy_j", None, reason="the cost of a part is not known")
    )
    more = {"ref": stored.get("ref"), "options": stored.get("options")}
    return {"file": str(path), **more, **stored_card, "total_j": pricing.reading(total)}


def tree(card: Mapping[str, Any]) -> list[tuple[int, str, dict[str, Any]]]:
    """Return a card's family as (depth, role, entry), the model itself first.

    One that two build on stands below both, what it builds on in its turn below the first.
    """
    rows: list[tuple[int, str, dict[str, Any]]] = []
    shown: set[str] = set()

    def below(entry: Mapping[str, Any], role: str, above: tuple[str, ...]) -> None:
        rows.append((len(above), role, dict(entry)))
        name = _key(entry)
        if name in shown or len(rows) >= MOST_ROWS:
            return
        shown.add(name)
        for use in card.get("uses", ()):
            if name in use["of"] and _key(use) not in above:
                below(use, use["role"], (*above, name))

    below({"name": card["arm"], **card}, "", ())
    return rows


def check_range(job: Job, own: Mapping[str, Any]) -> None:
    """Raise BadInput where a base knows pixels of another range than this job's images have (0 to
    1, or normalised).

    own: the facts of the job's data. Another mean and deviation are another data set's, and no
    error.
    """
    for name, earlier in _bases_data(job):
        plain, own_plain = (_plain(facts) for facts in (earlier, own))
        if plain is not None and own_plain is not None and plain != own_plain:
            ranges = {True: "from 0 to 1", False: "normalised"}
            raise BadInput(
                f"{job.recipe.where('arms', job.arm.name)}: {name}, which it builds on, learned "
                f"from pixels {ranges[plain]}, but "
                f"here they are {ranges[own_plain]}: it would see another picture; set "
                f"data.normalise: {str(not plain).lower()}"
            )


def _collect(job: Job, lines: dict[str, dict[str, Any]]) -> None:
    child = f"{job.name} seed {job.seed}"
    named = {ref: t.role for t in _techniques(job) for ref in t.runs().values()}
    for ref, used in job.uses.items():
        attempts = _attempts(used)
        line = {
            "role": "base" if ref in job.arm.model.starts else named.get(ref, "features"),
            "name": used.name,
            "seed": used.seed,
            "runs": [processes[0].id for processes in attempts],
            "observed": pricing.observed(attempts),
        }
        _add(lines, line, [child])
        _collect(used, lines)
    for role, name in _by_others(job):
        _add(
            lines,
            {"role": role, "name": name, "seed": None, "runs": [], "energy_j": NOT_KNOWN},
            [child],
        )
    for role, _, card in _cards(job):
        line = {
            "role": role,
            "name": card["arm"],
            "seed": card["seed"],
            "runs": [card["run"]],
            **cost(card),
        }
        _add(lines, line, [child])
        for use in card.get("uses", ()):
            _add(lines, use, use["of"])


def _add(lines: dict[str, dict[str, Any]], line: Mapping[str, Any], of: Sequence[str]) -> None:
    entry = lines.setdefault(_key(line), {**line, "of": []})
    entry["of"] = list(dict.fromkeys([*entry["of"], *of]))


def _key(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} seed {entry['seed']}"


def _cards(job: Job) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yield the weight files of greenvis that a job begins with, as (role, path, card)."""
    for role, path in model_files(job.arm, job.recipe.folder):
        try:
            card = weights.metadata(path).get("card") or {}
        except BadInput:  # of another kind: whether it can be used is for others to say
            continue
        if is_card(card):
            yield role, path, checked(path, card)


def _by_others(job: Job) -> Iterator[tuple[str, str]]:
    """Yield (role, name) of the weights a job begins with that no run of greenvis made: nobody here
    knows what they cost."""
    spec, ours = job.arm.model, {path for _, path, _ in _cards(job)}
    published = models.published(spec.ref, folder=job.recipe.folder, **spec.options)
    if published and not spec.starts:  # what `init` names takes the place of published weights
        yield "base", published
    for role, path in model_files(job.arm, job.recipe.folder):
        if path not in ours:
            yield role, f"{path.name}, a file that says nothing of its making"
    for technique in _techniques(job):
        for ref in technique.recipe_form().values():
            if isinstance(ref, str) and ref.startswith("hf/") and (name := models.published(ref)):
                yield technique.role, name


def _techniques(job: Job) -> Iterable[Any]:
    return [t for arm in (job.arm, *job.arm.stages) for t in arm.techniques]


def _attempts(job: Job) -> list[list[record.Run]]:
    """Return the records of all attempts at a job, in order: of each attempt its processes', the
    first process's first."""
    by_run: dict[str, list[record.Run]] = {}
    for run in record.readable([job.folder] if job.folder.is_dir() else []):
        if run.header.get("inputs") == job.inputs:
            by_run.setdefault(run.id, []).append(run)
    attempts = [sorted(runs, key=lambda r: r.header.get("rank", 0)) for runs in by_run.values()]
    return sorted(attempts, key=lambda runs: runs[0].header.get("clock_s", 0.0))


def _priced(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of a card with its joules."""
    if card.get("observed") is not None:
        return {**card, "energy_j": pricing.reading(pricing.spent(card["observed"]))}
    return {**card, "energy_j": card.get("energy_j") or pricing.reading(Reading("energy_j", None))}


def _reading(energy: Mapping[str, Any]) -> Reading:
    low, high = energy.get("low"), energy.get("high")
    provenance = energy.get("provenance") or "estimated"
    return Reading("energy_j", energy["value"], low, high, "reused", provenance, "not known")


def _bases_data(job: Job) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for used in job.uses.values():
        yield used.name, {"normalise": used.recipe.data.normalise}
    for _, path, card in _cards(job):
        yield str(path), card.get("data") or {}


def _plain(facts: Mapping[str, Any]) -> bool | None:
    """Whether pixels are left as they are, 0 to 1; None where nothing says so."""
    if "normalise" in facts:
        return not facts["normalise"]
    return all(s == 1 for s in facts["std"]) if facts.get("std") else None
