"""`greenvis bench NAME`: one command for each file of `greenvis.bench`, with the options it
declares."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from importlib.util import find_spec
from inspect import Signature, signature
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperGroup

import greenvis.bench
from greenvis.cli import app
from greenvis.cli.app import EXAMPLES, EXIT_CODES, Verb, effect
from greenvis.cli.output import answer, print_rows
from greenvis.errors import BadInput, nearest


class Benchmarks(TyperGroup):
    """The files of `greenvis.bench`; one is imported when it is to run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the benchmarks."""
        modules = pkgutil.iter_modules(greenvis.bench.__path__)
        return [module.name for module in modules if module.name[0] != "_"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a benchmark. Raises BadInput with the nearest where there is
        none."""
        names = self.list_commands(ctx)
        if cmd_name not in names:
            raise BadInput(f"unknown benchmark '{cmd_name}'{nearest(cmd_name, names)}")
        return _command(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; the name may stand after options."""
        names = [word for word in args if word in self.list_commands(ctx)]
        if not names and {*args} & {"--out", "--all"}:
            raise BadInput(
                "name the benchmark to run: greenvis bench NAME; without a name they are listed"
            )
        if names and args[0][0] == "-":
            args.remove(names[0])
            args.insert(0, names[0])
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of benchmarks, read off their files."""
        with formatter.section("Benchmarks"):
            formatter.write_dl([(name, _about(name)) for name in self.list_commands(ctx)])


EXAMPLES["bench"] = "greenvis bench listing"
benchmarks = typer.Typer(cls=Benchmarks, rich_markup_mode=None, epilog=EXIT_CODES)
app.app.add_typer(benchmarks, name="bench", rich_help_panel=app.MEASURE)


@benchmarks.callback(invoke_without_command=True)
def bench(ctx: typer.Context, as_json: app.Json = False) -> None:
    """run a side-by-side benchmark, or list them"""
    if ctx.invoked_subcommand is None:
        names = ctx.command.list_commands(ctx)  # type: ignore[attr-defined]
        answer(as_json, names, lambda: print("\n".join(names)))


def _command(name: str) -> Any:
    """Return a benchmark as a command: options are those parameters of its `run` that say so."""
    run = importlib.import_module(f"greenvis.bench.{name}").run
    declared = signature(run, eval_str=True).parameters.values()
    options = [p for p in declared if get_origin(p.annotation) is Annotated]
    as_json = signature(bench, eval_str=True).parameters["as_json"]

    def call(as_json: bool, **options: Any) -> None:
        out = run(**options)
        answer(as_json, out, lambda: print_rows(out["rows"], f"bench {name}"))

    call.__signature__ = Signature([*options, as_json])  # type: ignore[attr-defined]
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=Verb, help=_about(name), epilog=EXIT_CODES)(call)
    return typer.main.get_command(alone)


def _about(name: str) -> str:
    """Return what a benchmark's file says of it, without importing it."""
    spec: Any = find_spec(f"greenvis.bench.{name}")
    text = ast.get_docstring(ast.parse(spec.loader.get_source(spec.name)))
    return effect(text).partition(": ")[2]
