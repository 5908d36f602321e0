"""The command line: parse, call, print. Exit codes: 0 done, 1 failed, 2 bad input (nothing was changed).

Every verb prints for people, and with `--json` one JSON document on standard output for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from greenvis import __version__
from greenvis.errors import BadInput, GreenvisError, nearest

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 bad input"
Answer = tuple[Any, Callable[[], None]]  # what --json prints, and how people see it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    verbs = _verbs(parser)
    if words and not words[0].startswith("-") and words[0] not in verbs:
        print(f"greenvis: unknown command '{words[0]}'{nearest(words[0], verbs)}", file=sys.stderr)
        return 2
    args = parser.parse_args(words)
    if not hasattr(args, "call"):
        parser.print_help()
        return 0
    try:
        answer = args.call(args)
        if isinstance(answer, int):
            return answer
        if args.json:
            print(json.dumps(answer[0], indent=2, default=str, ensure_ascii=False))
        else:
            answer[1]()
        return 0
    except GreenvisError as error:
        code = 2 if isinstance(error, BadInput) else 1
        if getattr(args, "json", False):
            print(json.dumps({"error": str(error), "exit": code}))
        print(f"greenvis: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("greenvis: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "greenvis", description="Make vision models cheaper to train, adapt and run, and prove it.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"greenvis {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    def verb(name: str, call: Callable[[Any], Answer | int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        sub.set_defaults(call=call)
        return sub

    p = verb("run", _run, "train every arm of a recipe, metered, and write its report")
    p.add_argument("recipe", help="a YAML file; see `greenvis schema`")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value: --set train.epochs=3")
    p.add_argument("--fresh", action="store_true", help="train finished arms again (their energy stays in the totals)")
    p.add_argument("--trust", action="store_true", help="allow models given as package.module:function, which runs their code")
    p.add_argument("--runs", default="runs", help="folder of run records (default: runs)")
    p.add_argument("--out", help="folder of the report (default: reports/NAME)")

    p = verb("report", _report, "write a report from run records made anywhere")
    p.add_argument("paths", nargs="+", help="records, or folders of them")
    p.add_argument("--out", help="folder of the report (default: reports/NAME)")
    p.add_argument("--baseline", help="the arm the others are measured against")
    p.add_argument("--grid", help="price the carbon with another grid: an ISO-3 code; changes grams and nothing else")
    p.add_argument("--title", help="headline of the report")

    verb("techniques", _techniques, "list the techniques, own and plugged in")
    p = verb("explain", _explain, "say what a technique does, saves and costs, and its settings")
    p.add_argument("technique")
    verb("schema", _schema, "print the JSON Schema of a recipe")

    p = verb("inspect", _inspect, "show a model's blocks, attention, MLPs, norms and heads, found by structure")
    _model_options(p)
    p = verb("flops", _flops, "count a model's MACs and FLOPs, by module, with two counters")
    _model_options(p)
    p.add_argument("--techniques", help='JSON list as in a recipe: \'[{"lora": {"rank": 8}}]\'')

    verb("doctor", _doctor, "say where each energy figure comes from on this machine, and why")
    p = verb("track", _track, "meter any command and its children: greenvis track -- python train.py")
    p.add_argument("--name", default="command")
    p.add_argument("--country", help="ISO-3 code of the grid, as FRA")
    p.add_argument("--dir", default="runs")
    p.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")

    p = verb("ls", _ls, "list recorded runs")
    p.add_argument("paths", nargs="*", default=["runs"])
    p = verb("compare", _compare, "compare two runs figure by figure")
    p.add_argument("a")
    p.add_argument("b")
    p = verb("diff", _diff, "fail (exit 1) where run B costs more than run A allows: a gate for CI")
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("--max-energy", default="+5%", help="the most B's energy may exceed A's (default: +5%%)")
    p = verb("bench", _bench, "run a side-by-side benchmark")
    p.add_argument("name", nargs="?", help="which; all are listed without it")
    p.add_argument("--out", help="folder to write the benchmark's report to")
    return parser


def _verbs(parser: argparse.ArgumentParser) -> list[str]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return list(groups[0].choices)


def _model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", help="timm/NAME, torchvision/NAME, hf/NAME_OR_PATH, package.module:function or file:PATH")
    p.add_argument("--img-size", type=int)
    p.add_argument("--in-chans", type=int)
    p.add_argument("--num-classes", type=int)
    p.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="any further option of the model")
    p.add_argument("--trust", action="store_true")


# -- the verbs: each returns (what --json prints, how people see it), or an exit code ---------------------------------


def _run(args: Any) -> Answer:
    from greenvis import experiment
    from greenvis.recipe import load_recipe
    from greenvis.report import report

    recipe = load_recipe(args.recipe, args.set)
    command = ["greenvis", "run", args.recipe, *(w for s in args.set for w in ("--set", s))]
    say = _quiet if args.json else _say
    folder = experiment.run(recipe, runs=args.runs, fresh=args.fresh, trust=args.trust, command=command, say=say)
    page = report([folder], out=args.out or Path("reports") / recipe.name, baseline=recipe.baseline, title=recipe.report.title)
    return _reported(page)


def _report(args: Any) -> Answer:
    from greenvis.meters.carbon import lookup
    from greenvis.report import report

    grid = lookup(args.grid) if args.grid else None
    return _reported(report(args.paths, out=args.out, baseline=args.baseline, grid=grid, title=args.title))


def _reported(page: Path) -> Answer:
    results = json.loads((page.parent / "results.json").read_text())

    def show() -> None:
        from rich.markup import escape

        from greenvis.report import table

        _console().print(table(results))
        _console().print(f"report: [bold]{escape(str(page))}[/bold]", soft_wrap=True)

    return {"report": str(page), "results": results}, show


def _techniques(args: Any) -> Answer:
    from greenvis import registry

    found = [(name, registry.find(name)) for name in registry.names()]
    rows = [{"name": n, "stage": t.stage, "does": _first_line(t)} for n, t in found]
    return rows, lambda: _print_rows(rows, "techniques")


def _explain(args: Any) -> Answer:
    import inspect

    from greenvis import registry

    kind = registry.find(args.technique)
    form = kind.model_json_schema()
    rows = [
        {
            "field": n,
            "default": f.get("default", "required"),
            "type": f.get("type") or f.get("anyOf") or "",
            "what": f.get("description", ""),
        }
        for n, f in form.get("properties", {}).items()
    ]

    def show() -> None:
        print(f"{args.technique} (stage {kind.stage})\n\n{inspect.getdoc(kind)}\n")
        _print_rows([{**r, "type": r["type"] if isinstance(r["type"], str) else "several"} for r in rows], "settings")

    return {"name": args.technique, "stage": kind.stage, "doc": inspect.getdoc(kind), "schema": form}, show


def _schema(args: Any) -> Answer:
    from greenvis.recipe import schema

    form = schema()
    return form, lambda: print(json.dumps(form, indent=2))


def _inspect(args: Any) -> Answer:
    from greenvis import views

    rows = [{"part": part, "found": found} for part, found in views.describe(views.view(_model(args)))]
    return rows, lambda: _print_rows(rows, args.model)


def _flops(args: Any) -> Answer:
    from greenvis import views
    from greenvis.meters import flops
    from greenvis.recipe import parse_techniques
    from greenvis.wrap import wrap

    model = _model(args)
    x = views.example_input(model)
    if args.techniques:
        wrap(model, parse_techniques(args.techniques))
    count = flops.count(model, x, train=True)
    out = count.as_dict()

    def show() -> None:
        _print_rows([{"module": k, "MMACs": f"{v / 1e6:,.2f}"} for k, v in out["by_module"].items()], args.model)
        forward = f"{out['macs'] / 1e9:.4g} GMACs, {out['flops'] / 1e9:.4g} GFLOPs"
        print(f"forward {forward}; training step {out['train_flops'] / 1e9:.4g} GFLOPs")
        print(f"counters: {out['counters']}; not counted: {out['unhandled'] or 'nothing'}")

    return out, show


def _doctor(args: Any) -> Answer:
    from greenvis.meters.doctor import doctor

    rows = doctor()
    return rows, lambda: _print_rows(rows, "where the figures come from here")


def _track(args: Any) -> Answer | int:
    from greenvis.meters.command import track_command

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise BadInput("greenvis track takes a command after --: greenvis track -- python train.py")
    code, run = track_command(words, name=args.name, country=args.country, dir=args.dir)
    energy = run.energy()
    said = {"record": str(run.path), "exit": code, "energy_j": energy.value, "low": energy.low, "high": energy.high}
    text = (
        "unknown" if energy.value is None else f"{energy.value:.1f} J ({energy.low:.1f}–{energy.high:.1f}, {energy.provenance})"
    )
    print(
        json.dumps(said) if args.json else f"greenvis: {text}; record: {run.path}", file=sys.stdout if args.json else sys.stderr
    )
    return code


def _ls(args: Any) -> Answer:
    from greenvis.report.listing import ls

    rows = ls(args.paths)
    return rows, lambda: _print_rows(rows, f"{len(rows)} runs")


def _compare(args: Any) -> Answer:
    from greenvis.report.listing import compare

    rows = compare(args.a, args.b)
    return rows, lambda: _print_rows(rows, f"{args.a} and {args.b}")


def _diff(args: Any) -> int:
    from greenvis.report.listing import diff

    fine, rows = diff(args.a, args.b, max_energy=args.max_energy)
    if args.json:
        print(json.dumps({"ok": fine, "rows": rows}, default=str))
    else:
        _print_rows(rows, "within the limit" if fine else "over the limit")
    return 0 if fine else 1


def _bench(args: Any) -> Answer:
    import importlib
    import pkgutil

    import greenvis.bench

    names = [m.name for m in pkgutil.iter_modules(greenvis.bench.__path__)]
    if args.name is None:
        return names, lambda: print("\n".join(names))
    if args.name not in names:
        raise BadInput(f"unknown benchmark '{args.name}'{nearest(args.name, names)}")
    out = importlib.import_module(f"greenvis.bench.{args.name}").run(Path(args.out) if args.out else None)
    return out, lambda: _print_rows(out["rows"], f"bench {args.name}")


# -- helpers ----------------------------------------------------------------------------------------------------------


def _model(args: Any) -> Any:
    import yaml

    from greenvis import models

    options = {k: getattr(args, k) for k in ("img_size", "in_chans", "num_classes") if getattr(args, k) is not None}
    for text in args.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--option takes KEY=VALUE, as in --option depth=6; got '{text}'")
        options[key] = yaml.safe_load(value)
    return models.build(args.model, trust=args.trust, **options).eval()


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quiet(text: str) -> None:
    pass


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _print_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    columns = list(dict.fromkeys(k for row in rows for k in row))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(c) is None else str(row[c])) for c in columns))
    _console().print(table)
