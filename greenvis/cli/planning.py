"""Commands that predict before energy is spent: `plan`, `rank`, `advise`."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated

from greenvis.cli import app
from greenvis.cli.app import argument, option, verb
from greenvis.cli.output import answer, base, model_options, print_rows, teller, write

if TYPE_CHECKING:
    from greenvis.planning.advise import Advice

Data = Annotated[str, option("a data set, or a recipe's file, whose data it is then", "NAME")]
Target = Annotated[
    float | None,
    option(
        "metric to reach, in its unit (a share: 0 to 1): the cheapest plan predicted to reach it "
        "is taken",
        "M",
    ),
]
Budget = Annotated[
    str | None,
    option("the most that training and serving may take together: 5Wh, 0.2kWh, 18kJ", "ENERGY"),
]


@verb(app.PLAN, "greenvis plan recipes/quickstart.yaml --set train.epochs=3")
def plan(
    recipe: Annotated[str, argument("a YAML file; see `greenvis schema`")],
    overrides: app.Overrides = None,
    trust: app.Trust = False,
    runs: app.Runs = "runs",
    as_json: app.Json = False,
) -> None:
    """predict what a recipe will cost from a few steps of each arm, before it is spent"""
    from greenvis.experiment import sweep

    recipes = sweep.load(recipe, overrides or ())  # what is wrong is said before torch is imported
    from greenvis.planning.plan import plan, total

    arms, planning = {}, []
    for one, _ in recipes:
        prediction = plan(one, runs=runs, trust=trust, say=teller(as_json))
        arms |= prediction["arms"]
        planning.append(prediction["planning"])
    prediction = {"arms": arms, "total": total(arms), "planning": planning}

    def show() -> None:
        from greenvis.report.formatting import duration, si

        forms = {
            "energy": ("energy_j", lambda v: si(v, "J")),
            "CO₂e": ("carbon_g", lambda v: si(v, "g")),
            "time": ("wall_s", duration),
            "FLOPs": ("flops", si),
        }
        rows = []
        for name, arm in [*prediction["arms"].items(), ("total", prediction["total"])]:
            figures = {head: form(arm[key]["value"]) for head, (key, form) in forms.items()}
            band = f"{si(arm['energy_j']['low'], 'J')} – {si(arm['energy_j']['high'], 'J')}"
            rows.append(
                {
                    "arm": name,
                    "runs": arm.get("runs", ""),
                    "done": arm.get("done", ""),
                    **figures,
                    "energy between": band,
                }
            )
        print_rows(rows, "predicted for training and evaluation of the runs that are still to do")
        joules = [took["energy_j"]["value"] for took in planning if took["energy_j"]["value"]]
        seconds = duration(math.fsum(took["wall_s"] for took in planning))
        write(f"planning itself took {si(math.fsum(joules), 'J')}, {seconds}")

    answer(as_json, prediction, show)


@verb(app.PLAN, "greenvis tune recipes/quickstart.yaml")
def tune(
    recipe: Annotated[str, argument("a YAML file; see `greenvis schema`")],
    rounds: Annotated[int, option("in which the settings take turns")] = 3,
    overrides: app.Overrides = None,
    trust: app.Trust = False,
    runs: app.Runs = "runs",
    as_json: app.Json = False,
) -> None:
    """measure which settings of the machine train a recipe's baseline for less"""
    from greenvis.experiment.recipe import load_recipe

    load_recipe(recipe, overrides or ())  # what is wrong is said before torch is imported
    from greenvis.planning.tune import tune

    tuned = tune(
        recipe, overrides=overrides or (), rounds=rounds, runs=runs, trust=trust,
        say=teller(as_json),
    )  # fmt: skip

    def show() -> None:
        from greenvis.report.formatting import si

        rows = [
            {
                "setting": row["setting"],
                "energy": si(row["energy_j"], "J"),
                "ratio": f"×{row['ratio']:.2f}",
                "between": f"{row['low']:.2f} – {row['high']:.2f}",
                "set": " ".join(f"--set {text}" for text in row["set"]),
            }
            for row in tuned["rows"]
        ]
        print_rows(rows, f"energy of {tuned['arm']}, {tuned['rounds']} rounds in turns")
        for name, reason in tuned["refused"].items():
            write(f"{name}: left out: {reason}")
        picked = next((row for row in tuned["rows"] if row["setting"] == tuned["pick"]), None)
        if picked is None:
            write(
                f"no setting takes less in every round, and by more than ×{tuned['floor']:.2f}, by "
                "which the same training reads apart: train it as it is"
            )
        else:
            words = " ".join(f"--set {text}" for text in picked["set"])
            write(f"greenvis run {shlex.quote(recipe)} {words}")
        write(f"tuning itself took {si(tuned['tuning_j'], 'J')}")

    answer(as_json, tuned, show)


