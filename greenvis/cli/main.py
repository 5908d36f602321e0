"""The command line: parse, call, print. Exit codes: 0 done, 1 failed, 2 bad input (nothing was
changed).

Every verb prints for people, and with `--json` one JSON document on standard output for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from greenvis import __version__
from greenvis.cli import models, output, planning, runs
from greenvis.errors import BadInput, GreenvisError, nearest

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 bad input"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, with the nearest right name."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = argparse.Namespace(
        json="--json" in words[: words.index("--") if "--" in words else None]
    )
    try:
        args = _parsed(parser, words)
        if not hasattr(args, "call"):
            parser.print_help()
            return 0
        answer = args.call(args)
        if isinstance(answer, int):
            return answer
        if args.json:
            print(output.json_text(answer[0], indent=2))
        else:
            answer[1]()
        return 0
    except GreenvisError as error:
        code = 2 if isinstance(error, BadInput) else 1
        if error.reported:
            return code
        if getattr(args, "json", False):
            print(json.dumps({"error": str(error), "exit": code}))
        print(output.message(error), file=sys.stderr)
        return code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not break into the end
        print("greenvis: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        Exception
    ) as error:  # the machine failed, or we did: one line, never a traceback in a user's face
        if os.environ.get("GREENVIS_DEBUG"):
            raise
        from greenvis.cli.failures import describe

        text = describe(error)
        if getattr(args, "json", False):
            print(json.dumps({"error": text, "exit": 1}))
        print(output.message(text), file=sys.stderr)
        return 1


_Verb = Callable[[str, Callable[[Any], output.Answer | int], str], argparse.ArgumentParser]


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Return what the words say. Raises BadInput for a command or an option that is not known, with
    the nearest."""
    commands = _commands(parser)
    if not words or words[0].startswith("-"):
        return parser.parse_args(words)
    if words[0] not in commands:
        raise BadInput(f"unknown command '{words[0]}'{nearest(words[0], commands)}")
    options = commands[words[0]]._option_string_actions
    args, unknown = parser.parse_known_args(_joined(words, options))
    if unknown and unknown[0].startswith("-"):
        raise BadInput(
            f"{words[0]} has no option {unknown[0]}{nearest(unknown[0].partition('=')[0], options)}"
        )
    if unknown:
        raise BadInput(f"{words[0]} cannot use '{unknown[0]}' (see greenvis {words[0]} --help)")
    return args


