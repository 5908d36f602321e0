"""The loop of experts, captions and pretraining: its texts say what is shown, and it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from greenvis.bench import _duet_texts, dense_fusion
from greenvis.errors import BadInput


def words_of(texts: _duet_texts.Texts, tokens: torch.Tensor) -> list[list[str]]:
    known = ["", "?", *texts.words.words, "END"]
    return [[known[n] for n in row if n >= 0] for row in tokens.tolist()]


def test_captions_and_answers_say_what_is_shown() -> None:
    shown, _ = _duet_texts.pictures(7, 3, 0)
    texts, labels = shown.texts, shown.labels
    captions = words_of(texts, shown.captions(labels))
    answers = words_of(texts, shown.answers())
    for i in range(7):
        wear, digit, place = (texts.classes[t][labels[t][i]] for t in _duet_texts.TOPICS)
        assert captions[i] == [wear, "left_of", digit, "on", place, "END"]
        assert answers[i][1] == ("odd" if int(digit) % 2 else "even")
        assert answers[i][2] == "END"
    prompts = texts.prompt("which", 7, texts.hints(labels))
    assert words_of(texts, prompts) == [[c[0], c[2], c[4], "which"] for c in captions]
    assert words_of(texts, texts.prompt("describe", 2, None)) == [["describe"]] * 2


def test_what_is_said_ends_with_its_end() -> None:
    classes = {topic: (f"{topic} a", f"{topic} b") for topic in _duet_texts.TOPICS}
    texts = _duet_texts.Texts(classes, ("top, even", "top, odd"))
    model: Any = _duet_texts.model(texts)
    end = texts.words.size - 1
    biased = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():  # it ends whatever it is asked
        biased.weight.zero_()
        biased.bias.copy_(torch.eye(biased.out_features)[end])
    model.lm_head = biased
    said = _duet_texts.say(model, torch.rand(5, 1, 32, 32), texts.prompt("which", 5, None), 3)
    assert said.tolist() == [[end, -1, -1]] * 5


def test_more_labels_than_images_are_refused() -> None:
    with pytest.raises(BadInput, match="there are 10 images"):
        dense_fusion.run(images=10, labels=20)


@pytest.mark.slow
def test_it_writes_its_report(tmp_path: Path) -> None:
    result = dense_fusion.run(
        tmp_path, images=40, labels=20, expert_images=30, test=10, expert_steps=1,
        captioner_steps=1, pretraining_steps=2, steps=1, seeds=1, rounds=1,
    )  # fmt: skip
    rows = {row["arm"]: row for row in result["rows"]}
    assert [*rows] == [*dense_fusion.STAGES]
    assert rows["plain"]["total_j"] == rows["plain"]["own_j"]
    stages = {row["stage"]: row["joules"] for row in result["stages"]}
    # an arm is charged with all it builds on
    for arm, builds_on in dense_fusion.STAGES.items():
        total = rows[arm]["own_j"] + sum(stages[s] for s in builds_on)
        assert abs(rows[arm]["total_j"] - total) <= len(builds_on) + 1  # joules are rounded
    assert {row["captioner"] for row in result["captioners"]} == {
        "image alone", "image and experts' words",
    }  # fmt: skip
    assert "`context`" in (tmp_path / "report.md").read_text()
