"""Which images a person should label next, as a finished run's model sees it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from greenvis.core import files
from greenvis.data.queries import QUERIES, Candidates, select
from greenvis.data.sheets import sheet
from greenvis.errors import BadInput, GreenvisError, nearest
from greenvis.planning.saved import Saved

CSV_FILE, SHEET_FILE = "label-next.csv", "label-next.png"
MOST_SHOWN = 400  # images of a contact sheet
COLUMNS: Sequence[str] = ("rank", "image", "guess", "confidence", "label")


@dataclass(frozen=True)
class LabelNext:
    """What to label next.

    Attributes:
        rows: `COLUMNS` of each, in order of choice; "label" is empty, for a person to fill in.
        sheet: The same images side by side, with rank and guess.
        candidates: How many were looked at.
        skipped: What could not be read, a line each.
    """

    rows: list[dict[str, Any]]
    sheet: Image.Image
    candidates: int
    skipped: list[str]


def label_next(
    run: str | Path,
    budget: int,
    *,
    images: str | Path | None = None,
    query: str = "badge",
    seed: int = 0,
    trust: bool = False,
) -> LabelNext:
    """Choose the images that a person should label next.

    Args:
        run: A finished run's folder, whose model is asked.
        budget: How many.
        images: A folder of images without labels; None: those of the run's own training images that
            have none.
        query: Of `data.queries.QUERIES`. "kcenter" and "typiclust" also look at the images the run
            learned from, which are read anew.
        seed: Of draws.
        trust: Whether references may import code.

    Raises:
        BadInput: For a run that left no classifier, a folder without images, or a budget beyond
            them.
    """
    if query not in QUERIES:
        raise BadInput(f"no query '{query}'{nearest(query, QUERIES)}")
    saved = Saved(run, trust)
    own = None if images is None else saved.own_images(images)
    shown = saved.unlabelled() if own is None else own.images
    if budget > len(shown):
        raise BadInput(f"{budget} images to label, but there are {len(shown)} without a label")
    needs = QUERIES[query]
    answers = saved.answers(shown.unlabeled(), needs.features)
    labelled = torch.zeros(len(shown), dtype=torch.bool)
    probabilities, features = answers.probabilities, answers.features
    if needs.features and not needs.answers:  # it covers what is labelled
        before = saved.answers(saved.labelled(), features=True)
        assert features is not None
        assert before.features is not None
        labelled = torch.cat([labelled, torch.ones(len(before.features), dtype=torch.bool)])
        features = torch.cat([features, before.features])
    chosen = select(query, Candidates(labelled, probabilities, features), budget, seed)
    confidence, guess = probabilities[chosen].max(1)
    rows = [
        {
            "rank": rank,
            "image": str(own.paths[at]) if own else int(shown.ids[at]),
            "guess": saved.classes[number],
            "confidence": round(sure, 4),
            "label": "",
        }
        for rank, (at, number, sure) in enumerate(
            zip(chosen.tolist(), guess.tolist(), confidence.tolist(), strict=True), 1
        )
    ]
    first = chosen[:MOST_SHOWN]
    names = tuple(str(rank) for rank in range(1, len(first) + 1))
    split = replace(shown.split.take(first), labels=guess[:MOST_SHOWN], names=names)
    page = sheet(split, saved.classes, len(first))
    return LabelNext(rows, page, len(shown), own.skipped if own else [])


def write(chosen: LabelNext, out: str | Path) -> tuple[Path, Path]:
    """Write a list and a contact sheet into a folder, and return their paths.

    Raises:
        GreenvisError: Where the folder cannot be written to.
    """
    folder = Path(out)
    table, picture = io.StringIO(newline=""), io.BytesIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(chosen.rows)
    chosen.sheet.save(picture, "PNG")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / CSV_FILE, table.getvalue())
        files.write(folder / SHEET_FILE, picture.getvalue())
    except OSError as error:
        raise GreenvisError(
            f"cannot write to {folder}: {error.strerror or error}; choose another with --out"
        ) from error
    return folder / CSV_FILE, folder / SHEET_FILE
