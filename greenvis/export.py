"""A finished run's model out of the door: torch.export, ONNX, safetensors or a Hub folder, checked, with its energy card."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from greenvis import models, record
from greenvis.errors import BadInput, nearest
from greenvis.jobs import WEIGHTS_FILE
from greenvis.report import exports, results
from greenvis.technique import logits_of

FORMS = ("torch.export", "onnx", "safetensors", "hub")
TOLERANCE = 1e-4  # of the greatest absolute logit: other kernels round otherwise


def export(run: str | Path, to: str, out: str | Path | None = None, *, trust: bool = False) -> dict[str, Any]:
    """Write the model that a recipe's run left, in another form, and return {"path", "max_difference", "card"}.

    run: the folder of a finished run (runs/RECIPE/ARM/seedN). to: one of `FORMS`; "hub" is a folder that timm or
    transformers loads back. The exported model is loaded again and answers two images: max_difference is the greatest
    absolute difference of its logits from the live model's; safetensors and hub give the same bits. The card
    (README.md, Markdown with metadata) says what training it cost. Raises BadInput for a run without a model or a
    model the form cannot hold; nothing is left behind then.
    """
    folder = Path(run)
    if to not in FORMS:
        raise BadInput(f"cannot export to '{to}'{nearest(to, FORMS)}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise BadInput(f"{folder} holds no {WEIGHTS_FILE}: give the folder of a finished run, as runs/RECIPE/ARM/seed0")
    place = f"file:{(folder / WEIGHTS_FILE).resolve()}"
    ref, options = models.origin(place)
    model = models.build(place, trust=trust).eval()
    card, facts = _card(folder)
    x = torch.rand(2, *_shape(facts), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live = logits_of(model(x))
    target = Path(out) if out is not None else Path("exports") / "-".join(folder.parts[-3:])
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        answer = _WRITERS[to](_Job(model, x, part, ref, options, facts["data"]))
        difference = (answer - live).abs().max().item()
        if difference > TOLERANCE * max(1.0, live.abs().max().item()):
            raise BadInput(f"the model exported to {to} answers otherwise, by {difference:.2e}: it is not written")
        (part / "README.md").write_text(card)
        part.chmod(0o755)
        if target.exists():
            raise BadInput(f"{target} is there already; remove it, or choose another --out")
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {"path": str(target), "to": to, "max_difference": difference, "card": str(target / "README.md")}


def _card(folder: Path) -> tuple[str, dict[str, Any]]:
    paths = record.find([folder])
    runs = [record.read(p) for p in paths]
    done = [r for r in runs if r.facts.get("data")]
    if not done:
        raise BadInput(f"{folder} holds no record of how its model was made")
    found = results([folder])
    return exports.model_card(found, found["order"][0]), done[-1].facts


def _shape(facts: dict[str, Any]) -> tuple[int, int, int]:
    side = facts["data"]["img_size"]
    return facts["data"]["in_chans"], side, side


@dataclass(frozen=True)
class _Job:
    """A model to write into `folder`, two images to try it on, where it is from and what images it knows."""

    model: nn.Module
    x: Tensor
    folder: Path
    ref: str
    options: dict[str, Any]
    data: dict[str, Any]


def _torch_export(job: _Job) -> Tensor:
    try:
        program = torch.export.export(job.model, (job.x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    except Exception as error:  # whatever the tracer stumbles over
        raise BadInput(f"torch.export cannot take {job.ref}: {str(error).splitlines()[0]}") from error
    torch.export.save(program, job.folder / "model.pt2")
    with torch.no_grad():
        again = torch.export.load(job.folder / "model.pt2").module()
        return torch.cat([logits_of(again(one)) for one in job.x.split(1)])  # another batch size than the traced one


def _onnx(job: _Job) -> Tensor:
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if missing:
        raise BadInput(f"export to onnx needs {', '.join(missing)}: pip install 'greenvis[onnx]'")
    import onnxruntime

    path = job.folder / "model.onnx"
    try:
        torch.onnx.export(
            _Logits(job.model).eval(), (job.x,), path, dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )  # fmt: skip
    except Exception as error:
        raise BadInput(f"ONNX cannot hold {job.ref}: {str(error).splitlines()[0]}") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(["logits"], {"images": one.numpy()})[0]) for one in job.x.split(1)])


def _safetensors(job: _Job) -> Tensor:
    state = {k: v.contiguous().clone() for k, v in job.model.state_dict().items()}
    save_file(state, job.folder / "model.safetensors")
    (job.folder / "model.json").write_text(json.dumps({"ref": job.ref, "options": job.options}, indent=2))
    again = models.build(job.ref, trust=True, **job.options)  # trusted a moment ago, when the live one was built
    models.load_weights(again, job.folder / "model.safetensors")
    with torch.no_grad():
        return logits_of(again.eval()(job.x))


def _hub(job: _Job) -> Tensor:
    library = job.ref.partition("/")[0]
    if library == "timm":
        import timm
        from timm.models import save_for_hf

        seen = {"input_size": tuple(job.x.shape[1:]), "mean": tuple(job.data["mean"]), "std": tuple(job.data["std"])}
        save_for_hf(job.model, str(job.folder), safe_serialization=True, data_config=seen)
        again: nn.Module = timm.create_model(f"local-dir:{job.folder}", pretrained=True)
    elif library == "hf":
        from transformers import AutoModelForImageClassification

        cast(Any, job.model).save_pretrained(job.folder)
        again = AutoModelForImageClassification.from_pretrained(job.folder)
    else:
        raise BadInput(f"a Hub folder is loaded by timm or transformers; {job.ref} is neither's: export to safetensors")
    with torch.no_grad():
        return logits_of(again.eval()(job.x))


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
