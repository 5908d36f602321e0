"""A finished run's model out of the door: torch.export, ONNX, safetensors or a Hub folder, checked,
with its energy card."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from greenvis import models
from greenvis.core import files
from greenvis.core.attached import SETTINGS, SIZES, attached, full_state_dict
from greenvis.core.technique import logits_of
from greenvis.errors import BadInput, nearest
from greenvis.experiment.run_folder import WEIGHTS_FILE
from greenvis.meters import record
from greenvis.report import exports, results
from greenvis.report.markup import md
from greenvis.tasks import registry

FORMS = ("torch.export", "onnx", "safetensors", "hub")
FORMS_OF_TASKS = ("classification", "multilabel", "regression", "segmentation")
_TIMM_FIELDS = (
    "architecture", "input_size", "fixed_input_size", "min_input_size", "pool_size", "first_conv",
    "classifier", "num_classes"
)  # fmt: skip
TOLERANCE = 1e-4  # of the greatest absolute logit: other kernels round otherwise


def export(
    run: str | Path, to: str, out: str | Path | None = None, *, trust: bool = False
) -> dict[str, Any]:
    """Write the model that a recipe's run left, in another form.

    The exported model is loaded again and answers two images. Every form holds the names of the
    classes and how images are prepared, as this run did it. The card (README.md, Markdown with
    metadata) says what training it cost, what the weights began as, and what was done.

    Args:
        run: The folder of a finished run (runs/RECIPE/ARM/seedN).
        to: One of `FORMS`; "hub" is a folder that timm or transformers loads back.
        out: Where to; below "exports" where absent.
        trust: Allow a model whose reference imports code.

    Returns:
        "path", "to", "card" and "max_difference": the greatest absolute difference of the exported
        model's logits from the live model's; safetensors and hub give the same bits.

    Raises:
        BadInput: For a run without a model, a model the form cannot hold, or a task that is not
            answered by a tensor for a batch of images; nothing is left behind then.
    """
    folder = Path(run)
    if to not in FORMS:
        raise BadInput(f"cannot export to '{to}'{nearest(to, FORMS)}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise BadInput(
            f"{folder} holds no {WEIGHTS_FILE}: give the folder of a finished run, as "
            "runs/RECIPE/ARM/seed0"
        )
    source = f"file:{(folder / WEIGHTS_FILE).resolve()}"
    ref, options = models.origin(source)
    model = models.build(source, trust=trust).eval()
    card, facts = _card(folder)
    if facts.get("adapts"):
        raise BadInput(
            f"{', '.join(facts['adapts'])} learns while it answers, which no file holds: export a "
            "run without it, and adapt that model where it serves"
        )
    task = registry.resolve((facts.get("task") or {}).get("name", "classification"))
    if task.form not in FORMS_OF_TASKS:
        raise BadInput(
            f"task '{task.name}' is answered otherwise than by a tensor for a batch of images, "
            "which is what these forms hold: use the weight file as it is (greenvis.models.build, "
            f"'{source}')"
        )
    x = torch.rand(2, *_shape(facts), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live = logits_of(model(x))
    target = Path(out) if out is not None else Path("exports") / "-".join(folder.parts[-3:])
    with files.new_folder(target) as part:
        job = _Job(model, x, part, ref, options, facts)
        answer = _WRITERS[to](job)
        difference = (answer - live).abs().max().item()
        if difference > TOLERANCE * max(1.0, live.abs().max().item()):
            raise BadInput(
                f"the model exported to {to} answers otherwise, by {difference:.2e}: it is not "
                "written"
            )
        (part / "README.md").write_text(card + _done(job, to, difference))
    return {
        "path": str(target),
        "to": to,
        "max_difference": difference,
        "card": str(target / "README.md"),
    }


def _card(folder: Path) -> tuple[str, dict[str, Any]]:
    done = [r for r in record.readable([folder]) if r.facts.get("data")]
    if not done:
        raise BadInput(f"{folder} holds no record of how its model was made")
    comparison = results([folder])
    return exports.model_card(comparison, comparison.order[0]), done[-1].facts


def _shape(facts: dict[str, Any]) -> tuple[int, int, int]:
    side = facts["data"]["img_size"]
    return facts["data"]["in_chans"], side, side


@dataclass(frozen=True)
class _Job:
    """A model to write into `folder`, two images to try it on, where it is from and the facts of
    its run."""

    model: nn.Module
    x: Tensor
    folder: Path
    ref: str
    options: dict[str, Any]
    facts: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Any]:
        """How images were prepared (`greenvis.data.transforms.Transform`), and the names of the
        classes, None where not known."""
        data, classes = self.facts["data"], models.classes_of(self.model)
        return {
            "input_size": [data["in_chans"], data["img_size"], data["img_size"]],
            "mean": data["mean"],
            "std": data["std"],
            "resize": "shorter side, bilinear with antialiasing, then the centre",
            "pixels": "0 to 1 before mean and std",
            "labels": None if classes is None else list(classes),
        }

    @property
    def began(self) -> str:
        """What the weights were before the run."""
        model = self.facts.get("model") or {}
        pretrained = (model.get("options") or {}).get("pretrained")
        if starts := model.get("average") or [s for s in (model.get("init"),) if s]:
            names = [Path(s).name if s.startswith("file:") else s for s in starts]
            mean = "the mean of " if len(names) > 1 else ""
            return f"began as {mean}those of {', '.join(names)}"
        if not pretrained:
            return "trained from scratch by this run"
        if pretrained is not True:
            return f"began as {Path(str(pretrained)).name}, whose licence applies"
        cfg: Any = getattr(self.model, "pretrained_cfg", None) or {}
        details = ", ".join(str(cfg[k]) for k in ("hf_hub_id", "license") if cfg.get(k))
        return (
            f"began as the published weights of {self.ref}"
            + (f" ({details})" if details else "")
            + ", whose licence applies"
        )


def _done(job: _Job, to: str, difference: float) -> str:
    """Return the card's section on what was exported, and how."""
    inputs = job.inputs
    names = ", ".join(inputs["labels"] or ()) or "not known, numbered from 0"
    techniques = [next(iter(t)) for t in job.facts.get("techniques") or ()]
    channels, side, _ = inputs["input_size"]
    lines = [
        f"Form: {to}; its answers differ by at most {difference:.1e} from the model's",
        f"Model: {job.ref}; weights {job.began}",
        f"Trained with: {', '.join(techniques) or 'no technique'}; what merges is merged into the "
        "weights",
        f"Images: (batch, {channels}, {side}, {side}); {inputs['resize']}; {inputs['pixels']} "
        f"(mean {inputs['mean']}, std {inputs['std']})",
        f"Classes: {names}",
    ]
    return "\n## What was exported\n\n" + "".join(f"- {md(line)}.\n" for line in lines)


