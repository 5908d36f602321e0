"""Commands that make records and read them: `run`, `report`, `overview`, `track`, `doctor`, `ls`,
`compare`, `diff`, `bench`.

Each returns what `--json` prints and a function that shows it, or an exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from greenvis.cli.output import (
    Answer,
    console,
    json_text,
    message,
    print_rows,
    reported,
    teller,
    write_block,
)
from greenvis.errors import BadInput, GreenvisError, nearest, one_line


def run(args: Any) -> Answer | int:
    """Train a recipe's arms and write its report."""
    from greenvis.experiment import sweep
    from greenvis.meters import header
    from greenvis.report.folder import refuse_foreign

    if args.out:
        refuse_foreign(Path(args.out))
    alone = header.ranks()[1] == 1
    # what is wrong is said before torch is imported
    recipes = sweep.load(args.recipe, args.set) if alone else []
    if recipes and not args.out:
        refuse_foreign(_page_folder(args, recipes))
    from greenvis.core import distributed
    from greenvis.experiment import on_ray, session
    from greenvis.report import report

    engines = ("one-by-one", "ray")
    if args.on not in engines:
        raise BadInput(f"cannot run on '{args.on}'{nearest(args.on, engines)}")
    distributed.init_process_group()
    recipes = recipes or distributed.main_first(lambda: sweep.load(args.recipe, args.set))
    first, several = recipes[0][0], len(recipes) > 1
    options: dict[str, Any] = {
        "runs": args.runs, "fresh": args.fresh, "trust": args.trust, "log_with": args.log_with,
        "command": ["greenvis", "run", args.recipe, *(w for s in args.set for w in ("--set", s))],
        "say": teller(args),
    }  # fmt: skip
    failed: dict[str, str] = {}
    if args.on == "ray":
        distributed.require_single_process("greenvis run --on ray")
        folders, failed = on_ray.run(recipes, **options)
    else:
        folders = [
            session.run(recipe, **options, fresh_process=not i)
            for i, (recipe, _) in enumerate(recipes)
        ]
    if distributed.rank():
        distributed.destroy_process_group()
        return 0  # the first of several processes reports
    distributed.destroy_process_group()
    page = report(
        folders,
        out=_page_folder(args, recipes),
        baseline=f"{first.name}/{first.baseline}" if several else first.baseline,
        metric=first.report.metric,
        margin=first.report.margin,
        title=first.report.title,
        note=first.report.note,
    )
    if failed:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise GreenvisError(
            f"{len(failed)} runs failed ({reasons}); {page} has the others, and the same command "
            "goes on from here"
        )
    return reported(page)


def report(args: Any) -> Answer:
    """Write a report from records."""
    from greenvis.meters import record
    from greenvis.report import report

    options = {
        k: getattr(args, k) for k in ("out", "baseline", "grid", "title", "served", "margin")
    }
    return reported(report([record.named(path, args.runs) for path in args.paths], **options))


def overview(args: Any) -> Answer:
    """Sum many reports up."""
    from greenvis.report.overview import markdown, overview

    summary = overview(args.folder)
    return summary, lambda: write_block(markdown(summary))


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
            text = ", ".join(str(row[k]) for k in ("source", "provenance", "band") if row.get(k))
            console().print(Text(one_line(f"{row['what']}: {text}")))
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
    answer = {
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
        json_text(answer) if args.json else message(f"{text}; {where}"),
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
    return rows, lambda: _print_runs(rows, f"{len(rows)} {'groups' if args.group else 'runs'}")


def compare(args: Any) -> Answer:
    """Compare two runs."""
    from greenvis.meters import record
    from greenvis.report.listing import compare

    rows = compare(*(record.named(side, args.runs) for side in (args.a, args.b)))
    return rows, lambda: _print_runs(rows, f"{args.a} and {args.b}")


def diff(args: Any) -> int:
    """Compare two runs against a limit: exit 0 within it, 1 over it."""
    from greenvis.meters import record
    from greenvis.report.listing import diff

    a, b = (record.named(side, args.runs) for side in (args.a, args.b))
    fine, rows = diff(a, b, max_energy=args.max_energy)
    if args.json:
        print(json_text({"ok": fine, "rows": rows}))
    else:
        _print_runs(rows, "within the limit" if fine else "over the limit")
    return 0 if fine else 1


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


def _page_folder(args: Any, recipes: Sequence[tuple[Any, Any]]) -> Path:
    """Return where the report of a run goes."""
    from greenvis.experiment import sweep

    several = len(recipes) > 1
    name = sweep.title(args.recipe, args.set) if several else recipes[0][0].name
    return Path(args.out or Path("reports") / name)


def _print_runs(rows: Sequence[dict[str, Any]], title: str) -> None:
    from greenvis.report import terminal

    print_rows(terminal.rows(rows), title)
