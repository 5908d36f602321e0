"""Commands about techniques and models: `techniques`, `explain`, `schema`, `inspect`, `flops`,
`probe`, `card`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from greenvis.cli import app
from greenvis.cli.app import argument, effect, option, verb
from greenvis.cli.output import (
    answer,
    json_text,
    left_by,
    model_options,
    print_rows,
    reported,
    teller,
    write,
    write_block,
)


def _names(incomplete: str) -> list[str]:
    """Return the techniques that a shell may complete a word to."""
    from greenvis.techniques import registry

    return [name for name in registry.names() if name.startswith(incomplete)]


@verb(app.MODELS, "greenvis techniques")
def techniques(as_json: app.Json = False) -> None:
    """list the techniques, own and plugged in"""
    from greenvis.techniques import registry

    about = {name: registry.about(name) for name in registry.names()}
    rows = [{"name": n, "stage": a["stage"], "does": effect(a["doc"])} for n, a in about.items()]
    answer(as_json, rows, lambda: print_rows(rows, "techniques"))


@verb(app.MODELS, "greenvis explain lora")
def explain(
    technique: Annotated[
        str, argument("its name, as `greenvis techniques` has it", autocompletion=_names)
    ],
    as_json: app.Json = False,
) -> None:
    """say what a technique does, saves and costs, and its settings"""
    from greenvis.techniques import registry

    about = registry.about(technique)
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
        write_block(f"{technique} (stage {about['stage']})\n\n{about['doc']}")
        print()
        print_rows(
            [{**r, "type": r["type"] if isinstance(r["type"], str) else "several"} for r in rows],
            "settings",
        )

    answer(as_json, {"name": technique, **about}, show)


@verb(app.MODELS, "greenvis schema")
def schema(as_json: app.Json = False) -> None:
    """print the JSON Schema of a recipe"""
    from greenvis.experiment.recipe import schema

    form = schema()
    answer(as_json, form, lambda: print(json_text(form, indent=2)))


@verb(app.MODELS, "greenvis inspect timm/resnet18")
def inspect(
    model: app.Model,
    img_size: app.ImgSize = None,
    in_chans: app.InChans = None,
    num_classes: app.NumClasses = None,
    options: app.ModelOptions = None,
    trust: app.Trust = False,
    as_json: app.Json = False,
) -> None:
    """show a model's blocks, attention, MLPs, norms and heads, found by structure"""
    from greenvis.models.structure import view
    from greenvis.models.structure.summary import describe

    sizes = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}
    built, x = _built(model, trust, model_options(options, **sizes))
    rows = [{"part": part, "found": value} for part, value in describe(view(built, x))]
    answer(as_json, rows, lambda: print_rows(rows, model))


@verb(app.MODELS, "greenvis flops timm/resnet50 --img-size 64")
def flops(
    model: app.Model,
    img_size: app.ImgSize = None,
    in_chans: app.InChans = None,
    num_classes: app.NumClasses = None,
    options: app.ModelOptions = None,
    trust: app.Trust = False,
    techniques: Annotated[
        str | None, option('list as in a recipe: \'[{"lora": {"rank": 8}}]\'', "JSON")
    ] = None,
    data: Annotated[
        str | None,
        option(
            "also count 64 test images of this data set one by one: work may depend on the image",
            "NAME",
        ),
    ] = None,
    as_json: app.Json = False,
) -> None:
    """count a model's MACs and FLOPs, by module, with two counters"""
    from greenvis import data as datasets
    from greenvis.core.wrap import wrap
    from greenvis.experiment.recipe import parse_techniques
    from greenvis.meters import flops

    sizes = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}
    built, x = _built(model, trust, model_options(options, **sizes))
    if techniques:
        wrap(built, [t.for_images(tuple(x.shape[1:])) for t in parse_techniques(techniques)])
    count = flops.count(built, x, train=True)
    out = count.as_dict()
    if data:
        form = {"img_size": x.shape[-1], "in_chans": x.shape[1]}
        images = datasets.load(datasets.DataSpec(name=data, test=64, **form)).test
        out["distribution"] = flops.distribution(built, [images.batch(range(len(images)))[0]])
    elif count.with_data:
        out["notes"].append(
            "the work may depend on the image: --data NAME counts real ones, one by one"
        )

    def show() -> None:
        print_rows(
            [{"module": k, "MMACs": f"{v / 1e6:,.2f}"} for k, v in out["by_module"].items()], model
        )
        forward = f"{out['macs'] / 1e9:.4g} GMACs, {out['flops'] / 1e9:.4g} GFLOPs"
        write(f"forward {forward}; training step {out['train_flops'] / 1e9:.4g} GFLOPs")
        write(f"counters: {out['counters']}; not counted: {out['unhandled'] or 'nothing'}")
        if spread := out.get("distribution"):
            write("MACs per image: " + ", ".join(f"{k} {v:.4g}" for k, v in spread.items()))
        for note in out["notes"]:
            write(f"note: {note}")

    answer(as_json, out, show)


