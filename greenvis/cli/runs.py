"""Commands that make records, and reports of them: `run`, `report`, `overview`, `track`,
`doctor`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from greenvis.cli import app
from greenvis.cli.app import argument, option, verb
from greenvis.cli.output import answer, console, json_text, message, reported, teller, write_block
from greenvis.errors import BadInput, GreenvisError, nearest, one_line

ReportFolder = Annotated[
    str | None, option("folder of the report (default: reports/NAME)", name="--out")
]
LogWith = Annotated[
    list[str] | None,
    option(
        "log metrics, loss and joules to a tracker, too: tensorboard, wandb or mlflow", "TRACKER"
    ),
]
LabelSeconds = Annotated[
    list[str] | None,
    option(
        "seconds a label takes a person, as class=5, or low, central, high: class=1,5,60",
        "KIND=SECONDS",
    ),
]


@verb(app.TRAIN, "greenvis run recipes/quickstart.yaml")
def run(
    recipe: Annotated[str, argument("a YAML file; see `greenvis schema`")],
    overrides: app.Overrides = None,
    engine: Annotated[
        str, option("one-by-one, or ray: on a Ray cluster", "ENGINE", name="--on")
    ] = "one-by-one",
    fresh: Annotated[
        bool, option("train finished arms again (their energy stays in the totals)", name="--fresh")
    ] = False,
    trust: app.Trust = False,
    runs: app.Runs = "runs",
    log_with: LogWith = None,
    out: ReportFolder = None,
    as_json: app.Json = False,
) -> None:
    """train every arm of a recipe, metered, and write its report

    `--set train.epochs=3,6` trains with each of the values in turn.
    """
    from greenvis.experiment import sweep
    from greenvis.meters import header
    from greenvis.report.folder import refuse_foreign

    overrides = overrides or []
    if out:
        refuse_foreign(Path(out))
    alone = header.ranks()[1] == 1
    # what is wrong is said before torch is imported
    recipes = sweep.load(recipe, overrides) if alone else []
    if recipes and not out:
        refuse_foreign(_page_folder(recipe, overrides, recipes))
    say = teller(as_json)
    for one, _ in recipes:
        say(_overview(one, runs))  # before the seconds that torch takes to import
    from greenvis.core import distributed
    from greenvis.report import report

    engines = ("one-by-one", "ray")
    if engine not in engines:
        raise BadInput(f"cannot run on '{engine}'{nearest(engine, engines)}")
    distributed.init_process_group()
    recipes = recipes or distributed.main_first(lambda: sweep.load(recipe, overrides))
    first, several = recipes[0][0], len(recipes) > 1
    options: dict[str, Any] = {
        "runs": runs, "fresh": fresh, "trust": trust, "log_with": log_with or [],
        "command": ["greenvis", "run", recipe, *(w for s in overrides for w in ("--set", s))],
        "say": say,
    }  # fmt: skip
    folders, failed = _train(engine, recipes, options, as_json)
    first_process = not distributed.rank()
    distributed.destroy_process_group()
    if not first_process:
        return  # the first of several processes reports
    page = report(
        folders,
        out=out or _page_folder(recipe, overrides, recipes),
        baseline=f"{first.name}/{first.baseline}" if several else first.baseline,
        metric=first.report.metric,
        margin=first.report.margin,
        title=first.report.title,
        note=first.report.note,
        arm=None if several else first.report.arm,
    )
    if failed:
        raise _failure(failed, page)
    reported(as_json, page)


def _train(
    engine: str, recipes: Sequence[tuple[Any, Any]], options: dict[str, Any], as_json: bool
) -> tuple[list[Path], dict[str, str]]:
    """Return the folders of the recipes' records, and why runs failed, by name."""
    from greenvis.cli.live import watch
    from greenvis.core import distributed
    from greenvis.experiment import on_ray, session

    if engine == "ray":
        distributed.require_single_process("greenvis run --on ray")
        return on_ray.run(recipes, **options)
    with watch(as_json or distributed.rank() > 0, options["say"]) as seen:
        folders = [
            session.run(one, **options, fresh_process=not i, watch=seen)
            for i, (one, _) in enumerate(recipes)
        ]
    return folders, {}


def _overview(recipe: Any, runs: str) -> str:
    """Return what a recipe will train, in a line."""
    arms, seeds = list(recipe.arms), recipe.train.seeds
    names = ", ".join(arms[:6]) + (", …" if len(arms) > 6 else "")
    return one_line(
        f"{recipe.name}: {len(arms)} arm{'s'[: len(arms) > 1]} ({names}) × {len(seeds)} "
        f"seed{'s'[: len(seeds) > 1]} on {recipe.data.name}; records in {Path(runs) / recipe.name}"
    )


def _failure(failed: Mapping[str, str], page: Path) -> GreenvisError:
    reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
    return GreenvisError(
        f"{len(failed)} runs failed ({reasons}); {page} has the others, and the same command "
        "goes on from here"
    )


