"""Training in stages: one model, one run, one stage after another; killed, it goes on in the right
one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.experiment import jobs, layers, loop, session
from greenvis.meters import labels, record
from greenvis.planning.plan import plan

RECIPE = """\
name: tiny
data: {name: digits, train: 120, test: 50}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2, drop_rate: 0.1}
train: {batch_size: 20, lr: 1.0e-2, threads: 1}
arms:
  staged:
    stages:
      - name: head
        train: {epochs: 2}
        techniques: [linear_probe]
      - {train: {epochs: 1, lr: 3.0e-3}, layers: [head, "blocks.1"]}
      - {name: low-rank, train: {epochs: 1}, techniques: [{lora: {rank: 2}}]}
  plain: {train: {epochs: 4}}
meter: {codecarbon: false}
"""


def _write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def _run(folder: Path, arm: str = "staged") -> list[record.Run]:
    return [record.read(p) for p in record.find([folder / "runs" / "tiny" / arm])]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "runs" / "tiny" / "staged" / "seed0" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    gv.run(_write(folder), runs=folder / "runs")
    return folder


def test_one_record_with_a_phase_for_each_stage(finished: Path) -> None:
    (run,) = _run(finished)
    epochs = [
        "train/head/epoch1",
        "train/head/epoch2",
        "train/stage2/epoch1",
        "train/low-rank/epoch1",
    ]
    assert [p for p in run.totals if "epoch" in p] == epochs
    assert run.sum("samples", "train") == 4 * 120
    assert run.facts["epochs"] == 4
    assert run.facts["techniques"] == [{"linear_probe": {}}, {"lora": {"rank": 2}}]
    rows = run.facts["stages"]
    assert [row["stage"] for row in rows] == ["head", "stage2", "low-rank"]
    assert (
        rows[0]["trainable_params"]
        == 16 * 10 + 10
        < rows[1]["trainable_params"]
        == run.facts["trainable_params"]
    )
    assert rows[2]["accuracy"] == run.facts["accuracy"]
    assert [line["accuracy"] for line in run.logs if "stage" in line] == [
        row["accuracy"] for row in rows
    ]
    assert [line["epoch"] for line in run.logs if "loss" in line] == [1, 2, 3, 4]
    assert not list((finished / "runs").rglob("*checkpoint*"))
    assert not list((finished / "runs").rglob("*" + jobs.BOUNDARY))


def test_each_stage_trains_its_own_layers_on_what_the_last_left(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    real = loop.Loop.fit

    def spy(self: loop.Loop, *args: Any) -> Any:
        if self.file is not None:  # else it warms up
            seen.append({n: p.detach().clone() for n, p in self.live.model.named_parameters()})
        out = real(self, *args)
        if self.file is not None:
            seen.append({n: p.detach().clone() for n, p in self.live.model.named_parameters()})
        return out

    monkeypatch.setattr(loop.Loop, "fit", spy)
    session.run(_write(tmp_path), runs=tmp_path / "runs", overrides=["arms.plain.train.epochs=0"])

    def moved(a: int, b: int) -> set[str]:
        return {n for n in seen[a] if n in seen[b] and not torch.equal(seen[a][n], seen[b][n])}

    assert moved(0, 1) == {"head.weight", "head.bias"}
    assert moved(1, 2) == set()
    assert {n.split(".")[0] for n in moved(2, 3)} == {"head", "blocks"}
    assert all(n.startswith(("head.", "blocks.1.")) for n in moved(2, 3))
    assert all("lora" in n or "head" in n for n in moved(4, 5))
    state = _weights(tmp_path)
    assert not any("lora" in n for n in state)
    assert all(torch.equal(state[n], t) for n, t in _weights(finished).items())


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "stop_at",
    [pytest.param(("head", 2), marks=pytest.mark.slow), ("stage2", 0), ("low-rank", 5)],
    ids=lambda at: at[0],
)
def test_cut_short_it_goes_on_to_the_same_weights(
    stop_at: tuple[str, int], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, count = _write(tmp_path), {"steps": 0}
    options: dict[str, Any] = {
        "runs": tmp_path / "runs",
        "overrides": ["train.checkpoint_every_s=0.0001"],
    }
    real = loop.Loop._epoch

    class Killed(BaseException):
        pass

    def stopping(self: loop.Loop) -> None:
        if self.part.phase == f"train/{stop_at[0]}":
            batches = self.part.batches

            def few(epoch: int, start: int) -> Any:
                for i, batch in enumerate(batches(epoch, start)):
                    if i == stop_at[1]:
                        raise Killed
                    count["steps"] += 1
                    yield batch

            object.__setattr__(self.part, "batches", lambda epoch, start: _Few(few, epoch, start))
        real(self)

    class _Few:
        def __init__(self, few: Any, epoch: int, start: int) -> None:
            self.args = few, epoch, start

        def __iter__(self) -> Any:
            return self.args[0](*self.args[1:])

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_epoch", stopping)
        with pytest.raises(Killed):
            session.run(path, **options)
    assert count["steps"] == stop_at[1]
    session.run(path, **options)
    assert all(torch.equal(t, _weights(finished)[n]) for n, t in _weights(tmp_path).items())
    runs = _run(tmp_path)
    assert sum(run.sum("samples", "train") or 0 for run in runs) == 4 * 120
    notes = " ".join(note for run in runs for note in run.notes)
    assert ("resumed after stage 'head'" in notes) == (stop_at[0] == "stage2")
    assert ("resumed at epoch" in notes) == (stop_at[1] > 0)


def test_another_stage_is_another_run(finished: Path) -> None:
    said: list[str] = []
    session.run(finished / "tiny.yaml", runs=finished / "runs", say=said.append)
    assert all("kept" in line for line in said)
    jobs = session.Session(finished / "runs", False, (), print).plan(
        gv.load_recipe(finished / "tiny.yaml")
    )
    changed = RECIPE.replace('[head, "blocks.1"]', "[head]")
    other = session.Session(finished / "runs", False, (), print).plan(
        gv.load_recipe(_write(finished.parent, changed))
    )
    assert jobs[0].inputs != other[0].inputs
    assert jobs[1].inputs == other[1].inputs


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            'layers: [head, "blocks.1"]',
            "layers: [blocks.9]",
            r"tiny\.yaml:11: no Module matches 'blocks\.9'; this model has",
        ),
        (
            "techniques: [linear_probe]",
            "techniques: [linear_prob]",
            r"tiny\.yaml:10: .*did you mean 'linear_probe'",
        ),
        (
            "techniques: [linear_probe]",
            "techniques: [{prompt: {tokens: 2}}]",
            r"tiny\.yaml:8: only the last stage may hold",
        ),
        (
            "train: {epochs: 2}",
            "train: {epoch: 2}",
            r"tiny\.yaml:9: .*unknown field 'epoch'; did you mean 'epochs'",
        ),
        (
            "train: {epochs: 2}",
            "train: {seeds: [2]}",
            r"tiny\.yaml:8: train\.seeds belongs to the whole arm",
        ),
        ("name: low-rank", "name: head", r"tiny\.yaml:12: a second stage is named 'head'"),
        ("    stages:", "    techniques: [bitfit]\n    stages:", r"stages or techniques, not both"),
        ("test: 50}", "test: 50, stream: {tasks: 2}}", r"stages or data\.stream, not both"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, RECIPE.replace(old, new))
    with pytest.raises(BadInput, match=says):
        session.run(path, runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.jsonl"))


def test_layers_freeze_the_others_and_their_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    live = wrap(model, layers.Layers(of=("3",)))
    assert set(live.trainable) == {"3.weight", "3.bias"}
    model.train()(torch.rand(2, 3, 4, 4))
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    live.undo()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_a_plan_adds_the_stages_up(tmp_path: Path) -> None:
    found = plan(_write(tmp_path), runs=tmp_path / "runs")
    staged, plain = (found["arms"][f"tiny/{arm}"]["flops"]["value"] for arm in ("staged", "plain"))
    assert 0.3 * plain < staged < plain


UNLABELED = """\
name: tiny
data: {name: digits, train: 80, test: 50, labels: 20, unlabeled: rest}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}
train: {batch_size: 20, threads: 1}
arms:
  staged:
    stages:
      - {name: pretext, on: unlabeled, train: {epochs: 2}, techniques: [simclr]}
      - {name: tune, train: {epochs: 3}, techniques: [linear_probe]}
meter: {codecarbon: false}
"""


def test_a_pretext_trains_on_the_images_without_a_label_and_a_stage_tunes_it(
    tmp_path: Path,
) -> None:
    gv.run(_write(tmp_path, UNLABELED), runs=tmp_path / "runs")
    (run,) = _run(tmp_path)
    assert run.sum("samples", "train/pretext") == 2 * 60
    assert run.sum("samples", "train/tune") == 3 * 20
    used = labels.counts(run.labels, run.images)
    assert used is not None
    assert used.labels == {("class", "training"): 20}
    assert used.images == {"labelled": 20, "unlabelled": 60}
    arm = plan(tmp_path / "tiny.yaml", runs=tmp_path / "planned")["arms"]["tiny/staged"]
    work = run.sum("flops", "train")
    assert arm["flops"]["value"] == pytest.approx(work, rel=0.5)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("techniques: [simclr]", "techniques: [bitfit]", "is for a pretext"),
        ("labels: 20, unlabeled: rest", "labels: 20", "set data.unlabeled"),
    ],
)
def test_what_cannot_learn_without_labels_is_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        gv.run(_write(tmp_path, UNLABELED.replace(old, new)), runs=tmp_path / "runs")
