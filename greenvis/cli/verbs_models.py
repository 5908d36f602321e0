"""What the commands about models that runs left behind call, and how their answers are shown. See
`greenvis.cli.verbs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from greenvis.cli.terminal import Answer, left_by, reported, teller, write, write_block


def probe(args: Any) -> Answer:
    """Evaluate a saved model: probes, fine-tuning, few labels, nearest neighbours."""
    from greenvis.planning import probe as probing
    from greenvis.report import report

    protocol = args.protocol or probing.PROTOCOL
    folder, recipe = probing.probe(
        left_by(args.run, args.runs),
        protocol=protocol,
        overrides=args.set,
        runs=args.runs,
        trust=args.trust,
        say=teller(args),
    )
    out = args.out or Path("reports") / recipe.name
    return reported(
        report(
            [folder],
            out=out,
            baseline=recipe.baseline,
            title=recipe.report.title,
            note=recipe.report.note,
        )
    )


def card(args: Any) -> Answer:
    """Say what a saved model was made from, and what all of it cost."""
    from greenvis.experiment import lineage
    from greenvis.report.words import si

    found = lineage.read_card(left_by(args.file, args.runs))

    def cost(energy: dict[str, Any]) -> str:
        if energy["value"] is None:
            return "cost not known"
        return (
            f"{si(energy['value'], 'J')} ({si(energy['low'], 'J')} – {si(energy['high'], 'J')}, "
            f"{energy['provenance']})"
        )

    def show() -> None:
        data = found.get("data") or {}
        accuracy = found.get("accuracy")
        write(f"{found['file']}: {found['ref']}")
        write(f"data: {data.get('name', 'unknown')}, {data.get('train', '?')} training images")
        write("accuracy: " + ("unknown" if accuracy is None else f"{accuracy:.4f}"))
        for depth, role, entry in lineage.tree(found):
            seed = "" if entry["seed"] is None else f", seed {entry['seed']}"
            write(
                f"{'  ' * depth}{role + ' ' if role else ''}{entry['name']}{seed}: "
                f"{cost(entry['energy_j'])}"
            )
        write(f"with all it was made from: {cost(found['total_j'])}")
        write_block(f"\nits recipe:\n\n{found.get('recipe', '')}")

    return found, show