def _joined(words: list[str], options: dict[str, argparse.Action]) -> list[str]:
    """Write "--sort -energy" as "--sort=-energy": a value that begins with - would be taken for an
    option."""
    out: list[str] = []
    for i, word in enumerate(words):
        action = options.get(out[-1]) if out else None
        if word == "--":
            return out + words[i:]
        if (
            action is not None
            and action.nargs is None
            and word[:1] == "-"
            and word.partition("=")[0] not in options
        ):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "greenvis",
        description="Make vision models cheaper to train, adapt and run, and prove it.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"greenvis {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def verb(
        name: str, call: Callable[[Any], output.Answer | int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        sub.set_defaults(call=call)
        return sub

    _recipe_verbs(verb)
    _model_verbs(verb)
    _record_verbs(verb)
    return parser


def _recipe_verbs(verb: _Verb) -> None:
    """What begins with a recipe, up to its report and the model it made."""
    p = verb("run", runs.run, "train every arm of a recipe, metered, and write its report")
    p.add_argument("recipe", help="a YAML file; see `greenvis schema`")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change a value: --set train.epochs=3; several in turn: --set train.epochs=3,6",
    )  # fmt: skip
    p.add_argument(
        "--on",
        default="one-by-one",
        metavar="ENGINE",
        help="one-by-one (default), or ray: on a Ray cluster",
    )
    p.add_argument(
        "--fresh",
        action="store_true",
        help="train finished arms again (their energy stays in the totals)",
    )
    p.add_argument(
        "--trust",
        action="store_true",
        help="allow models given as package.module:function, which runs their code",
    )
    p.add_argument("--runs", default="runs", help="folder of run records (default: runs)")
    p.add_argument(
        "--log-with", action="append", default=[], metavar="TRACKER",
        help="log accuracy, loss and joules to a tracker, too: tensorboard, wandb or mlflow",
    )  # fmt: skip
    p.add_argument("--out", help="folder of the report (default: reports/NAME)")

    p = verb(
        "plan",
        planning.plan,
        "predict what a recipe will cost from a few steps of each arm, before it is spent",
    )
    p.add_argument("recipe")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--trust", action="store_true")
    p.add_argument("--runs", default="runs")

    p = verb("report", runs.report, "write a report from run records made anywhere")
    p.add_argument(
        "paths",
        nargs="+",
        help="records, their folders, ids or RECIPE/ARM as `greenvis ls` has them; or one "
        "results.json",
    )
    p.add_argument(
        "--runs", default="runs", help="folder in which ids are looked up (default: runs)"
    )
    p.add_argument("--out", help="folder of the report (default: reports/NAME)")
    p.add_argument("--baseline", help="the arm the others are measured against")
    p.add_argument(
        "--grid",
        help="price the carbon with another grid: a zone as SWE, or g CO2e per kWh; changes grams "
        "only",
    )
    p.add_argument(
        "--served", type=float, metavar="N", help="images a model will answer (default: 1,000,000)"
    )
    p.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="points of accuracy an arm may lose and still keep it (0.5)",
    )
    p.add_argument("--title", help="headline of the report")

    p = verb(
        "overview",
        runs.overview,
        "many reports at a glance: what each technique saved and cost, as Markdown",
    )
    p.add_argument(
        "folder",
        nargs="?",
        default="reports",
        help="folder in which each report has a folder (default: reports)",
    )

    p = verb(
        "export",
        models.export,
        "write a finished run's model as torch.export, ONNX, safetensors or a Hub folder, checked",
    )
    p.add_argument("run", help="the folder of a finished run, runs/RECIPE/ARM/seed0, or its id")
    p.add_argument(
        "--runs", default="runs", help="folder in which ids are looked up (default: runs)"
    )
    p.add_argument(
        "--to", required=True, metavar="FORM", help="torch.export, onnx, safetensors or hub"
    )
    p.add_argument("--out", help="the folder to make (default: exports/RECIPE-ARM-seedN)")
    p.add_argument("--trust", action="store_true")


def _model_verbs(verb: _Verb) -> None:
    """What is known of techniques and models without a run."""
    verb("techniques", models.techniques, "list the techniques, own and plugged in")
    p = verb(
        "explain", models.explain, "say what a technique does, saves and costs, and its settings"
    )
    p.add_argument("technique")
    verb("schema", models.schema, "print the JSON Schema of a recipe")

    p = verb(
        "inspect",
        models.inspect,
        "show a model's blocks, attention, MLPs, norms and heads, found by structure",
    )
    _model_options(p)
    p = verb("flops", models.flops, "count a model's MACs and FLOPs, by module, with two counters")
    _model_options(p)
    p.add_argument("--techniques", help='JSON list as in a recipe: \'[{"lora": {"rank": 8}}]\'')
    p.add_argument(
        "--data",
        help="also count 64 test images of this data set one by one: work may depend on the image",
    )

    p = verb(
        "probe",
        models.probe,
        "evaluate a saved model: linear probe, adapters, nearest neighbours, few labels, tuning",
    )
    p.add_argument(
        "run",
        help="a finished run's folder, runs/RECIPE/ARM/seed0, its id, or its arm's folder, with "
        "all seeds",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value: --set train.epochs=3",
    )
    p.add_argument(
        "--protocol", help="a file of arms to evaluate with (default: greenvis/planning/probe.yaml)"
    )
    p.add_argument("--trust", action="store_true")
    p.add_argument(
        "--runs",
        default="runs",
        help="folder of the new run records, and where an id is looked up (default: runs)",
    )
    p.add_argument("--out", help="folder of the report (default: reports/probe-RECIPE-ARM)")
    p = verb("card", models.card, "say what a saved model was made from, and what all of it cost")
    p.add_argument("file", help="a weight file of greenvis, a finished run's folder, or its id")
    p.add_argument(
        "--runs", default="runs", help="folder in which ids are looked up (default: runs)"
    )
    p = verb(
        "rank",
        planning.rank,
        "rank pretrained bases for new data without training (LogME, H-score, SFDA, PED)",
    )
    p.add_argument(
        "bases",
        nargs="+",
        metavar="BASE",
        help="a model reference, run:RECIPE/ARM (what an arm left), or its folder",
    )
    p.add_argument(
        "--data",
        required=True,
        help="a data set by name, or a recipe's file, whose data it is then",
    )
    p.add_argument(
        "--images",
        type=int,
        default=1000,
        help="training images shown to each base (default: 1000)",
    )
    p.add_argument(
        "--by", default="logme", help="logme (default), h_score, sfda or ped: the score to sort by"
    )
    p.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of bases of a library: pretrained=true",
    )
    p.add_argument("--trust", action="store_true")
    p.add_argument("--runs", default="runs", help="folder of run records (default: runs)")

    p = verb(
        "advise",
        planning.advise,
        "advise which way to train a model for new data: short trials, energy, a recipe",
    )
    _model_options(p, "also run:RECIPE/ARM (what an arm left), or its folder")
    p.add_argument(
        "--data",
        required=True,
        help="a data set by name, or a recipe's file, whose data it is then",
    )
    p.add_argument(
        "--target-accuracy",
        type=float,
        metavar="A",
        help="0 to 1: take the cheapest plan predicted to reach it",
    )
    p.add_argument(
        "--budget",
        metavar="ENERGY",
        help="the most that training and serving may take together: 5Wh, 0.2kWh, 18kJ",
    )
    p.add_argument(
        "--serve",
        type=float,
        default=1e6,
        metavar="N",
        help="images the model will answer (default: 1,000,000)",
    )
    p.add_argument("--teacher", metavar="MODEL", help="a trained model to learn from: as MODEL")
    p.add_argument(
        "--plans", help="a file of plans to weigh (default: greenvis/planning/advise.yaml)"
    )
    p.add_argument(
        "--share",
        type=float,
        default=0.25,
        help="of the training images, in the longest trial (default: 0.25)",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value: --set data.train=2000",
    )
    p.add_argument("--fresh", action="store_true", help="try again what was tried before")
    p.add_argument("--runs", default="runs", help="folder of run records (default: runs)")
    p.add_argument(
        "--out", help="the recipe to write (default: RUNS/advise-DATA-MODEL/recipe.yaml)"
    )