@verb(app.REPORT, "greenvis report runs/quickstart --grid SWE --served 1e5 --out runs/swedish")
def report(
    paths: Annotated[
        list[str],
        argument(
            "records, their folders, ids or RECIPE/ARM as `greenvis ls` has them; one "
            "results.json; or exports: codecarbon's emissions.csv, CSV or JSON of MLflow or W&B",
            "RUN...",
        ),
    ],
    runs: app.Runs = "runs",
    out: ReportFolder = None,
    baseline: Annotated[str | None, option("what the others are measured against", "ARM")] = None,
    grid: Annotated[
        str | None,
        option(
            "price the carbon with another grid: a zone as SWE, or g CO2e per kWh; changes "
            "grams only"
        ),
    ] = None,
    served: Annotated[
        float | None, option("images a model will answer (default: 1,000,000)", "N")
    ] = None,
    metric: Annotated[
        str | None,
        option("metric to judge the arms by (default: their task's primary one)", "NAME"),
    ] = None,
    margin: Annotated[
        float | None,
        option(
            "points of the metric that an arm may lose and still keep it (default: 0.5 of a share; "
            "else 0, in its unit)",
            "POINTS",
        ),
    ] = None,
    coefficients: Annotated[
        str | None,
        option(
            "JSON file of coefficients that price what was observed, instead of the recorded ones",
            "FILE",
        ),
    ] = None,
    label_seconds: LabelSeconds = None,
    title: Annotated[str | None, option("headline of the report")] = None,
    arm: Annotated[str | None, option("the arm that the verdict is to speak of", "NAME")] = None,
    pdf: Annotated[bool, option("write the figures as PDF as well")] = False,
    as_json: app.Json = False,
) -> None:
    """write a report from run records made anywhere, or from exports of other tools"""
    from greenvis.meters import run_names
    from greenvis.report import report

    page = report(
        [run_names.named(path, runs) for path in paths],
        out=out,
        baseline=baseline,
        metric=metric,
        grid=grid,
        title=title,
        served=served,
        margin=margin,
        label_seconds=label_seconds or (),
        coefficients=coefficients,
        pdf=pdf,
        arm=arm,
    )
    reported(as_json, page)


@verb(app.REPORT, "greenvis overview")
def overview(
    folder: Annotated[str, argument("folder in which each report has a folder")] = "reports",
    as_json: app.Json = False,
) -> None:
    """many reports at a glance: what each technique saved and cost, as Markdown"""
    from greenvis.report.overview import markdown, overview

    summary = overview(folder)
    answer(as_json, summary, lambda: write_block(markdown(summary)))


@verb(app.MEASURE, "greenvis doctor")
def doctor(
    again: Annotated[
        bool,
        option(
            "do the same work for a minute: how far it reads apart, for the bands", name="--repeat"
        ),
    ] = False,
    as_json: app.Json = False,
) -> None:
    """say where each energy figure comes from on this machine, and why"""
    from greenvis.meters import header, repeat
    from greenvis.meters.doctor import doctor

    if again:
        repeat.measure(header.cpu()["name"], say=teller(as_json))
    rows = doctor()

    def show() -> None:
        from rich.padding import Padding
        from rich.text import Text

        for row in rows:
            text = ", ".join(str(row[k]) for k in ("source", "provenance", "band") if row.get(k))
            console().print(Text(one_line(f"{row['what']}: {text}")))
            for key in ("why", "better"):
                if row.get(key):
                    console().print(
                        Padding(Text(one_line(f"{key}: {row[key]}"), style="dim"), (0, 0, 0, 4))
                    )

    answer(as_json, rows, show)


@verb(
    app.MEASURE,
    "greenvis track --name loop -- python examples/plain_loop.py",
    context_settings={"allow_interspersed_args": False},
)
def track(
    command: Annotated[
        list[str] | None, argument("what to meter", "-- COMMAND...", show_default=False)
    ] = None,
    name: Annotated[str, option("name of the run")] = "command",
    country: Annotated[str | None, option("ISO-3 code of the grid, as FRA", "ZONE")] = None,
    folder: Annotated[str, option("folder of run records", name="--dir")] = "runs",
    as_json: app.Json = False,
) -> int:
    """meter any command and its children: greenvis track -- python train.py

    The exit code is that of the command.
    """
    from greenvis.meters.command import track_command

    if not command:
        raise BadInput("greenvis track takes a command after --: greenvis track -- python train.py")
    code, run = track_command(command, name=name, country=country, dir=folder)
    energy = run.energy()
    metered = {
        "record": None if run.lost else str(run.path),
        "exit": code,
        "energy_j": energy.value,
        "low": energy.low,
        "high": energy.high,
    }
    text = (
        "unknown"
        if energy.value is None
        else f"{energy.value:.1f} J ({energy.low:.1f}–{energy.high:.1f}, {energy.provenance})"
    )
    where = f"the record is lost: {run.lost}" if run.lost else f"record: {run.path}"
    print(
        json_text(metered) if as_json else message(f"{text}; {where}"),
        file=sys.stdout if as_json else sys.stderr,
    )
    return code


def _page_folder(path: str, overrides: Sequence[str], recipes: Sequence[tuple[Any, Any]]) -> Path:
    """Return where the report of a run goes by default."""
    from greenvis.experiment import sweep

    several = len(recipes) > 1
    return Path("reports") / (sweep.title(path, overrides) if several else recipes[0][0].name)
