"""`greenvis labels`: which labels to look at again."""

from __future__ import annotations

from typing import Annotated

from greenvis.cli import app
from greenvis.cli.app import argument, option, verb
from greenvis.cli.output import answer, base, teller, write


@verb(app.PLAN, "greenvis labels runs/quickstart/full")
def labels(
    run: Annotated[
        str,
        argument(
            "a run's folder (runs/RECIPE/ARM), run:RECIPE/ARM, its id, or a recipe's file", "RUN"
        ),
    ],
    folds: Annotated[
        int, option("models to train, each without one part of the images: k of k folds")
    ] = 5,
    arm: Annotated[str | None, option("arm of a recipe's file; its first where absent")] = None,
    out: Annotated[str | None, option("folder of suspects.csv and suspects.png", "FOLDER")] = None,
    sheet: Annotated[int, option("images on the contact sheet", "N", min=1, max=1000)] = 48,
    trust: app.Trust = False,
    runs: app.Runs = "runs",
    as_json: app.Json = False,
) -> None:
    """find training labels that are likely wrong, and what looking at them again is worth

    Confident learning on answers of models that have not seen the image; their training is metered.
    """
    from greenvis.planning.label_review import review

    results = review(
        base(run, runs), folds=folds, arm=arm, out=out, sheet=sheet, runs=runs, trust=trust,
        say=teller(as_json),
    )  # fmt: skip

    def show() -> None:
        from greenvis.report.formatting import si

        worth, planted = results["worth"], results["planted"]
        write(
            f"{results['suspects']} of {results['images']} labels are suspects; about "
            f"{results['rate']:.1%} are wrong by estimate"
        )
        if worth["per_look"] is not None:
            write(
                f"looking at them takes {worth['hours']['central']:.2g} h "
                f"({worth['hours']['low']:.2g} – {worth['hours']['high']:.2g}), at all labels "
                f"{worth['hours_all']['central']:.2g} h; that finds about "
                f"{worth['wrong_found']:.0f} of {worth['wrong']:.0f} wrong ones, "
                f"{worth['per_look']:.1f} times as many per look as at random"
            )
        if planted is not None:
            write(
                f"of {planted['wrong']} labels spoiled on purpose {planted['recall']:.1%} are "
                f"among them, and {planted['precision']:.1%} of them are such"
            )
        write(f"the models that answered took {si(results['energy_j']['value'], 'J')}")
        write(f"list: {results['csv']}; sheet: {results['sheet']}")

    answer(as_json, results, show)
