"""The benchmark of caches runs, and what it says of a model of no training is what it can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from greenvis.bench import _dialogues, kv_cache


@pytest.mark.slow
def test_it_writes_its_report(tmp_path: Path) -> None:
    result = kv_cache.run(tmp_path, prompts=(200,), answer=4, rounds=1, steps=1, questions=2)
    rows = {row["cache"]: row for row in result["rows"]}
    assert rows["dynamic"]["decode_ratio"] == 1
    assert all(row["decode_j"] > 0 for row in rows.values())
    assert {row["cache"] for row in result["answers"]} == {*kv_cache.METHODS}
    static = [row for row in result["answers"] if row["cache"] == "static"]
    assert static[0]["same_answers"] == 1
    assert "snapkv" in (tmp_path / "report.md").read_text()


def test_dialogues_are_turns_whose_answers_alone_are_learned() -> None:
    model, train, _ = _dialogues.prepared(20, 10)
    import torch

    inputs, labels = train.batch(torch.tensor([[0, 1], [2, 3]]))
    assert inputs["pixel_values"].shape == (4, 1, 32, 32)
    said = train.answers
    answers = [said[0] + said[1], said[2] + said[3]]
    for row, answer in zip(labels, answers, strict=True):
        assert [n for n in row.tolist() if n >= 0] == answer
    same = labels == inputs["input_ids"]
    assert bool(same[labels >= 0].all())
    dialogue = train.dialogue(200, 5, torch.Generator().manual_seed(0))
    ids = dialogue.inputs["input_ids"][0].tolist()
    assert 130 < len(ids) <= 200
    assert ids[-65:] == train.question()
    assert len(dialogue.inputs["pixel_values"]) * 64 == ids.count(model.config.image_token_id)
