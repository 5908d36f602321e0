"""What the commands about pretrained bases call, and how their answers are shown. See `greenvis.verbs`."""

from __future__ import annotations

from typing import Any

from greenvis.terminal import Answer, options, print_rows, teller


def rank(args: Any) -> Answer:
    """Rank candidate bases for new data, without training."""
    from greenvis.rank import METHODS, rank
    from greenvis.report.words import si

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
        print_rows(rows, f"bases for {found['data']}, by {found['by']} of {found['images']} training images")
        spent = found["energy_j"]
        text = f"the ranking took {si(spent['value'], 'J')} ({si(spent['low'], 'J')} – {si(spent['high'], 'J')})"
        if found["tuning_energy_j"]:
            text += f"; fine-tuning each of them once took {si(found['tuning_energy_j'], 'J')}"
        print(text)
        for method, its in (found["correlation"] or {}).items():
            taus = f"weighted tau {its['weighted_tau']:+.2f}, tau {its['tau']:+.2f}"
            print(f"{method} against real fine-tuning of {its['bases']} bases: {taus}")
        if found["correlation"] is None:
            print("fewer than three of these bases were fine-tuned on this data on record, so nothing says how right this is")

    return found, show
