"""The frame of the command line: the app, and the options and the help that its verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from greenvis.errors import BadInput, nearest

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 bad input"
# what a user does, in the order of the help
EXAMPLES: dict[str, str] = {}  # a command line of each verb, by what it begins with
TRAIN, REPORT, MODELS, PLAN, MEASURE = GROUPS = "Train", "Report", "Models", "Plan", "Measure"


def option(help: str, metavar: str | None = None, name: str = "", **settings: Any) -> Any:
    """Return what makes a parameter an option.

    Args:
        help: what it is for.
        metavar: what its value is called in the help.
        name: with its dashes, where it is not the parameter's own.
        settings: further ones of `typer.Option`.
    """
    return typer.Option(*filter(None, [name]), help=help, metavar=metavar, **settings)


def argument(help: str, metavar: str | None = None, **settings: Any) -> Any:
    """Return what makes a parameter an argument: as `option`, but without a name."""
    return typer.Argument(help=help, metavar=metavar, **settings)


Json = Annotated[bool, option("print JSON for programs", name="--json")]
Runs = Annotated[str, option("folder of run records, in which ids are looked up")]
Overrides = Annotated[
    list[str] | None, option("change a value: --set train.epochs=3", "KEY=VALUE", name="--set")
]
Trust = Annotated[
    bool,
    option("allow models given as package.module:function, which runs their code", name="--trust"),
]
Model = Annotated[
    str,
    argument(
        "timm/NAME, torchvision/NAME, hf/NAME_OR_PATH, transformers/CLASS, diffusers/CLASS, "
        "package.module:function or file:PATH"
    ),
]
ImgSize = Annotated[int | None, option("height and width of its images", "PIXELS", min=1)]
InChans = Annotated[int | None, option("channels of its images", "N", min=1)]
NumClasses = Annotated[int | None, option("classes it tells apart", "N")]
ModelOptions = Annotated[
    list[str] | None, option("any further option of the model", "KEY=VALUE", name="--option")
]


class Verb(TyperCommand):
    """A command in which no option takes another's name for its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words into `ctx.params`; an option that lacks its value raises BadInput."""
        rest = super().parse_args(ctx, args)
        names = {name for param in self.get_params(ctx) for name in param.opts if name[0] == "-"}
        for param in self.get_params(ctx):
            value = ctx.params.get(param.name)
            if param.opts[0][0] == "-" and names & {*(value if type(value) is list else [value])}:
                raise BadInput(f"{param.opts[0]} lacks its value (see {ctx.command_path} --help)")
        return rest


class Verbs(TyperGroup):
    """The verbs, by what a user does."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the verb of this name. Raises BadInput with the nearest where there is none."""
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name[:1] != "-":
            raise BadInput(f"unknown command '{cmd_name}'{nearest(cmd_name, self.commands)}")
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of verbs."""
        commands: dict[str, Any] = dict(self.commands)
        within = ctx.command_path.partition(" ")[2]  # "data" of `greenvis data`
        within += " " * bool(within)
        for group in GROUPS:
            verbs = {n: c for n, c in commands.items() if c.rich_help_panel == group}
            if not verbs:
                continue
            width = max(map(len, verbs))
            with formatter.section(group):
                for name, command in verbs.items():
                    formatter.write_dl([(name.ljust(width), effect(command.help))])
                    # on one line, to be copied
                    indent = " " * (formatter.current_indent + width + 2)
                    formatter.write(f"{indent}$ {EXAMPLES[within + name]}\n")


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,  # rich takes longer to import than the help may take
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def verb(
    group: str, example: str, **settings: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a verb of the command line: its docstring is the help, its parameters are
    the options.

    Args:
        group: of `GROUPS`, under which the help lists it.
        example: a command line that works after `make demo`.
        settings: further ones of `typer.Typer.command`.

    Returns:
        A decorator that leaves the function as it is. What the function returns is the exit code;
        None is 0.
    """
    EXAMPLES[example.split()[1]] = example
    return app.command(cls=Verb, rich_help_panel=group, epilog=epilog(example), **settings)


def epilog(example: str) -> str:
    """Return what stands at the end of a verb's help."""
    return f"example: {example}\n\n{EXIT_CODES}"


def effect(text: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((text or "").partition("\n\n")[0].split())