@verb(app.PLAN, "greenvis rank run:quickstart/full run:quickstart/lora --data digits")
def rank(
    bases: Annotated[
        list[str],
        argument(
            "a model reference; or of a finished run: run:RECIPE/ARM, its folder or its id",
            "BASE...",
        ),
    ],
    data: Data,
    images: Annotated[int, option("training images shown to each base")] = 1000,
    by: Annotated[str, option("score to sort by: logme, h_score, sfda or ped", "SCORE")] = "logme",
    options: app.ModelOptions = None,
    trust: app.Trust = False,
    runs: app.Runs = "runs",
    as_json: app.Json = False,
) -> None:
    """rank pretrained bases for new data without training (LogME, H-score, SFDA, PED)"""
    from greenvis.planning.rank import METHODS, rank
    from greenvis.report.formatting import si

    ranking = rank(
        [base(name, runs) for name in bases],
        data,
        images=images,
        by=by,
        runs=runs,
        trust=trust,
        say=teller(as_json),
        **model_options(options),
    )

    def show() -> None:
        rows = [
            {
                "": row["rank"],
                "base": row["base"],
                **{method: f"{row[method]:.3f}" for method in METHODS},
                "energy": si(row["energy_j"], "J"),
                "fine-tuned": "" if "tuned_accuracy" not in row else f"{row['tuned_accuracy']:.4f}",
            }
            for row in ranking["rows"]
        ]
        print_rows(
            rows,
            f"bases for {ranking['data']}, by {ranking['by']} of {ranking['images']} training "
            "images",
        )
        spent = ranking["energy_j"]
        text = (
            f"the ranking took {si(spent['value'], 'J')} ({si(spent['low'], 'J')} – "
            f"{si(spent['high'], 'J')})"
        )
        if ranking["tuning_energy_j"]:
            text += f"; fine-tuning each of them once took {si(ranking['tuning_energy_j'], 'J')}"
        write(text)
        for method, agreement in (ranking["correlation"] or {}).items():
            taus = f"weighted tau {agreement['weighted_tau']:+.2f}, tau {agreement['tau']:+.2f}"
            write(f"{method} against real fine-tuning of {agreement['bases']} bases: {taus}")
        if ranking["correlation"] is None:
            write(
                "fewer than three of these bases were fine-tuned on this data on record, so "
                "nothing says how right this is"
            )

    answer(as_json, ranking, show)


