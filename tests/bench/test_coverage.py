"""The coverage benchmark says what works, what refuses and why, and counts what it tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from hosts import HOSTS

from greenvis.bench import coverage
from greenvis.bench.coverage import tools
from greenvis.bench.coverage.attach import REQUESTS, attach, counts, sample
from greenvis.core.wrap import wrap
from greenvis.techniques import registry


def test_the_sample_has_every_family_and_is_always_the_same() -> None:
    drawn = sample(1)
    assert drawn == sample(1)
    assert len({family for family, _ in drawn}) == len(drawn) > 90
    assert {name for _, name in sample(None)} == set(timm.list_models())


def test_attaches_or_says_why_not() -> None:
    rows = attach(
        [
            ("deit", "deit_tiny_patch16_224"),
            ("resnet", "resnet18"),
            ("vision_transformer_sam", "samvit_base_patch16"),
        ]
    )
    assert [r["model"] for r in rows] == [
        "deit_tiny_patch16_224",
        "resnet18",
    ]  # the third has no classifier
    deit, resnet = rows
    assert [deit[t] for t in REQUESTS] == ["attaches"] * 3
    assert (resnet["lora"], resnet["adapter"], resnet["kind"]) == (
        "attaches",
        "attaches",
        "convolution or MLP",
    )
    assert "ResNet has none" in resnet["prompt"]
    whole = counts(rows)[-1]
    assert whole == {
        "kind": "all",
        "models": 2,
        "lora": 2,
        "adapter": 2,
        "prompt": 1,
        "at least one": 2,
        "fails": 0,
    }


@pytest.mark.slow
def test_writes_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        coverage, "HOSTS", {n: HOSTS[n] for n in ("transformers-vit", "timm-resnet")}
    )
    monkeypatch.setattr(coverage, "sample", lambda per_family: [("resnet", "resnet10t")])
    monkeypatch.setattr(coverage.tools, "table", lambda names: [
        {"technique": "prompt", "host": "timm-vit", "DDP": "works", "pickle": "fails: Broken: |x|"},
        {"technique": "prompt", "host": "timm-resnet", "DDP": "refuses: no attention",
        "pickle": "refuses: no attention"},
    ])  # fmt: skip
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
    assert "| prompt | timm-vit | works | **FAILS** |" in text
    assert "| prompt | timm-resnet | – | – |" in text
    assert r"- prompt on timm-vit, pickle: fails: Broken: \|x\|" in text
    assert text.count("- prompt on timm-resnet: refuses: no attention") == 1


@pytest.mark.slow
def test_tools_say_what_works_and_what_refuses() -> None:
    checks = [t for t in tools.TOOLS if t not in ("torch.compile", "torch.export")]
    rows = tools.table(["lora", "prompt", "side"], tools=checks)
    outcomes = {(r["technique"], r["host"]): {r[t].partition(":")[0] for t in checks} for r in rows}
    assert (
        outcomes.pop(("prompt", "timm-resnet"))
        == outcomes.pop(("side", "timm-resnet"))
        == {"refuses"}
    )
    assert all(found == {"works"} for found in outcomes.values()), rows


@pytest.mark.parametrize("technique", ["mae", "reuse", "token_prune"])
def test_a_block_that_runs_again_in_the_backward_sees_the_tokens_it_saw(technique: str) -> None:
    """What these hand to a block lies beside its arguments: gradient checkpointing must find it
    again."""
    row = tools.table([technique], ["timm-vit"], ["gradient checkpointing"])[0]
    assert row["gradient checkpointing"] == "works", row


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["lora", "adapter", "prompt", "side"])
def test_compiles_exports_and_trains_on_two_ranks(technique: str) -> None:
    rows = tools.table([technique], ["timm-vit"], ["torch.compile", "torch.export", "DDP"])
    assert [v for r in rows for k, v in r.items() if k not in ("technique", "host")] == [
        "works"
    ] * 3


@pytest.mark.parametrize(
    "tool", ["bf16 autocast", "gradient checkpointing", "copy.deepcopy", "pickle"]
)
def test_the_checks_see_what_is_broken(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that gives other numbers each time."""
    count = iter(range(1000))

    def broken(technique: str, host: str) -> Any:
        live = wrap(HOSTS[host].build(), registry.find(technique)())
        live.model.register_forward_hook(lambda m, a, out: out * (1 + next(count)) + next(count))
        return live

    monkeypatch.setattr(tools, "build", broken)
    assert tools.table(["linear_probe"], ["timm-vit"], [tool])[0][tool].startswith("fails")
