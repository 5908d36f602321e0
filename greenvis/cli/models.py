"""Commands about techniques and models: `techniques`, `explain`, `schema`, `inspect`, `flops`,
`probe`, `card`, `export`.

Each returns what `--json` prints and a function that shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from greenvis.cli.output import (
    Answer,
    left_by,
    options,
    print_rows,
    reported,
    teller,
    write,
    write_block,
)


def techniques(args: Any) -> Answer:
    """List the techniques."""
    from greenvis.techniques import registry

    about = {name: registry.about(name) for name in registry.names()}
    rows = [{"name": n, "stage": a["stage"], "does": _effect(a["doc"])} for n, a in about.items()]
    return rows, lambda: print_rows(rows, "techniques")


def explain(args: Any) -> Answer:
    """Describe one technique and its settings."""
    from greenvis.techniques import registry

    about = registry.about(args.technique)
    rows = [
        {
            "field": n,
            "default": f.get("default", "required"),
            "type": f.get("type") or f.get("anyOf") or "",
            "what": f.get("description", ""),
        }
        for n, f in about["schema"].get("properties", {}).items()
    ]

    def show() -> None:
        write_block(f"{args.technique} (stage {about['stage']})\n\n{about['doc']}")
        print()
        print_rows(
            [{**r, "type": r["type"] if isinstance(r["type"], str) else "several"} for r in rows],
            "settings",
        )

    return {"name": args.technique, **about}, show


def schema(args: Any) -> Answer:
    """Give the JSON Schema of a recipe."""
    from greenvis.experiment.recipe import schema

    form = schema()
    return form, lambda: print(json.dumps(form, indent=2))


def inspect(args: Any) -> Answer:
    """Show a model's parts."""
    from greenvis.models import structure

    model, x = _model(args)
    rows = [
        {"part": part, "found": value}
        for part, value in structure.describe(structure.view(model, x))
    ]
    return rows, lambda: print_rows(rows, args.model)


def flops(args: Any) -> Answer:
    """Count a model's MACs and FLOPs."""
    from greenvis import data
    from greenvis.core.wrap import wrap
    from greenvis.experiment.recipe import parse_techniques
    from greenvis.meters import flops

    model, x = _model(args)
    if args.techniques:
        wrap(model, [t.for_images(tuple(x.shape[1:])) for t in parse_techniques(args.techniques)])
    count = flops.count(model, x, train=True)
    out = count.as_dict()
    if args.data:
        images = data.load(args.data, test=64, img_size=x.shape[-1], in_chans=x.shape[1]).test
        out["distribution"] = flops.distribution(model, [images.batch(range(len(images)))[0]])
    elif any(note.startswith(flops.WITH_DATA) for note in count.notes):
        out["notes"].append(
            "the work may depend on the image: --data NAME counts real ones, one by one"
        )

    def show() -> None:
        print_rows(
            [{"module": k, "MMACs": f"{v / 1e6:,.2f}"} for k, v in out["by_module"].items()],
            args.model,
        )
        forward = f"{out['macs'] / 1e9:.4g} GMACs, {out['flops'] / 1e9:.4g} GFLOPs"
        write(f"forward {forward}; training step {out['train_flops'] / 1e9:.4g} GFLOPs")
        write(f"counters: {out['counters']}; not counted: {out['unhandled'] or 'nothing'}")
        if spread := out.get("distribution"):
            write("MACs per image: " + ", ".join(f"{k} {v:.4g}" for k, v in spread.items()))
        for note in out["notes"]:
            write(f"note: {note}")

    return out, show


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
    from greenvis.report.formatting import si

    content = lineage.read_card(left_by(args.file, args.runs))

    def cost(energy: dict[str, Any]) -> str:
        if energy["value"] is None:
            return "cost not known"
        return (
            f"{si(energy['value'], 'J')} ({si(energy['low'], 'J')} – {si(energy['high'], 'J')}, "
            f"{energy['provenance']})"
        )

    def show() -> None:
        data = content.get("data") or {}
        accuracy = content.get("accuracy")
        write(f"{content['file']}: {content['ref']}")
        write(f"data: {data.get('name', 'unknown')}, {data.get('train', '?')} training images")
        write("accuracy: " + ("unknown" if accuracy is None else f"{accuracy:.4f}"))
        for depth, role, entry in lineage.tree(content):
            seed = "" if entry["seed"] is None else f", seed {entry['seed']}"
            write(
                f"{'  ' * depth}{role + ' ' if role else ''}{entry['name']}{seed}: "
                f"{cost(entry['energy_j'])}"
            )
        write(f"with all it was made from: {cost(content['total_j'])}")
        write_block(f"\nits recipe:\n\n{content.get('recipe', '')}")

    return content, show


def export(args: Any) -> Answer:
    """Write a finished run's model in another form."""
    from greenvis.integrations.export import export

    exported = export(left_by(args.run, args.runs), args.to, args.out, trust=args.trust)

    def show() -> None:
        write(
            f"{exported['path']}: {exported['to']}; greatest difference from the live model "
            f"{exported['max_difference']:.1e}"
        )

    return exported, show


def _model(args: Any) -> tuple[Any, Any]:
    """Return the model, and an image batch of the size asked for: many take images of any, and are
    built for none."""
    from greenvis import models
    from greenvis.models import structure

    asked = options(args)
    model = models.build(args.model, trust=args.trust, **asked).eval()
    return model, structure.example_input(model, size=asked.get("img_size"))


def _effect(doc: str) -> str:
    """Return the first paragraph of a technique's docstring."""
    return " ".join(doc.partition("\n\n")[0].split())
