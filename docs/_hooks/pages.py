"""Pages and parts of pages that nobody writes by hand: made from the package, its catalogue of
techniques and the committed reports."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import greenvis
from greenvis.core import yamlfile
from greenvis.data.dataset import DOOR as DATA_SETS
from greenvis.meters.labels import KINDS, SECONDS
from greenvis.report.markup import code, md
from greenvis.report.overview import HEAD, markdown, overview
from greenvis.techniques import registry

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STAGES = {
    "data": "Data: which images, from where",
    "annotation": "Annotation: fewer labels, weaker labels",
    "inference": "Inference: cheaper answers",
    "iteration": "Iteration: adapting and going on",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPICAL = {  # columns of the overview, in words for the guide
    "energy to train, base and teacher included": "base and teacher included",
    "own share": "own training",
    "energy of an image": "per image",
}
NOT_MEASURED = (
    "Not measured: no committed report holds an arm that has this technique alone more than its "
    "baseline, so its distance to the frontier of plain training is not known."
)


def techniques() -> dict[str, str]:
    """Return the first paragraph of each technique's documentation."""
    docs = {name: registry.about(name)["doc"] for name in registry.names()}
    return {name: _line(doc.partition("\n\n")[0]) for name, doc in docs.items()}


def survey_stage(name: str) -> str:
    """Return the stage of the survey, a key of `STAGES`, under which a technique stands."""
    return registry.DOOR.own[name].split(".")[2]


def technique_list() -> str:
    """Return what each technique does, by stage of the survey."""
    about, lines = techniques(), []
    for stage, title in STAGES.items():
        lines += [f"## {title}", "", "| technique | what it does |", "|---|---|"]
        lines += [
            f"| [`{name}`]({name}.md) | {does} |"
            for name, does in about.items()
            if survey_stage(name) == stage
        ]
        lines.append("")
    return "\n".join(lines)


@cache
def summary() -> dict[str, Any]:
    """Return the overview of the committed reports."""
    return overview(ROOT / "reports")


def measured() -> str:
    """Return the overview of the committed reports, as Markdown with links from docs/."""
    return markdown(summary(), beside=DOCS)


def measured_of(name: str) -> list[dict[str, str]]:
    """Return the rows of the overview that are about one technique."""
    return [row for row in summary()["techniques"] if row["technique"] == name]


def typical(*names: str) -> str:
    """Return in a line what the committed reports measured of techniques: the median of arms'
    means beside the least and the most."""
    rows = [row for name in names for row in measured_of(name)]
    if not rows:
        return "not measured"
    parts = []
    for column, head in TYPICAL.items():
        ratios = [float(m[1]) for row in rows if (m := re.search(r"×([\d.]+)", row[column]))]
        if ratios:
            spread = f" (×{min(ratios):.3g} to ×{max(ratios):.3g})" if len(ratios) > 1 else ""
            parts.append(f"{head} ×{statistics.median(ratios):.3g}{spread}")
    reports = len({row["measured in"] for row in rows})
    arms = f"{len(rows)} arm{'s'[: len(rows) > 1]} of {reports} report{'s'[: reports > 1]}"
    unknown = sum("not known" in row["energy to train, base and teacher included"] for row in rows)
    lacking = f", in {unknown} a base's or teacher's cost is not known" if unknown else ""
    return f"{'; '.join(parts)}; {arms}{lacking}" if parts else f"seconds only; {arms}"


def card(name: str) -> str:
    """Return the method card of a technique: what it is, its settings, where it fits, what was
    measured, which recipes use it."""
    about, cls = registry.about(name), registry.find(name)
    effect, _, rest = about["doc"].partition("\n\n")
    where = "weights" if about["stage"] == "weights" else about["stage"]
    settings = about["schema"].get("properties", {})
    lines = [
        f"# {name}",
        "",
        f"**{_line(effect)}**",
        "",
        f"In a recipe `techniques: [{name}]`, in a loop `gv.{cls.__name__}(…)` "
        f"([reference](../reference/techniques.md#greenvis.{cls.__name__})), in a terminal "
        f"`greenvis explain {name}`. {STAGES[survey_stage(name)].partition(':')[0]}; it is put on "
        f"a model in the order of its stage, {where}.",
        "",
        _prose(rest),
        "",
        "## Settings",
        "",
        *_settings(settings),
        "",
        "## What it goes with",
        "",
        f"Tasks: {_words(cls.tasks, 'all')}. Needs unchanged: {_words(cls.needs)}. Changes: "
        f"{_words(cls.breaks)}."
        + " Techniques that contradict each other are refused, with the reason.",
        "",
        "## What was measured",
        "",
    ]
    rows = measured_of(name)
    if rows:
        own = {"techniques": rows, "reports": []}
        table = markdown(own, DOCS / "techniques", [k for k in HEAD if k != "technique"])
        lines += [table.strip()]
    else:
        lines += [NOT_MEASURED]
    lines += ["", "## Recipes", ""]
    lines += [f"- `greenvis run {path}`" for path in recipes_with(name)] or ["None has it yet."]
    return "\n".join(lines) + "\n"


