"""The coverage benchmark says what works, what refuses and why, and counts what it tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from hosts import HOSTS

from greenvis.bench import coverage
from greenvis.bench.coverage.attach import REQUESTS, attach, counts, sample


def test_the_sample_has_every_family_and_is_always_the_same() -> None:
    drawn = sample(1)
    assert drawn == sample(1)
    assert len({family for family, _ in drawn}) == len(drawn) > 90
    assert {name for _, name in sample(None)} == set(timm.list_models())


def test_attaches_or_says_why_not() -> None:
    rows = attach(
        [("deit", "deit_tiny_patch16_224"), ("resnet", "resnet18"), ("vision_transformer_sam", "samvit_base_patch16")]
    )
    assert [r["model"] for r in rows] == ["deit_tiny_patch16_224", "resnet18"]  # the third has no classifier
    deit, resnet = rows
    assert [deit[t] for t in REQUESTS] == ["attaches"] * 3
    assert (resnet["lora"], resnet["adapter"], resnet["kind"]) == ("attaches", "attaches", "convolution or MLP")
    assert "ResNet has none" in resnet["prompt"]
    whole = counts(rows)[-1]
    assert whole == {"kind": "all", "models": 2, "lora": 2, "adapter": 2, "prompt": 1, "at least one": 2, "fails": 0}


def test_writes_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "HOSTS", {n: HOSTS[n] for n in ("transformers-vit", "timm-resnet")})
    monkeypatch.setattr(coverage, "sample", lambda per_family: [("resnet", "resnet10t")])
    result = coverage.run(tmp_path, techniques=["prompt", "linear_probe"])
    assert result["rows"] == [
        {"host": "transformers-vit", "prompt": "works", "linear_probe": "works"},
        {"host": "timm-resnet", "prompt": "refuses", "linear_probe": "works"},
    ]
    assert json.loads((tmp_path / "results.json").read_text())["attach"] == result["attach"]
    text = (tmp_path / "report.md").read_text()
    assert "| transformers-vit | works | works |" in text
    assert "| timm-resnet | – | works |" in text
    assert "prompts are read by attention, and ResNet has none" in text
    assert "0 pairs fail" in text
