"""Commands that predict before energy is spent: `plan`, `rank`, `advise`.

Each returns what `--json` prints and a function that shows it.
"""

from __future__ import annotations

import shlex
from typing import Any

from greenvis.cli.output import Answer, options, print_rows, teller, write


def plan(args: Any) -> Answer:
    """Predict what a recipe, or each of a sweep, will cost."""
    from greenvis.experiment import sweep

    recipes = sweep.load(args.recipe, args.set)  # what is wrong is said before torch is imported
    from greenvis.planning.plan import plan, total

    options: dict[str, Any] = {"runs": args.runs, "trust": args.trust, "say": teller(args)}
    arms = {}
    for recipe, _ in recipes:
        arms |= plan(recipe, **options)["arms"]
    prediction = {"arms": arms, "total": total(arms)}

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

    return prediction, show


def rank(args: Any) -> Answer:
    """Rank candidate bases for new data, without training."""
    from greenvis.planning.rank import METHODS, rank
    from greenvis.report.formatting import si

    ranking = rank(
        args.bases,
        args.data,
        images=args.images,
        by=args.by,
        runs=args.runs,
        trust=args.trust,
        say=teller(args),
        **options(args),
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

    return ranking, show


def advise(args: Any) -> Answer:
    """Compare the ways to train a model for new data by short trials, and write the recipe of the
    one to take."""
    from greenvis.planning.advise import advise
    from greenvis.planning.candidates import PLANS

    advice = advise(
        args.model,
        args.data,
        target_accuracy=args.target_accuracy,
        budget=args.budget,
        serve=args.serve,
        teacher=args.teacher,
        plans=args.plans or PLANS,
        share=args.share,
        out=args.out,
        overrides=args.set,
        runs=args.runs,
        fresh=args.fresh,
        trust=args.trust,
        say=teller(args),
        **options(args),
    )
    return advice, lambda: _show_advice(advice)


def _show_advice(advice: dict[str, Any]) -> None:
    from greenvis.planning.plan import BUSY_BAND
    from greenvis.report.formatting import count, gain, si

    served, images = count(advice["serve"]), count(advice["images"])
    rows = []
    for row in advice["rows"]:
        accuracy = row["accuracy"]
        rows.append(
            {
                "plan": row["plan"],
                "accuracy": f"{gain('accuracy', accuracy['value'])} ({accuracy['low'] * 100:.0f} – "
                f"{accuracy['high'] * 100:.0f})",
                "training": si(row["train_energy_j"]["value"], "J"),
                "1,000 images": si(row["serve_energy_j"]["value"], "J"),
                f"with {served}": si(row["total_energy_j"]["value"], "J"),
                "front": ", ".join(
                    ["yes"] * row["front"] + ["taken"] * (row["plan"] == advice["pick"])
                ),
            }
        )
    print_rows(rows, f"{advice['model']} for {advice['data']}, {images} training images: predicted")
    for plan, why in advice["refused"].items():
        write(f"left out: {plan}: {why}")
    sizes = ", ".join(
        str(n) for n in sorted({t["images"] for row in advice["rows"] for t in row["trials"]})
    )
    spent = si(advice["trials_energy_j"], "J")
    write(
        f"from trials on {sizes} images, tested on {advice['held']} others of the training images, "
        f"which took {spent}"
    )
    write(
        "accuracy: the error falls on as a power of the images; in brackets with half and one and "
        "a half times that slope"
    )
    write(
        f"and the sampling error. Energy: ±{BUSY_BAND:.0%}. Front: no other plan is both cheaper "
        "and more accurate"
    )
    write(f"{advice['pick'] or 'none'}: {advice['why']}")
    if advice["recipe"]:
        write(f"greenvis run {shlex.quote(str(advice['recipe']))}")
