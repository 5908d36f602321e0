"""What each command calls, and how its answer is shown. Each returns (what --json prints, a
function that shows it)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from greenvis.cli.terminal import (
    Answer,
    console,
    json_text,
    left_by,
    message,
    options,
    print_rows,
    reported,
    teller,
    write,
    write_block,
)
from greenvis.errors import BadInput, GreenvisError, nearest, one_line


def run(args: Any) -> Answer | int:
    """Train a recipe's arms and write its report."""
    from greenvis.experiment import sweep
    from greenvis.meters import header

    alone = header.ranks()[1] == 1
    recipes = (
        sweep.load(args.recipe, args.set) if alone else []
    )  # what is wrong is said before torch is imported
    from greenvis.core import distributed
    from greenvis.experiment import on_ray, session
    from greenvis.report import report

    engines = ("one-by-one", "ray")
    if args.on not in engines:
        raise BadInput(f"cannot run on '{args.on}'{nearest(args.on, engines)}")
    distributed.join()
    recipes = recipes or distributed.together(lambda: sweep.load(args.recipe, args.set))
    first, several = recipes[0][0], len(recipes) > 1
    options: dict[str, Any] = {
        "runs": args.runs, "fresh": args.fresh, "trust": args.trust, "log_with": args.log_with,
        "command": ["greenvis", "run", args.recipe, *(w for s in args.set for w in ("--set", s))],
        "say": teller(args),
    }  # fmt: skip
    failed: dict[str, str] = {}
    if args.on == "ray":
        distributed.alone("greenvis run --on ray")
        folders, failed = on_ray.run(recipes, **options)
    else:
        folders = [
            session.run(recipe, **options, fresh_process=not i)
            for i, (recipe, _) in enumerate(recipes)
        ]
    if distributed.index():
        distributed.leave()
        return 0  # the first of several processes reports
    distributed.leave()
    page = report(
        folders,
        out=args.out
        or Path("reports") / (sweep.title(args.recipe, args.set) if several else first.name),
        baseline=f"{first.name}/{first.baseline}" if several else first.baseline,
        metric=first.report.metric,
        margin=first.report.margin,
        title=first.report.title,
        note=first.report.note,
    )
    if failed:
        listed = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise GreenvisError(
            f"{len(failed)} runs failed ({listed}); {page} has the others, and the same command "
            "goes on from here"
        )
    return reported(page)


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
        from greenvis.report.words import duration, si

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


def report(args: Any) -> Answer:
    """Write a report from records."""
    from greenvis.meters import record
    from greenvis.report import report

    wanted = {k: getattr(args, k) for k in ("out", "baseline", "grid", "title", "served", "margin")}
    return reported(report([record.named(path, args.runs) for path in args.paths], **wanted))


def overview(args: Any) -> Answer:
    """Sum many reports up."""
    from greenvis.report.overview import markdown, overview

    found = overview(args.folder)
    return found, lambda: write_block(markdown(found))


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
        {"part": part, "found": found}
        for part, found in structure.describe(structure.view(model, x))
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
            write("MACs of an image: " + ", ".join(f"{k} {v:.4g}" for k, v in spread.items()))
        for note in out["notes"]:
            write(f"note: {note}")

    return out, show


def doctor(args: Any) -> Answer:
    """Say where each figure comes from here."""
    from greenvis.meters import header, repeat
    from greenvis.meters.doctor import doctor

    if args.repeat:
        repeat.measure(header.cpu()["name"], say=teller(args))
    rows = doctor()

    def show() -> None:
        from rich.padding import Padding
        from rich.text import Text

        for row in rows:
            said = ", ".join(str(row[k]) for k in ("source", "provenance", "band") if row.get(k))
            console().print(Text(one_line(f"{row['what']}: {said}")))
            for key in ("why", "better"):
                if row.get(key):
                    console().print(
                        Padding(Text(one_line(f"{key}: {row[key]}"), style="dim"), (0, 0, 0, 4))
                    )

    return rows, show


def track(args: Any) -> Answer | int:
    """Meter a command; its exit code is the answer."""
    from greenvis.meters.command import track_command

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise BadInput("greenvis track takes a command after --: greenvis track -- python train.py")
    code, run = track_command(words, name=args.name, country=args.country, dir=args.dir)
    energy = run.energy()
    said = {
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
    kept = f"the record is lost: {run.lost}" if run.lost else f"record: {run.path}"
    print(
        json_text(said) if args.json else message(f"{text}; {kept}"),
        file=sys.stdout if args.json else sys.stderr,
    )
    return code


def ls(args: Any) -> Answer:
    """List recorded runs."""
    from greenvis.report.listing import group, ls

    rows = ls(
        args.paths, where=args.where, sort="started_s" if args.group else args.sort or "started_s"
    )
    if args.group:
        rows = group(rows, args.group.split(","), args.sort)
    return rows, lambda: _print_brief(rows, f"{len(rows)} {'groups' if args.group else 'runs'}")


def compare(args: Any) -> Answer:
    """Compare two runs."""
    from greenvis.meters import record
    from greenvis.report.listing import compare

    rows = compare(*(record.named(side, args.runs) for side in (args.a, args.b)))
    return rows, lambda: _print_brief(rows, f"{args.a} and {args.b}")


def diff(args: Any) -> int:
    """Compare two runs against a limit: exit 0 within it, 1 over it."""
    from greenvis.meters import record
    from greenvis.report.listing import diff

    a, b = (record.named(side, args.runs) for side in (args.a, args.b))
    fine, rows = diff(a, b, max_energy=args.max_energy)
    if args.json:
        print(json_text({"ok": fine, "rows": rows}))
    else:
        _print_brief(rows, "within the limit" if fine else "over the limit")
    return 0 if fine else 1


def export(args: Any) -> Answer:
    """Write a finished run's model in another form."""
    from greenvis.integrations.export import export

    found = export(left_by(args.run, args.runs), args.to, args.out, trust=args.trust)

    def show() -> None:
        write(
            f"{found['path']}: {found['to']}; greatest difference from the live model "
            f"{found['max_difference']:.1e}"
        )

    return found, show


def bench(args: Any) -> Answer:
    """Run a benchmark, or list them."""
    import importlib
    import pkgutil
    from inspect import signature

    import greenvis.bench

    names = [
        m.name for m in pkgutil.iter_modules(greenvis.bench.__path__) if not m.name.startswith("_")
    ]
    if args.name is None:
        if args.out or args.all:
            raise BadInput(
                "name the benchmark to run: greenvis bench NAME; without a name they are listed"
            )
        return names, lambda: print("\n".join(names))
    if args.name not in names:
        raise BadInput(f"unknown benchmark '{args.name}'{nearest(args.name, names)}")
    run = importlib.import_module(f"greenvis.bench.{args.name}").run
    if args.all and "per_family" not in signature(run).parameters:
        raise BadInput(
            f"--all is for coverage, which draws from timm's models; {args.name} has no such sample"
        )
    out = run(Path(args.out) if args.out else None, **({"per_family": None} if args.all else {}))
    return out, lambda: print_rows(out["rows"], f"bench {args.name}")


# -- helpers --------------------------------------------------------------------------------------


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


def _print_brief(rows: Sequence[dict[str, Any]], title: str) -> None:
    from greenvis.report import brief

    print_rows(brief.rows(rows), title)