def _record_verbs(verb: _Verb) -> None:
    """Meters and what they recorded."""
    p = verb(
        "doctor", runs.doctor, "say where each energy figure comes from on this machine, and why"
    )
    p.add_argument(
        "--repeat",
        action="store_true",
        help="do the same work for a minute: how far it reads apart, for the bands",
    )
    p = verb(
        "track", runs.track, "meter any command and its children: greenvis track -- python train.py"
    )
    p.add_argument("--name", default="command")
    p.add_argument("--country", help="ISO-3 code of the grid, as FRA")
    p.add_argument("--dir", default="runs")
    p.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")

    p = verb("ls", runs.ls, "list recorded runs")
    p.add_argument("paths", nargs="*", default=["runs"])
    p.add_argument(
        "--where", default="", help="only runs in whose name, arm, id or status this occurs"
    )
    p.add_argument(
        "--sort",
        default="",
        help="column to sort by, - before it for descending: -energy (default: when it began)",
    )
    p.add_argument("--group", help="one row for each value of these columns: name,arm")
    p = verb("compare", runs.compare, "compare two runs figure by figure")
    p.add_argument(
        "a",
        help="a record, a folder of them, a report's folder, or a run as `greenvis ls` shows it",
    )
    p.add_argument("b", help="as A")
    p.add_argument(
        "--runs", default="runs", help="folder in which ids are looked up (default: runs)"
    )
    p = verb(
        "diff", runs.diff, "fail (exit 1) where run B costs more than run A allows: a gate for CI"
    )
    p.add_argument(
        "a",
        help="a record, a folder of them, a report's folder, or a run as `greenvis ls` shows it",
    )
    p.add_argument("b", help="as A")
    p.add_argument(
        "--runs", default="runs", help="folder in which ids are looked up (default: runs)"
    )
    p.add_argument(
        "--max-energy", default="+5%", help="the most B's energy may exceed A's (default: +5%%)"
    )
    p = verb("bench", runs.bench, "run a side-by-side benchmark")
    p.add_argument("name", nargs="?", help="which; all are listed without it")
    p.add_argument("--out", help="folder to write the benchmark's report to")
    p.add_argument(
        "--all",
        action="store_true",
        help="coverage: attach to every model timm lists, not to a sample (an hour)",
    )


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(groups[0].choices)


def _model_options(p: argparse.ArgumentParser, more: str = "") -> None:
    kinds = "timm/NAME, torchvision/NAME, hf/NAME_OR_PATH, package.module:function or file:PATH"
    p.add_argument("model", help=f"{kinds}; {more}" if more else kinds)
    p.add_argument(
        "--img-size", type=_positive, metavar="PIXELS", help="height and width of its images"
    )
    p.add_argument("--in-chans", type=_positive, metavar="N", help="channels of its images")
    p.add_argument("--num-classes", type=int, metavar="N", help="classes it tells apart")
    p.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any further option of the model",
    )
    p.add_argument("--trust", action="store_true")