@verb(app.MODELS, "greenvis probe runs/quickstart/lora/seed0")
def probe(
    run: Annotated[
        str,
        argument(
            "a finished run's folder, runs/RECIPE/ARM/seed0, its id, or its arm's folder, "
            "with all seeds"
        ),
    ],
    overrides: app.Overrides = None,
    protocol: Annotated[
        str | None,
        option("arms to evaluate with, in a file like greenvis/planning/probe.yaml", "FILE"),
    ] = None,
    trust: app.Trust = False,
    runs: app.Runs = "runs",
    out: Annotated[
        str | None, option("folder of the report (default: reports/probe-RECIPE-ARM)")
    ] = None,
    as_json: app.Json = False,
) -> None:
    """evaluate a saved model: linear probe, adapters, nearest neighbours, few labels, tuning"""
    from greenvis.planning import probe as probing
    from greenvis.report import report

    folder, recipe = probing.probe(
        left_by(run, runs),
        protocol=protocol or probing.PROTOCOL,
        overrides=overrides or (),
        runs=runs,
        trust=trust,
        say=teller(as_json),
    )
    page = report(
        [folder],
        out=out or Path("reports") / recipe.name,
        baseline=recipe.baseline,
        title=recipe.report.title,
        note=recipe.report.note,
    )
    reported(as_json, page)


@verb(app.MODELS, "greenvis card runs/quickstart/lora/seed0")
def card(
    file: Annotated[str, argument("a weight file of greenvis, a finished run's folder, or its id")],
    runs: app.Runs = "runs",
    as_json: app.Json = False,
) -> None:
    """say what a saved model was made from, and what all of it cost"""
    from greenvis.experiment import lineage
    from greenvis.report.formatting import gain, si
    from greenvis.report.measures import written
    from greenvis.tasks.base import Measure

    content = lineage.read_card(left_by(file, runs))

    def cost(energy: dict[str, Any]) -> str:
        if energy["value"] is None:
            return "cost not known"
        return (
            f"{si(energy['value'], 'J')} ({si(energy['low'], 'J')} – {si(energy['high'], 'J')}, "
            f"{energy['provenance']})"
        )

    def show() -> None:
        data = content.get("data") or {}
        metric = dict(content["metric"])
        value, measure = metric.pop("value"), Measure(**metric)
        write(f"{content['file']}: {content['ref']}")
        write(f"data: {data.get('name', 'unknown')}, {data.get('train', '?')} training images")
        write(f"{written(measure)}: {'unknown' if value is None else gain(measure, value)}")
        for depth, role, entry in lineage.tree(content):
            seed = "" if entry["seed"] is None else f", seed {entry['seed']}"
            write(
                f"{'  ' * depth}{role + ' ' if role else ''}{entry['name']}{seed}: "
                f"{cost(entry['energy_j'])}"
            )
        write(f"with all it was made from: {cost(content['total_j'])}")
        write_block(f"\nits recipe:\n\n{content.get('recipe', '')}")

    answer(as_json, content, show)


@verb(app.MODELS, "greenvis export runs/quickstart/lora/seed0 --to safetensors")
def export(
    run: Annotated[str, argument("the folder of a finished run, runs/RECIPE/ARM/seed0, or its id")],
    to: Annotated[str, option("torch.export, onnx, safetensors or hub", "FORM")],
    runs: app.Runs = "runs",
    out: Annotated[str | None, option("folder to make (default: exports/RECIPE-ARM-seedN)")] = None,
    trust: app.Trust = False,
    as_json: app.Json = False,
) -> None:
    """write a finished run's model as torch.export, ONNX, safetensors or a Hub folder, checked"""
    from greenvis.integrations.export import export

    exported = export(left_by(run, runs), to, out, trust=trust)

    def show() -> None:
        write(
            f"{exported['path']}: {exported['to']}; greatest difference from the live model "
            f"{exported['max_difference']:.1e}"
        )

    answer(as_json, exported, show)


def _built(model: str, trust: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model, and an image batch of the size asked for: many take images of any, and are
    built for none."""
    from greenvis import models
    from greenvis.models import structure

    built = models.build(model, trust=trust, **options).eval()
    return built, structure.example_input(built, size=options.get("img_size"))
