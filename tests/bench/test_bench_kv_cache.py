"""The benchmark of caches runs, and what it says of a model of no training is what it can be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from greenvis.bench import _caches_page, _dialogues, kv_cache


@pytest.mark.slow
def test_it_writes_its_report(tmp_path: Path) -> None:
    result = kv_cache.run(
        tmp_path, (200, 3000), [1, 3], [64], answer=4, rounds=1, steps=1, questions=2
    )
    by = [(row["batch"], row["prompt"], row["cache"]) for row in result["rows"]]
    narrow = [(row["prompt"], row["cache"]) for row in result["rows"] if row["width"] == 64]
    assert narrow == [*itertools.product((200, 3000), kv_cache.LOSSLESS)]
    assert {b for b in by if b[0] > 1} == {(3, 200, name) for name in kv_cache.LOSSLESS}
    assert all(row["same_answers"] == 1 for row in result["rows"] if row["cache"] == "static")
    rows = {row["cache"]: row for row in result["rows"]}
    assert all(row["decode_j"] > 0 for row in rows.values())
    assert {row["cache"] for row in result["answers"]} == {*kv_cache.METHODS}
    static = [row for row in result["answers"] if row["cache"] == "static"]
    assert static[0]["same_answers"] == 1
    assert "snapkv" in (tmp_path / "report.md").read_text()


def test_several_prompts_are_different_ones_of_one_length() -> None:
    model: Any = kv_cache.models.build("plain/llava", **kv_cache.SIZES)
    inputs = kv_cache._prompts(model, 512, 3)
    ids = inputs["input_ids"]
    image = ids.eq(model.config.image_token_id)
    assert ids.shape == (3, 512)
    assert bool((image == image[0]).all())
    assert int(image.sum()) == 144 * len(inputs["pixel_values"])
    assert not bool((ids[0] == ids[1]).all())


def test_joules_are_per_answer_and_the_first_sentence_says_where_the_line_holds() -> None:
    import torch

    def spent(decode: float) -> kv_cache._Spent:
        return kv_cache._Spent(2.0, decode, 0.6, torch.arange(8).view(2, 4))

    full = [spent(9.0), spent(4.0), spent(4.0), spent(4.0)]
    own = [spent(1.0), spent(2.0), spent(2.0), spent(4.0)]
    row = {"width": 96, **kv_cache._row(512, "static", own, full)}  # the first round warms up
    assert (row["batch"], row["prefill_j"], row["decode_j"]) == (2, 1.0, 1.0)
    assert (row["decode_ratio"], row["answer_ratio"]) == (0.5, round(4 / 6, 3))
    assert row["decode_ms_per_token"] == 100
    assert row["same_answers"] == 1
    more = [
        {**row, "batch": 1, "decode_ratio": 0.9},
        {**row, "batch": 1, "cache": kv_cache.FULL, "decode_ratio": 0.98},
        {**row, "batch": 1, "cache": kv_cache.AGAIN, "decode_ratio": 1.02},
        {**row, "prompt": 64, "decode_ratio": 0.8},
        {**row, "prompt": 64, "cache": kv_cache.FULL, "decode_ratio": 1.05},
        {**row, "prompt": 64, "cache": kv_cache.AGAIN, "decode_ratio": 0.95},
    ]
    said = _caches_page.line([row, *more])
    assert "for 2 prompts at once of 512 tokens, 96 wide (×0.50). More for one prompt" in said
    assert said.count("(×") == 3
    assert "as far apart: 2 prompts at once of 64 tokens, 96 wide (×0.80). Its" in said
    assert "the same in every token" in said
    both = kv_cache._between({kv_cache.FULL: full, kv_cache.AGAIN: own})
    assert [each.decode for each in both] == [5.0, 3.0, 3.0, 4.0]
    assert "NOT the same" in _caches_page.line([{**row, "same_answers": 0.5}])


def test_dialogues_are_turns_whose_answers_alone_are_learned() -> None:
    model: Any
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