def _torch_export(job: _Job) -> Tensor:
    try:
        program = torch.export.export(
            job.model, (job.x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )
    except Exception as error:  # whatever the tracer stumbles over
        raise BadInput(
            f"torch.export cannot take {job.ref}: {str(error).splitlines()[0]}"
        ) from error
    torch.export.save(
        program, job.folder / "model.pt2", extra_files={"inputs.json": json.dumps(job.inputs)}
    )
    with torch.no_grad():
        again = torch.export.load(job.folder / "model.pt2").module()
        # another batch size than the traced one
        return torch.cat([logits_of(again(one)) for one in job.x.split(1)])


def _onnx(job: _Job) -> Tensor:
    missing = [
        n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None
    ]
    if missing:
        raise BadInput(f"export to onnx needs {', '.join(missing)}: pip install 'greenvis[onnx]'")
    import onnx
    import onnxruntime

    path = job.folder / "model.onnx"
    try:
        torch.onnx.export(
            _Logits(job.model).eval(), (job.x,), path, dynamo=True, external_data=False,
            verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
    except Exception as error:
        raise BadInput(f"ONNX cannot hold {job.ref}: {str(error).splitlines()[0]}") from error
    written = onnx.load(path)
    onnx.helper.set_model_props(
        written, {key: json.dumps(value) for key, value in job.inputs.items() if value is not None}
    )
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.cat(
        [
            torch.from_numpy(session.run(["logits"], {"images": one.numpy()})[0])
            for one in job.x.split(1)
        ]
    )


def _safetensors(job: _Job) -> Tensor:
    state = {k: v.contiguous().clone() for k, v in full_state_dict(job.model).items()}
    save_file(state, job.folder / "model.safetensors")
    (job.folder / "model.json").write_text(
        json.dumps({"ref": job.ref, "options": job.options, "inputs": job.inputs}, indent=2)
    )
    # trusted a moment ago, when the live one was built
    again = models.build(job.ref, trust=True, **job.options)
    models.load_weights(again, job.folder / "model.safetensors")
    with torch.no_grad():
        return logits_of(again.eval()(job.x))


def _hub(job: _Job) -> Tensor:
    library = job.ref.partition("/")[0]
    if head := job.options.get("head"):
        raise BadInput(
            f"{library} does not know the head '{head}', which is greenvis's own: export to "
            "safetensors"
        )
    if any(attached(job.model, group) for group in (SETTINGS, SIZES)):
        raise BadInput(
            f"{library} builds {job.ref} as it was before its structure was changed (pruned, "
            "dilated): export to safetensors"
        )
    if library == "timm":
        again = _timm_hub(job)
    elif library == "hf":
        again = _transformers_hub(job)
    else:
        raise BadInput(
            f"a Hub folder is loaded by timm or transformers; {job.ref} is neither's: export to "
            "safetensors"
        )
    with torch.no_grad():
        return logits_of(again.eval()(job.x))


def _timm_hub(job: _Job) -> nn.Module:
    """Write what timm loads: of its own configuration only what is so of these weights, for they
    are not its."""
    import timm
    from timm.models import save_for_hf

    model, inputs = cast(Any, job.model), job.inputs
    before = model.pretrained_cfg
    model.pretrained_cfg = {key: before[key] for key in _TIMM_FIELDS if key in before}
    config = {"label_names": inputs["labels"]} if inputs["labels"] else {}
    settings = {key: tuple(inputs[key]) for key in ("input_size", "mean", "std")}
    settings |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    try:
        save_for_hf(model, str(job.folder), config, safe_serialization=True, data_config=settings)
    finally:
        model.pretrained_cfg = before
    return timm.create_model(f"local-dir:{job.folder}", pretrained=True)


def _transformers_hub(job: _Job) -> nn.Module:
    """Write what transformers loads: the model with the names of its classes, and an image
    processor that does as we did."""
    from transformers import AutoModelForImageClassification, CLIPImageProcessor

    model, inputs = cast(Any, job.model), job.inputs
    if inputs["labels"]:
        model.config.id2label = dict(enumerate(inputs["labels"]))
        model.config.label2id = {name: i for i, name in enumerate(inputs["labels"])}
    model.save_pretrained(job.folder)
    channels, height, width = inputs["input_size"]
    CLIPImageProcessor(  # the one that brings the shorter side to size and crops the centre
        size={"shortest_edge": height}, crop_size={"height": height, "width": width}, resample=2,
        do_convert_rgb=channels == 3,
        image_mean=inputs["mean"], image_std=inputs["std"],
    ).save_pretrained(job.folder)  # fmt: skip
    return AutoModelForImageClassification.from_pretrained(job.folder)


class _Logits(nn.Module):
    """A model that answers with its logits alone: ONNX names one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))


_WRITERS: dict[str, Callable[[_Job], Tensor]] = {
    "torch.export": _torch_export,
    "onnx": _onnx,
    "safetensors": _safetensors,
    "hub": _hub,
}
