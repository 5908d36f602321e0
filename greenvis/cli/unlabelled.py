"""Commands on images without labels: `label-next`, `estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from greenvis.cli import app
from greenvis.cli.app import argument, option, verb
from greenvis.cli.output import answer, left_by, print_rows, write

Run = Annotated[
    str, argument("the folder of a finished run, runs/RECIPE/ARM/seed0, its file, or its id")
]
MOST_SAID = 10  # images that could not be read


@verb(app.PLAN, "greenvis label-next runs/quickstart/full/seed0 --images my-folder --budget 4")
def label_next(
    run: Run,
    budget: Annotated[int, option("how many images", "N", min=1)] = 50,
    images: Annotated[
        str | None,
        option("folder of images without labels; else the run's own that have none", "FOLDER"),
    ] = None,
    query: Annotated[
        str, option("badge, typiclust, kcenter, margin, entropy or random", "NAME")
    ] = "badge",
    seed: Annotated[int, option("seed of random draws", "N", min=0)] = 0,
    out: Annotated[str, option("folder of the list (CSV) and the contact sheet", "FOLDER")] = (
        "label-next"
    ),
    runs: app.Runs = "runs",
    trust: app.Trust = False,
    as_json: app.Json = False,
) -> None:
    """list the images that a person should label next, as a CSV and a contact sheet"""
    from greenvis.planning.label_next import label_next, write

    chosen = label_next(
        left_by(run, runs), budget, images=images, query=query, seed=seed, trust=trust
    )
    table, picture = write(chosen, out)
    content = {"rows": chosen.rows, "csv": str(table), "sheet": str(picture)}
    content |= {"candidates": chosen.candidates, "skipped": chosen.skipped}
    answer(as_json, content, lambda: _show_next(chosen.rows, content))


def _show_next(rows: list[dict[str, object]], content: dict[str, object]) -> None:
    columns = ("rank", "image", "guess", "confidence")
    print_rows([{c: row[c] for c in columns} for row in rows[:MOST_SAID]], "label next")
    write(
        f"{len(rows)} of {content['candidates']} images: {content['csv']} (fill in its last "
        f"column), {content['sheet']}"
    )
    _show_skipped(content["skipped"])


def _show_skipped(skipped: object) -> None:
    lines = skipped if isinstance(skipped, list) else []
    for line in lines[:MOST_SAID]:
        write(f"left out: {line}")
    if len(lines) > MOST_SAID:
        write(f"left out: {len(lines) - MOST_SAID} more")


@verb(app.PLAN, "greenvis estimate runs/quickstart/full/seed0 --on noise:0.1")
def estimate(
    run: Run,
    on: Annotated[
        str,
        typer.Option(
            help="folder of images without labels; or a change of the run's test, as noise:0.1",
            metavar="FOLDER",
        ),
    ],
    runs: app.Runs = "runs",
    trust: app.Trust = False,
    as_json: app.Json = False,
) -> None:
    """estimate a model's accuracy on images whose labels nobody knows"""
    from greenvis.planning.estimate import estimate

    content = estimate(left_by(run, runs), on, trust=trust)
    measured, source = content["measured"], content["source"]

    def show() -> None:
        errors = (measured or {}).get("errors") or {}
        rows = [
            {
                "method": method.replace("_", " "),
                "accuracy": f"{100 * value:.1f} %",
                **({"error in points": f"{100 * errors[method]:+.1f}"} if errors else {}),
            }
            for method, value in content["estimates"].items()
        ]
        print_rows(rows, f"estimated on {content['images']} images of {on}")
        write(
            f"they rest on {source['images']} labelled images ({source['set']}), of which "
            f"{100 * source['accuracy']:.1f} % are answered right"
        )
        write("cot and cott hold where classes are about as frequent as there")
        if measured:
            write(
                f"measured: {100 * measured['accuracy']:.1f} % of the {measured['images']} images "
                "whose label is known"
            )
        else:
            write("no label is known there: how far an estimate is off, nothing here says")
        _show_skipped(content["skipped"])

    answer(as_json, content, show)