@verb(app.PLAN, "greenvis advise run:quickstart/full --data digits --target 0.9 --budget 5Wh")
def advise(
    model: app.Model,
    data: Data,
    target: Target = None,
    budget: Budget = None,
    serve: Annotated[float, option("images the model will answer", "N")] = 1_000_000,
    teacher: Annotated[
        str | None, option("a trained model to learn from: as MODEL", "MODEL")
    ] = None,
    labels: Annotated[
        int | None, option("how many of the images have a label: plans for so few are weighed", "N")
    ] = None,
    unlabeled: Annotated[
        str | None,
        option(
            "with --labels: a folder of images without a label, or rest (the data's own); adds "
            "plans that learn from them",
            "FOLDER",
        ),
    ] = None,
    plans: Annotated[
        str | None, option("plans to weigh, in a file like greenvis/planning/advise.yaml", "FILE")
    ] = None,
    share: Annotated[
        float | None,
        option("share of the training images in the longest trial (0.25; with --labels 0.5)"),
    ] = None,
    img_size: app.ImgSize = None,
    in_chans: app.InChans = None,
    num_classes: app.NumClasses = None,
    options: app.ModelOptions = None,
    trust: app.Trust = False,
    overrides: app.Overrides = None,
    fresh: Annotated[bool, option("try again what was tried before", name="--fresh")] = False,
    runs: app.Runs = "runs",
    out: Annotated[
        str | None, option("recipe to write (default: RUNS/advise-DATA-MODEL/recipe.yaml)")
    ] = None,
    as_json: app.Json = False,
) -> None:
    """advise which way to train a model for new data: short trials, energy, a recipe

    MODEL may also be a finished run: run:RECIPE/ARM, its folder or its id.
    """
    from greenvis.planning.advise import advise

    advice = advise(
        base(model, runs),
        data,
        target=target,
        budget=budget,
        serve=serve,
        teacher=teacher and base(teacher, runs),
        labels=labels,
        unlabeled=unlabeled,
        plans=plans,
        share=share,
        out=out,
        overrides=overrides or (),
        runs=runs,
        fresh=fresh,
        trust=trust,
        say=teller(as_json),
        **model_options(options, img_size=img_size, in_chans=in_chans, num_classes=num_classes),
    )
    answer(as_json, advice, lambda: _show_advice(advice))


def _show_advice(advice: Advice) -> None:
    from greenvis.planning.plan import BUSY_BAND
    from greenvis.report.formatting import count, gain, plural, si
    from greenvis.report.measures import best_is, is_share, written
    from greenvis.tasks.base import Measure

    measure, units = Measure(**advice["measure"]), plural(advice["unit"])
    name, share = written(measure), is_share(measure)
    served, images = count(advice["serve"]), count(advice["images"])
    rows = []
    for row in advice["rows"]:
        value, low, high = (row["metric"][bound] for bound in ("value", "low", "high"))
        ends = f"{low * 100:.0f} – {high * 100:.0f}" if share else f"{low:.3g} – {high:.3g}"
        rows.append(
            {
                "plan": row["plan"],
                name: f"{gain(measure, value)} ({ends})",
                "training": si(row["train_energy_j"]["value"], "J"),
                f"1,000 {units}": si(row["serve_energy_j"]["value"], "J"),
                f"with {served}": si(row["total_energy_j"]["value"], "J"),
                "front": ", ".join(
                    ["yes"] * row["front"] + ["taken"] * (row["plan"] == advice["pick"])
                ),
            }
        )
    kind = "training" if advice["labels"] is None else "labelled"
    beside = f" and {count(advice['unlabeled'])} without a label" if advice["unlabeled"] else ""
    title = f"{advice['model']} for {advice['data']}, {images} {kind} {units}{beside}: predicted"
    print_rows(rows, title)
    for plan, why in advice["refused"].items():
        write(f"left out: {plan}: {why}")
    sizes = ", ".join(
        str(n) for n in sorted({t["images"] for row in advice["rows"] for t in row["trials"]})
    )
    spent = si(advice["trials_energy_j"], "J")
    write(
        f"from trials on {sizes} {units}, tested on {advice['held']} others of the training "
        f"{units}, which took {spent}"
    )
    error = f"what {name} lacks to 1" if share and measure.higher_is_better else name
    write(
        f"{name} ({best_is(measure)}) on as many: {error} falls on as a power of the {units} "
        "trained on; in brackets with half and one and a half times that slope"
    )
    write(
        f"and the sampling error. Energy: ±{BUSY_BAND:.0%}. Front: no other plan is both cheaper "
        "and better"
    )
    write(f"{advice['pick'] or 'none'}: {advice['why']}")
    if advice["recipe"]:
        write(f"greenvis run {shlex.quote(str(advice['recipe']))}")
