"""Streams of tasks: who is in which task, what heads hide, the matrix, and resuming in the middle
of the stream."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import interrupted
import pytest
import torch
import torch.nn.functional as F
from forked import greenvis
from own_parts import Own, of_stream
from safetensors.torch import load_file
from torch import nn

import greenvis as gv
from greenvis import data
from greenvis.data import streams
from greenvis.errors import BadInput
from greenvis.experiment import loop, session
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters import record
from greenvis.tasks.classification import Classification

RECIPE = """\
name: tiny
data: {name: digits, train: 160, test: 100, stream: {kind: class, tasks: 5}}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}
train: {epochs: 2, batch_size: 20, lr: 3.0e-3, threads: 1, checkpoint_every_s: 0.02}
arms:
  plain: {}
  er: {techniques: [{replay: {size: 30, batch_size: 4}}]}
  told: {stream: {kind: task, tasks: 3}}
  free: {stream: {kind: free, head: growing}}
  turned: {stream: {kind: domain, tasks: 3}}
  cumulative: {stream: {train_on: seen, restart: true}}
  joint: {stream: {train_on: all}}
meter: {codecarbon: false}
"""


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load(data.DataSpec(name="digits", train=400, test=100))


def _write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["class", "task"])
def test_classes_are_dealt_out_once_and_no_image_twice(digits: data.Data, kind: Any) -> None:
    made = streams.make(digits, kind=kind, tasks=4, seed=3)
    assert sorted(c for task in made.experiences for c in task.classes) == list(range(10))
    assert [len(task.classes) for task in made.experiences] == [3, 3, 2, 2]
    assert [task.known for task in made.experiences] == [kind == "task"] * 4
    ids = torch.cat([images.ids for images in made.train])
    assert sorted(ids.tolist()) == sorted(digits.train.ids.tolist())
    for task, images, (classes, test) in zip(made.experiences, made.train, made.tests, strict=True):
        assert (
            set(images.targets.tolist())
            == set(test.targets.tolist())
            == set(task.classes)
            == set(classes)
        )
    assert made.experiences[-1].classes_so_far == tuple(
        c for task in made.experiences for c in task.classes
    )
    assert made.head == ("multi" if kind == "task" else "single")


def test_order_is_the_seeds_or_as_given(digits: data.Data) -> None:
    given = streams.make(digits, order="given")
    assert [task.classes for task in given.experiences] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    a, b, c = (streams.make(digits, seed=s) for s in (1, 1, 2))
    assert [t.classes for t in a.experiences] == [t.classes for t in b.experiences]
    assert [t.classes for t in a.experiences] != [t.classes for t in c.experiences]


def test_a_free_stream_keeps_every_image_and_blurs_the_borders(digits: data.Data) -> None:
    sharp = streams.make(digits, kind="free", blur=0.0, order="given")
    soft = streams.make(digits, kind="free", blur=1.0, order="given")
    assert not sharp.has_task_boundaries
    for made in (sharp, soft):
        ids = torch.cat([images.ids for images in made.train])
        assert sorted(ids.tolist()) == sorted(digits.train.ids.tolist())
    assert all(len(images.targets.unique()) <= 4 for images in sharp.train)
    assert (
        sum(
            len(a.targets.unique()) > len(b.targets.unique())
            for a, b in zip(soft.train, sharp.train, strict=True)
        )
        >= 4
    )


def test_domains_turn_or_permute_the_same_images(digits: data.Data) -> None:
    turned = streams.make(digits, kind="domain", tasks=2, order="given")
    x, y = turned.train[1].batch([0, 5])
    plain, labels = digits.train.batch([0, 5])
    assert torch.equal(y, labels)
    assert torch.allclose(
        x, plain.rot90(1, (2, 3)), atol=1e-4
    )  # half of a half turn, counter-clockwise
    permuted = streams.make(digits, kind="domain", domain="permute", tasks=3)
    assert torch.equal(permuted.train[0].batch([3])[0], digits.train.batch([3])[0])
    one, other = (permuted.train[t].batch([3])[0].flatten() for t in (1, 2))
    assert torch.equal(one.sort().values, other.sort().values)
    assert not torch.equal(one, other)
    test, same = (
        images.batch([0])[0].flatten().sort().values
        for images in (permuted.tests[1][1], digits.test)
    )
    assert torch.equal(test, same)
    assert (
        len({str(images.key()) for images in (*turned.train, *permuted.train)}) == 4
    )  # the unturned and unpermuted are one


def test_cumulative_and_joint_hold_all_they_should(digits: data.Data) -> None:
    seen = streams.make(digits, train_on="seen")
    assert [len(images) for images in seen.train] == [
        sum(len(i) for i in streams.make(digits).train[: t + 1]) for t in range(5)
    ]
    joint = streams.make(digits, train_on="all")
    assert (len(joint.experiences), len(joint.tests), len(joint.train[0])) == (1, 5, 400)
    x, y = joint.train[0].batch([0, 399, 7])
    ids = joint.train[0].ids[[0, 399, 7]]
    rows = [digits.train.ids.tolist().index(i) for i in ids.tolist()]
    assert torch.equal(x, digits.train.batch(rows)[0])
    assert torch.equal(y, digits.train.targets[rows])
    part = joint.train[0].take([1, 399])
    assert part.ids.tolist() == joint.train[0].ids[[1, 399]].tolist()


def test_heads_hide_what_does_not_compete(digits: data.Data) -> None:
    logits, y = torch.randn(3, 10), torch.tensor([2, 3, 0])
    shown = {
        h: ~streams.make(digits, order="given", head=h).masked(1, logits, y).isinf()
        for h in ("single", "growing", "multi")
    }
    assert shown["single"].all()
    assert shown["growing"].tolist() == [[True] * 4 + [False] * 6] * 3
    assert shown["multi"].nonzero().tolist() == [
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
        [2, 0],
        [2, 1],
    ]  # a replayed 0: its own task's


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks: 5", "tasks: 12", "12 tasks need as many classes, and the data has 10"),
        (
            "kind: class",
            "kind: clas",
            "data.stream.kind: input should be 'class', 'domain', 'task' or 'free'",
        ),
        ("{kind: domain, tasks: 3}", "{kind: domain, head: multi}", "share their classes"),
        ("lr: 3.0e-3", "lr: 3.0e-3, target: 0.5", "leave it out"),
        ("lr: 3.0e-3", "lr: 3.0e-3, label_smoothing: 0.1", "a multi head hides"),
        (", stream: {kind: class, tasks: 5}", "", "data.stream is missing"),
    ],
)
def test_what_cannot_be_a_stream_is_refused_before_anything_is_written(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = _write(tmp_path, RECIPE.replace(old, new))
    with pytest.raises(BadInput, match=message):
        session.run(path, runs=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    session.run(_write(folder), runs=folder / "runs")
    return folder


def test_every_arm_leaves_its_matrix(finished: Path) -> None:
    runs = {
        r.header["arm"]: r for r in (record.read(path) for path in record.find([finished / "runs"]))
    }
    for arm, tasks in (
        ("plain", 5),
        ("told", 3),
        ("free", 5),
        ("turned", 3),
        ("cumulative", 5),
        ("joint", 5),
    ):
        facts = runs[arm].facts
        matrix = facts["task_accuracy"]
        assert [len(row) for row in matrix] == [tasks] * tasks
        assert facts["accuracy"] == pytest.approx(sum(matrix[-1]) / tasks)
        assert facts["stream"]["tasks"] == tasks
        assert (runs[arm].sum("wall_s", "train/task1/epoch2") or 0) > 0
    plain, known = (runs["plain"].facts[k] for k in ("task_accuracy", "task_accuracy_known"))
    assert all(
        k >= a for row, its in zip(plain, known, strict=True) for a, k in zip(row, its, strict=True)
    )
    assert plain[0][3] == 0.0
    assert "task_accuracy_known" not in runs["turned"].facts
    assert runs["joint"].facts["task_accuracy"][:4] == [[None] * 5] * 4
    assert runs["joint"].sum("samples", "train") == runs["plain"].sum("samples", "train") == 320
    assert runs["cumulative"].sum("samples", "train") == 2 * sum(
        runs["cumulative"].facts["stream"]["train"]
    )
    assert [x["task"] for x in runs["plain"].logs if "task" in x] == [1, 2, 3, 4, 5]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arm", ["plain", "er"])
def test_killed_in_the_middle_of_a_task_it_ends_with_the_same_matrix(
    arm: str, finished: Path, tmp_path: Path
) -> None:
    only = _write(
        tmp_path,
        "".join(
            line
            for line in RECIPE.splitlines(True)
            if line[:2] != "  " or line.startswith(f"  {arm}:")
        ),
    )
    moment = "part == 2 and epoch == 1 and batch == 2"
    every = ("--set", interrupted.EVERY_STEP)
    cut = greenvis("run", "tiny.yaml", *every, cwd=tmp_path, moment=moment)
    assert cut.returncode == -signal.SIGKILL
    assert [
        r.header["arm"]
        for r in (record.read(p) for p in record.find([tmp_path / "runs"]))
        if r.status == "crashed"
    ]
    session.run(only, runs=tmp_path / "runs")
    assert _matrix(tmp_path, arm) == _matrix(finished, arm)
    one, other = (
        load_file(f / f"runs/tiny/{arm}/seed0/model.safetensors") for f in (tmp_path, finished)
    )
    assert all(torch.equal(one[k], other[k]) for k in one)


def _matrix(folder: Path, arm: str) -> Any:
    runs = [record.read(path) for path in record.find([folder / "runs/tiny" / arm])]
    return next(r.facts["task_accuracy"] for r in runs if r.status == "done")


def test_labels_are_smoothed_in_a_stream_as_well(tmp_path: Path) -> None:
    """Over the classes that compete: all of a single head. One step by hand."""
    its = streams.make(
        data.load(data.DataSpec(name="digits", train=40, test=20)), kind="domain", tasks=2
    )

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    logits, y = torch.randn(6, 10), torch.arange(6)
    target = 0.7 * F.one_hot(y, 10) + 0.03
    assert torch.allclose(
        F.cross_entropy(its.masked(0, logits, y), y, label_smoothing=0.3),
        -(target * logits.log_softmax(1)).sum(1).mean(),
    )
    weights = []
    for smoothing in (0.0, 0.3):
        spec = TrainSpec(
            epochs=1, batch_size=40, lr=0.1, optimizer="sgd", momentum=0, weight_decay=0,
            schedule="constant",
        )  # fmt: skip
        with gv.track("smooth", dir=tmp_path, codecarbon=False) as run:
            made = of_stream(its, spec, task=Classification(label_smoothing=smoothing))
            live = loop.run(Own(net, made), run).live
        by_hand = net()
        for part in its.train:
            x, y = part.batch(torch.arange(len(part)))
            masked = its.masked(0, by_hand(x), y)
            F.cross_entropy(masked, y, label_smoothing=smoothing).backward()
            with torch.no_grad():
                for p in by_hand.parameters():
                    p.sub_(0.1 * p.grad)
                    p.grad = None
        assert all(
            torch.allclose(a, b, atol=1e-5)
            for a, b in zip(live.model.parameters(), by_hand.parameters(), strict=True)
        )
        weights.append(next(iter(by_hand.parameters())).detach())
    assert not torch.allclose(*weights, atol=1e-4)
