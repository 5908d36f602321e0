"""Tiny models with random weights, one of each kind the contract is tried on. Deterministic: the
same weights each time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from greenvis.testing import Host

CLASSES = 5
_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
_SWIN: dict[str, Any] = {
    "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4
}  # fmt: skip
_HF: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2
}  # fmt: skip
_SMALL_64: dict[str, Any] = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _timm(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what calls a class or a function of timm.models."""
    return lambda: _class(f"timm.models.{module}", name)(num_classes=CLASSES, **options)


def _transformers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        kind = _class("transformers", f"{name}ForImageClassification")
        return kind(_class("transformers", f"{name}Config")(num_labels=CLASSES, **config))

    return build


def _timm_resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock
    return ResNet(block, (2, 2, 1, 1), num_classes=CLASSES, channels=(8, 16, 16, 32), stem_width=8)


def _torchvision_vit() -> nn.Module:
    model = _class("torchvision.models", "VisionTransformer")(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=CLASSES,
    )  # fmt: skip
    # torchvision starts it at zero, which hides every difference
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def _torchvision_swin() -> nn.Module:
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in _SWIN.items()}
    options |= {"patch_size": [4, 4], "window_size": [4, 4]}
    return _class("torchvision.models", "SwinTransformer")(num_classes=CLASSES, **options)


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def _make_layer(self, block, planes, *args, **kwargs):
            return super()._make_layer(block, planes // 8, *args, **kwargs)

    model = Narrow(BasicBlock, [1, 1, 1, 1])
    model.fc = nn.Linear(64, CLASSES)
    model.__class__ = ResNet  # type: ignore[assignment]  # a plain one, for whoever asks its class
    return model


def _torchvision_mobilenet() -> nn.Module:
    from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf

    settings, last = _mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)
    return MobileNetV3(settings[:5], last // 16, num_classes=CLASSES)


class Plain(nn.Module):
    """Hand-written: a convolution stem with batch norm, attention by plain products, and torch's
    own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.to_tokens = nn.Conv2d(16, 32, 4, stride=4)
        self.wq, self.wk, self.wv = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.wo = nn.Linear(32, 32)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.classify = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 3, 32, 32). Returns logits (batch, classes)."""
        x = self.to_tokens(self.stem(x)).flatten(2).transpose(1, 2)
        q, k, v = (w(x).unflatten(-1, (2, 16)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        attended = (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        return self.classify(self.layer(x).mean(1))


_VIT_MODULE = ("vision_transformer", "VisionTransformer")
HOSTS: dict[str, Host] = {
    name: Host(name, build, (3, size, size), CLASSES)
    for name, build, size in (
        ("timm-vit", _timm(*_VIT_MODULE, **_VIT | {"depth": 3}, num_heads=4), 32),
        ("timm-deit-distilled", _timm("deit", "VisionTransformerDistilled", **_VIT, num_heads=2),
         32),
        ("timm-deit3", _timm(*_VIT_MODULE, **_VIT, num_heads=2, init_values=0.1,
                             no_embed_class=True), 32),
        ("timm-eva02", _timm("eva", "Eva", **_VIT, num_heads=2, mlp_ratio=2, qkv_fused=False,
                             swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True,
                             ref_feat_shape=(4, 4)), 32),
        ("timm-dinov2-registers", _timm(*_VIT_MODULE, **_VIT, num_heads=2, init_values=0.1,
                                        reg_tokens=4, no_embed_class=True, qk_norm=True), 32),
        ("timm-swin", _timm("swin_transformer", "SwinTransformer", img_size=32, **_SWIN), 32),
        ("timm-convnext", _timm("convnext", "ConvNeXt", depths=(1, 1, 2, 1),
                                dims=(8, 16, 16, 32)), 32),
        ("timm-resnet", _timm_resnet, 64),
        ("timm-efficientnet-lite", _timm(
            "efficientnet", "_gen_efficientnet_lite", variant="tf_efficientnet_lite0",
            channel_multiplier=0.25, depth_multiplier=0.3, pad_type="same", **_SMALL_64), 64),
        ("timm-mobilevit", _timm("mobilevit", "mobilevit_xxs", **_SMALL_64), 64),
        ("torchvision-vit", _torchvision_vit, 32),
        ("torchvision-swin", _torchvision_swin, 32),
        ("torchvision-resnet", _torchvision_resnet, 64),
        ("torchvision-mobilenet", _torchvision_mobilenet, 64),
        ("transformers-vit", _transformers("ViT", **_HF, intermediate_size=64,
                                           num_hidden_layers=2), 32),
        ("transformers-dinov2", _transformers("Dinov2", **_HF, mlp_ratio=2, num_hidden_layers=2),
         32),
        ("transformers-swin", _transformers("Swin", image_size=32, **_SWIN), 32),
        ("transformers-convnext", _transformers(
            "ConvNext", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32), 32),
        ("transformers-clip", _transformers("CLIP", vision_config={
            **_HF, "intermediate_size": 64, "num_hidden_layers": 2}), 32),
        ("plain", Plain, 32),
    )
}  # fmt: skip
