"""Labels and images as counts: written as lines of the record, read back, counted once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.meters import labels, record
from greenvis.meters.record_writer import Writer
from greenvis.report import results


def test_lines_are_read_back_with_when_and_where(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.labels("class", 40)
        with run.phase("train"):
            run.labels("class", 20, why="bought", name="round 1")
        run.images("unlabelled", 960)
    back = record.read(run.path)
    assert [(x["kind"], x["why"], x["count"]) for x in back.labels] == [
        ("class", "training", 40),
        ("class", "bought", 20),
    ]
    assert back.labels[1]["phase"] == "train"
    assert back.labels[0]["mono_s"] <= back.labels[1]["mono_s"]
    assert [(x["role"], x["count"]) for x in back.images] == [("unlabelled", 960)]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda run: run.labels("clas", 3), "did you mean 'class'"),
        (lambda run: run.labels("class", 3, why="trainng"), "did you mean 'training'"),
        (lambda run: run.labels("class", -1), "-1 labels"),
        (lambda run: run.labels("class", 2.5), "2.5 labels"),
        (lambda run: run.labels("class", True), "True labels"),
        (lambda run: run.images("unlabeled", 3), "did you mean 'unlabelled'"),
    ],
)
def test_what_cannot_be_is_refused_and_not_written(tmp_path: Path, call, word: str) -> None:
    with gv.track("t", dir=tmp_path) as run, pytest.raises(BadInput, match=word):
        call(run)
    assert not record.read(run.path).labels
    assert not record.read(run.path).images


def test_the_same_line_again_counts_once_and_names_add_up() -> None:
    line = {"kind": "class", "why": "training", "name": "", "count": 40}
    bought = {"kind": "class", "why": "bought", "name": "round 1", "count": 20}
    more = {**bought, "name": "round 2", "count": 15}
    both = labels.counts([line, line, bought, bought, more], [])
    assert both is not None
    assert both.labels == {("class", "training"): 40, ("class", "bought"): 35}
    assert labels.counts([], []) is None


def _write(folder: Path, run: str, attempt: int, status: str, rank: int = 0) -> None:
    """Write the record of a start of one (arm, seed, inputs): it states 40 labels, and bought 5."""
    path = folder / f"{run}.rank{rank}.jsonl"
    writer = Writer(
        path,
        {
            "run": run, "name": "n", "arm": "a", "seed": 0, "inputs": "x", "attempt": attempt,
            "clock_s": 1e9 + attempt, "rank": rank, "world_size": 2,
        },
    )  # fmt: skip
    writer.line("labels", labels.labels_line("class", 40, "training", ""))
    writer.line("labels", labels.labels_line("class", 5, "bought", "round 1"))
    writer.line("images", labels.images_line("labelled", 40, ""))
    writer.line("fact", {"accuracy": 0.5})
    writer.close(status)


def test_neither_a_resume_nor_ranks_count_twice(tmp_path: Path) -> None:
    for rank in (0, 1):
        _write(tmp_path, "one", 1, "failed", rank)
        _write(tmp_path, "two", 2, "done", rank)
    arm = results([tmp_path]).arms["a"]
    assert [(x.kind, x.why, x.count) for x in arm.labels] == [
        ("class", "bought", 5),
        ("class", "training", 40),
    ]
    assert arm.images == {"labelled": 40}


def test_a_record_without_lines_used_all_labels_of_its_training_set(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.fact(accuracy=0.5, data={"train": 120, "held_out": 40, "test": 60})
    arm = results([run.path]).arms["t"]
    assert [(x.kind, x.why, x.count) for x in arm.labels] == [
        ("class", "selection", 40),
        ("class", "training", 120),
    ]
    assert arm.images == {"labelled": 120}


def test_lines_of_other_hands_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.fact(accuracy=0.5)
        run.labels("class", 7)
    with run.path.open("a") as file:
        for odd in ({"kind": "class", "why": "training", "count": -3}, {"kind": "x"}):
            file.write(json.dumps({"type": "labels", **odd}) + "\n")
    content = results([run.path])
    assert [x.count for x in content.arms["t"].labels] == [7]
    assert any("2 of its lines on labels" in note for note in content.notes)


def test_seconds_are_overridden_and_price_hours_alone() -> None:
    table = labels.seconds(["class=5", "box=7,10,35"])
    assert {*table} == {*labels.KINDS}
    assert all(row["low"] <= row["central"] <= row["high"] for row in table.values())
    assert all(row["source"] for row in table.values())
    assert labels.hours({"class": 720, "box": 360}, table) == {
        "low": 1 + 0.7,
        "central": 1 + 1.0,
        "high": 1 + 3.5,
    }


@pytest.mark.parametrize("text", ["class", "class=", "class=-1", "class=a", "class=3,2,1", "x=3"])
def test_seconds_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        labels.seconds([text])
