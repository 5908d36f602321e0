"""Any model class of transformers and diffusers by reference: random, or as a folder holds it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from greenvis import models
from greenvis.core.example import Example
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.meters import flops, speed
from greenvis.models.dual import DualEncoder
from greenvis.models.structure import view
from greenvis.tasks.image_text import ImageText
from greenvis.tasks.segmentation import Segmentation
from greenvis.techniques.iteration.peft.lora import Lora

UNET: dict[str, Any] = {
    "img_size": 8, "in_chans": 1, "num_classes": 10, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "in_chans": 3, "embed_dim": 16, "depth": 1, "num_heads": 2,
    "tokens": 32, "length": 8, "projection_dim": 16,
}  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
LLAVA: dict[str, Any] = {
    "image_token_index": 31,
    "text_config": {"model_type": "llama", "vocab_size": 32, "num_key_value_heads": 2, **SMALL},
    "vision_config": {
        "model_type": "clip_vision_model",
        "patch_size": 8,
        "image_size": 16,
        **SMALL,
    },
}


def _noisy() -> Example:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 8, 8, generator=generator)
    return Example((images, torch.tensor([3, 500])), {"class_labels": torch.tensor([1, 2])})


def test_a_denoising_network_is_called_with_noise_time_and_class(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model = models.build("diffusers/UNet2DModel", **UNET).eval()
    assert type(model).__name__ == "UNet2DModel"
    config: Any = model.config
    assert (config.sample_size, config.in_channels, config.out_channels) == (8, 1, 1)
    batch = _noisy()
    with torch.no_grad():
        drawn = batch.call(model).sample
        assert drawn.shape == (2, 1, 8, 8)
        other = Example(batch.args, {"class_labels": torch.tensor([1, 3])}).call(model).sample
    assert torch.equal(drawn[0], other[0])
    assert not torch.equal(drawn[1], other[1])
    assert flops.count(model, batch).macs > 1e4
    assert speed.latency(model, batch, seconds=0.01)["p50"] > 0
    # its parts are looked at with time and class filled in, and with them alone
    structure = view(model, (1, 8, 8))
    assert structure.attention
    assert structure.convs
    with pytest.raises(TypeError, match="timestep"):
        model(batch.args[0])
    before = copy.deepcopy(model.state_dict())
    live = wrap(
        model, Lora(rank=2, targets=("attention",), input_shape=(1, 8, 8)), task="generation"
    )
    batch.call(model.train()).sample.square().sum().backward()
    assert all(p.grad is not None for p in live.trainable.values())
    live.undo()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.config["sample_size"] == 8  # a dictionary that guards itself is left alone
    # a folder as diffusers writes it, and a file as greenvis does
    model.save_pretrained(tmp_path / "unet")
    assert models.published("diffusers/unet", folder=tmp_path)
    models.save(model, tmp_path / "m.safetensors", ref="diffusers/UNet2DModel", options=UNET)
    for ref in ("diffusers/unet", f"file:{tmp_path / 'm.safetensors'}"):
        again = models.build(ref, folder=tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(batch.call(again).sample, drawn)


def test_a_transformer_that_denoises_is_looked_at() -> None:
    pytest.importorskip("diffusers")
    options = {"img_size": 8, "in_chans": 4, "num_classes": 10, "depth": 2, "num_heads": 2}
    model = models.build("diffusers/DiTTransformer2DModel", attention_head_dim=8, **options)
    assert len(view(model, (4, 8, 8)).blocks) == 2


def test_a_dual_encoder_by_its_class_is_called_with_images_and_tokens() -> None:
    model = models.build("transformers/CLIPModel", **CLIP)
    assert isinstance(model, DualEncoder)
    assert len(view(model).attention) == 2
    tokens = torch.tensor([[30, 5, 31, 0, 0], [30, 6, 7, 31, 0]])
    task = ImageText()
    pairs = task.answer(model.eval(), Example((torch.rand(2, 3, 16, 16), tokens)))
    task.check(pairs, torch.tensor([0, 1]))
    assert pairs.texts.shape == (2, 16)


def test_a_model_that_answers_in_words_is_called_by_names(tmp_path: Path) -> None:
    model = models.build("transformers/LlavaForConditionalGeneration", **LLAVA).eval()
    ids = torch.tensor([[31] * 4 + [1, 5]] * 2)
    batch = Example((), {"pixel_values": torch.rand(2, 3, 16, 16), "input_ids": ids})
    with torch.no_grad():
        logits = batch.call(model).logits
    assert logits.shape == (2, 6, 32)
    assert len(batch) == 2
    assert flops.count(model, batch).macs > 1e4
    assert len(view(model, (3, 16, 16)).attention) >= 3
    model.save_pretrained(tmp_path / "llava")
    again = models.build("transformers/llava", folder=tmp_path).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(batch.call(again).logits, logits)


def test_a_segmenter_of_transformers_follows_the_data() -> None:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "strides": [4, 2],
             "patch_sizes": [3, 3], "sr_ratios": [2, 1], "num_attention_heads": [1, 2],
             "decoder_hidden_size": 8, "mlp_ratios": [2, 2]}  # fmt: skip
    ref = "transformers/SegformerForSemanticSegmentation"
    model = models.build(ref, num_classes=4, in_chans=1, **sizes)
    out = Segmentation().answer(model.eval(), torch.rand(2, 1, 32, 32))
    assert out.shape[:2] == (2, 4)


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("diffusers/UNet2dModel", {}, r"did you mean 'UNet2DModel'.*hf download"),
        ("diffusers/DDPMPipeline", {}, "unknown model"),
        ("diffusers/UNet2DModel", {"blocks_out": 3}, "did you mean 'block_out_channels'"),
        ("diffusers/UNet2DModel", {"pretrained": True}, "leave out `pretrained`"),
        ("diffusers/pipe", {}, "is a pipeline: name one of its parts, as diffusers/pipe/unet"),
        ("diffusers/empty", {}, "no config.json"),
        ("transformers/ClipModel", {}, "did you mean 'CLIPModel'"),
        ("transformers/pipeline", {}, "unknown model"),
        ("transformers/PreTrainedModel", {}, "base class"),
        ("transformers/none", {}, "names no class as its 'architectures'"),
        ("transformers/CLIPModel", {"text_config": {"name_or_path": "x"}}, "--trust"),
        ("transformers/CLIPModel", {"text_config": {"vocab_size": 10**9}}, "limit is 1,000,000"),
    ],
)
def test_what_is_no_model_says_the_way_out(
    ref: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if ref.startswith("diffusers/"):
        pytest.importorskip("diffusers")
    for name in ("pipe/unet", "empty", "none"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for name in ("pipe/unet", "none"):
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=message):
        models.check(ref, folder=tmp_path, **options)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r"pip install 'greenvis\[generation\]'"):
        models.check("diffusers/UNet2DModel")
