"""The matrix of pairs: what goes together, what is refused with both names, what one of the two
refuses alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import greenvis as gv
from greenvis.bench import compose
from greenvis.errors import BadInput


@pytest.mark.slow
def test_pairs_work_are_refused_or_do_not_arise(tmp_path: Path) -> None:
    found = compose.run(tmp_path, ["bitfit", "prompt", "side"], ["timm-vit", "timm-resnet"])
    assert [row["pair"] for row in found["rows"]] == [
        "bitfit + prompt",
        "bitfit + side",
        "prompt + side",
    ]
    assert found["rows"][0] == {
        "pair": "bitfit + prompt",
        "timm-vit": "works",
        "timm-resnet": "alone",
    }
    assert not [row for row in found["rows"] if "fails" in row.values()]
    assert not found["unclear"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    text = (tmp_path / "report.md").read_text()
    assert "| bitfit | 1/1 |" in text
    assert "**0 fail.**" in text


def _net() -> nn.Module:
    return compose.HOSTS["timm-vit"].build()


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (
            [gv.LinearProbe(), gv.PackNet()],
            "'linear_probe' and 'packnet' do not go together: 'packnet' needs a base whose own",
        ),
        (
            [gv.Adapter(width=4), gv.Hat()],
            "'adapter' and 'hat' do not go together: 'hat' needs a base whose own weights train",
        ),
        (
            [gv.Bitfit(), gv.Ncm()],
            "'ncm' and 'bitfit' do not go together: 'bitfit' needs gradients for what it trains",
        ),
        (
            [gv.Lora(rank=2), gv.LoraStream(rank=2)],
            "'lora' and 'lora_stream' do not go together: 'lora_stream' needs layers that",
        ),
    ],
)
def test_a_pair_is_refused_by_what_each_does_as_it_was_put_in(
    pair: list[gv.Technique], why: str
) -> None:
    model = _net()
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(BadInput, match=f"{why}.*; remove one, or use them in separate stages"):
        gv.wrap(model, pair)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


def test_a_technique_keeps_its_parameters_where_another_gives_them_other_names() -> None:
    live = gv.wrap(_net(), [gv.Bitfit(), gv.Lora(rank=2)])
    assert "blocks.0.attn.qkv.base_layer.bias" in live.declared
    assert all(p.requires_grad for p in live.declared.values())
