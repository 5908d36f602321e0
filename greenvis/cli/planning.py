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
    found = {"arms": arms, "total": total(arms)}

    def show() -> None:
        from greenvis.report.formatting import duration, si

        forms = {
            "energy": ("energy_j", lambda v: si(v, "J")),
            "CO₂e": ("carbon_g", lambda v: si(v, "g")),
            "time": ("wall_s", duration),
            "FLOPs": ("flops", si),
        }
        rows = []
        for name, arm in [*found["arms"].items(), ("total", found["total"])]:
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

    return found, show


def rank(args: Any) -> Answer:
    """Rank candidate bases for new data, without training."""
    from greenvis.planning.rank import METHODS, rank
    from greenvis.report.formatting import si

    found = rank(
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
            for row in found["rows"]
        ]
        print_rows(
            rows,
            f"bases for {found['data']}, by {found['by']} of {found['images']} training images",
        )
        spent = found["energy_j"]
        text = (
            f"the ranking took {si(spent['value'], 'J')} ({si(spent['low'], 'J')} – "
            f"{si(spent['high'], 'J')})"
        )
        if found["tuning_energy_j"]:
            text += f"; fine-tuning each of them once took {si(found['tuning_energy_j'], 'J')}"
        write(text)
        for method, its in (found["correlation"] or {}).items():
            taus = f"weighted tau {its['weighted_tau']:+.2f}, tau {its['tau']:+.2f}"
            write(f"{method} against real fine-tuning of {its['bases']} bases: {taus}")
        if found["correlation"] is None:
            write(
                "fewer than three of these bases were fine-tuned on this data on record, so "
                "nothing says how right this is"
            )

    return found, show


def advise(args: Any) -> Answer:
    """Compare the ways to train a model for new data by short trials, and write the recipe of the
    one to take."""
    from greenvis.planning.advise import advise
    from greenvis.planning.candidates import PLANS

    found = advise(
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
    return found, lambda: _show_advice(found)


def _show_advice(found: dict[str, Any]) -> None:
    from greenvis.planning.plan import BUSY_BAND
    from greenvis.report.formatting import count, gain, si

    served, images = count(found["serve"]), count(found["images"])
    rows = []
    for row in found["rows"]:
        its = row["accuracy"]
        rows.append(
            {
                "plan": row["plan"],
                "accuracy": f"{gain('accuracy', its['value'])} ({its['low'] * 100:.0f} – "
                f"{its['high'] * 100:.0f})",
                "training": si(row["train_energy_j"]["value"], "J"),
                "1,000 images": si(row["serve_energy_j"]["value"], "J"),
                f"with {served}": si(row["total_energy_j"]["value"], "J"),
                "front": ", ".join(
                    ["yes"] * row["front"] + ["taken"] * (row["plan"] == found["pick"])
                ),
            }
        )
    print_rows(rows, f"{found['model']} for {found['data']}, {images} training images: predicted")
    for plan, why in found["refused"].items():
        write(f"left out: {plan}: {why}")
    sizes = ", ".join(
        str(n) for n in sorted({t["images"] for row in found["rows"] for t in row["trials"]})
    )
    spent = si(found["trials_energy_j"], "J")
    write(
        f"from trials on {sizes} images, tested on {found['held']} others of the training images, "
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
    write(f"{found['pick'] or 'none'}: {found['why']}")
    if found["recipe"]:
        write(f"greenvis run {shlex.quote(str(found['recipe']))}")