@cache
def _recipes() -> dict[str, set[str]]:
    """Return which techniques each recipe names, by its path."""
    known = set(registry.names())
    return {
        path.relative_to(ROOT).as_posix(): _named(yamlfile.parse(path.read_text(), path.name))
        & known
        for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    }


def _named(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return {str(k) for k in value} | {n for v in value.values() for n in _named(v)}
    if isinstance(value, list):
        return {n for item in value for n in _named(item)}
    return {value} if isinstance(value, str) else set()


def recipes_with(name: str) -> list[str]:
    """Return the recipes that use a technique."""
    return [path for path, names in _recipes().items() if name in names]


def data_table() -> str:
    """Return the data sets that recipes can name, as their classes say."""
    lines = ["| name | source | licence | images |", "|---|---|---|---|"]
    for name in DATA_SETS.names():
        cls = DATA_SETS.find(name)
        form = f"{name}:{cls.argument}" if cls.argument else name
        size = ", ".join(f"{n:,} {split}" for split, n in cls.size.items()) or "as the files have"
        source = re.sub(r"(https://[^\s,)]+)", r"<\1>", md(cls.source).replace("\\", ""))
        lines.append(f"| `{form}` | {source} | {md(cls.licence)} | {size} |")
    return "\n".join(lines) + "\n"


def seconds_table() -> str:
    """Return what a label of each kind takes a person."""
    table = json.loads(SECONDS.read_text())
    lines = ["| label | seconds, central (low–high) | source |", "|---|---|---|"]
    for kind in KINDS:
        s = table[kind]
        lines.append(
            f"| {kind} | {s['central']:g} ({s['low']:g}–{s['high']:g}) | {md(s['source'])} |"
        )
    return "\n".join(lines) + "\n"


def extending() -> str:
    """Return how each door is used: the sections of CONTRIBUTING.md about them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sections = re.findall(r"^## A .*?(?=^## )", text, re.M | re.S)
    return (
        "# Extending\n\nFive doors, all alike: techniques, data sets, meter sources, tasks and "
        "report sections are classes with a name, found in a folder of greenvis or through an "
        "entry point of your package. One file each, held to a contract by a function of "
        "`greenvis.testing`.\n\n" + "".join(sections)
    )


def commands() -> str:
    """Return every command with its options, by what they are for."""
    import typer

    from greenvis.cli.app import GROUPS
    from greenvis.cli.main import app

    root: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "`greenvis --install-completion` teaches them to your shell.", ""]
    for group in GROUPS:
        lines += [f"## {group}", ""]
        for name, command in root.commands.items():
            if command.rich_help_panel == group:
                lines += _command(name, command)
    return "\n".join(lines)


def _command(name: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children:
        for child, verb in children.items():
            yield from _command(f"{name} {child}", verb)
        return
    from greenvis.cli.app import EXAMPLES

    effect, _, rest = (command.help or "").partition("\n\n")
    yield from [f"### greenvis {name}", "", f"{_line(effect)[:1].upper()}{_line(effect)[1:]}.", ""]
    if rest:
        yield from [_line(rest), ""]
    if name in EXAMPLES:
        yield from ["```sh", EXAMPLES[name], "```", ""]
    yield from ["| option | what | default |", "|---|---|---|"]
    for param in command.params:
        if param.name == "help":
            continue
        form = ", ".join(param.opts) if param.opts[0][0] == "-" else (param.metavar or param.name)
        default = "" if param.default in (None, False) or callable(param.default) else param.default
        shown = f"`{default}`" if default not in ("", ()) else ""
        yield f"| `{form}` | {_text(getattr(param, 'help', '') or '')} | {shown} |"
    yield ""


def recipe_fields() -> str:
    """Return every field of a recipe, by section."""
    from greenvis.experiment.recipe import schema

    form = schema()
    lines = [
        "# Recipes, field by field",
        "",
        "All but `name`, `data`, `model` and `arms` may be left out. `greenvis schema` prints this "
        "as JSON Schema, for editors. Techniques' settings are on [their cards](../techniques/"
        "index.md).",
        "",
        "## The recipe",
        "",
        *_settings(form["properties"]),
        "",
    ]
    for name, part in form["$defs"].items():
        if ":" in name or not part.get("properties"):
            continue
        lines += [f"## {name}", "", _line(part.get("description", "")), ""]
        lines += [*_settings(part["properties"]), ""]
    lines += ["## Tasks", "", "| `task:` | what is answered |", "|---|---|"]
    for name, part in form["$defs"].items():
        if name.startswith("task:"):
            lines.append(
                f"| `{name[5:]}` | {md(_line(part['description'].partition('Example:')[0]))} |"
            )
    return "\n".join(lines) + "\n"


PUBLIC = {
    "Around a loop": ["wrap", "Wrapped", "track", "fold_norms", "fuse"],
    "Recipes and reports": ["run", "load_recipe", "report"],
    "Writing a technique": ["Technique", "Installed"],
    "Errors": ["GreenvisError", "BadInput"],
}
MORE = {
    "Trainers of other libraries": [
        "greenvis.integrations.transformers.GreenTrainer",
        "greenvis.integrations.lightning.GreenCallback",
        "greenvis.integrations.accelerate.GreenAccelerator",
    ],
    "What a tracker offers": ["greenvis.meters.track.Tracker", "greenvis.meters.record.Reading"],
    "Models by reference": [
        "greenvis.models.build",
        "greenvis.models.save",
        "greenvis.models.load_weights",
    ],
    "The other doors": [
        "greenvis.tasks.base.Task",
        "greenvis.data.dataset.DataSet",
        "greenvis.meters.sources.MeterSource",
        "greenvis.report.section.Section",
    ],
    "Contracts for plug-ins": [
        f"greenvis.testing.check_{kind}"
        for kind in ("technique", "together", "task", "dataset", "meter_source", "section")
    ],
    "Results of a report": ["greenvis.report.results", "greenvis.report.shape.Results"],
}
INHERITS = ("greenvis.Wrapped",)  # its methods are written in several files
HOMES = {"report": "greenvis.report.report"}  # a package has that name, too


def public_functions() -> str:
    """Return the reference of what `greenvis.__all__` names beside techniques."""
    lines = ["# Functions and classes", "", "`import greenvis as gv`", ""]
    for title, names in PUBLIC.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _reference(HOMES.get(name, f"greenvis.{name}"), f"greenvis.{name}")
    for title, names in MORE.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _reference(name, name)
    return "\n".join(lines)


def public_techniques() -> str:
    """Return the reference of the techniques that `greenvis.__all__` names."""
    others = {name for names in PUBLIC.values() for name in names}
    lines = [
        "# Techniques",
        "",
        "Fields are the constructor's keyword arguments and a recipe's settings; bounds and "
        "defaults are on each technique's card.",
        "",
    ]
    for name in greenvis.__all__:
        if name not in others:
            lines += _reference(f"greenvis.{name}", f"greenvis.{name}", members=False)
    return "\n".join(lines)


def _reference(path: str, heading: str, members: bool = True) -> list[str]:
    lines = [f"::: {path}", "    options:", f"      heading: {heading}"]
    if not members:
        lines.append("      members: false")
    if heading in INHERITS:
        lines.append("      inherited_members: true")
    anchor = [f'<a id="{heading}"></a>', ""] if path != heading else []
    return [*anchor, *lines, ""]


def _settings(properties: Mapping[str, Any]) -> list[str]:
    if not properties:
        return ["None."]
    lines = ["| field | default | type | what |", "|---|---|---|---|"]
    for name, field in properties.items():
        default = (
            f"`{json.dumps(field['default'], ensure_ascii=False)}`"
            if "default" in field
            else "required"
        )
        if len(default) > 40:
            default = "see its section"
        what = _text(field.get("description", ""))
        lines.append(f"| `{name}` | {default} | {_type(field)} | {what} |")
    return lines


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if choices := field.get("anyOf") or field.get("oneOf"):
        kinds = list(dict.fromkeys(_type(choice) for choice in choices))
        return " or ".join(kind for kind in kinds if kind)
    if "allOf" in field:
        return _type(field["allOf"][0])
    kind = str(field.get("type", "any"))
    if kind == "array" and isinstance(field.get("items"), Mapping):
        return f"list of {_type(field['items'])}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _prose(doc: str) -> str:
    """Return a docstring's paragraphs as Markdown, its examples as code."""
    out, code = [], False
    for line in doc.splitlines():
        if line.strip() == "Example:":
            out += ["", "## Example", ""]
            continue
        if line.startswith("    ") and out and (code or line.strip().startswith(">>>")):
            if not code:
                out.append("```pycon")
                code = True
            out.append(line[4:])
            continue
        if code and line.strip():
            out += ["```", ""]
            code = False
        if line or not code:
            out.append(line.replace("][", "]\\["))  # no link
    return "\n".join(out + (["```"] if code else []))


def _words(names: Any, without: str = "nothing") -> str:
    """Return names in words. names: None where there are none; a property where settings decide."""
    if isinstance(names, property):
        return "as its settings are"
    return ", ".join(sorted(name.replace("_", " ") for name in names or ())) or without


def _text(plain: str) -> str:
    """Return text as Markdown, what stands between backticks as code."""
    parts = plain.split("`")
    if len(parts) % 2 == 0:  # one has no other
        return md(plain)
    return "".join(code(part) if i % 2 else md(part) for i, part in enumerate(parts))


def _line(text: str) -> str:
    return " ".join(text.split())
