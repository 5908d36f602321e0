"""Tiny models with random weights, one of each kind the contract is tried on. Deterministic: the
same weights each time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from greenvis.testing import Host

CLASSES = 5
_LABELS: dict[str, Any] = {"num_labels": CLASSES}
_TINY: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64
}  # fmt: skip


def _timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES
    )


def _timm_deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
    )


def _timm_deit3() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        init_values=0.1,
        no_embed_class=True,
    )


def _timm_dinov2_registers() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES,
        init_values=0.1, reg_tokens=4,
        no_embed_class=True, qk_norm=True,
    )  # fmt: skip


def _timm_eva02() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES,
        mlp_ratio=2, qkv_fused=False,
        swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4),
    )  # fmt: skip


def _timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        num_classes=CLASSES,
    )


def _timm_convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 16, 32), num_classes=CLASSES)


def _timm_resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock
    return ResNet(block, (2, 2, 1, 1), num_classes=CLASSES, channels=(8, 16, 16, 32), stem_width=8)


def _timm_efficientnet_lite() -> nn.Module:
    from timm.models.efficientnet import _gen_efficientnet_lite

    return _gen_efficientnet_lite(
        "tf_efficientnet_lite0", channel_multiplier=0.25, depth_multiplier=0.3, pad_type="same",
        num_classes=CLASSES,
        pretrained_cfg_overlay={"input_size": (3, 64, 64)},
    )  # fmt: skip


def _timm_mobilevit() -> nn.Module:
    import timm

    return timm.create_model(
        "mobilevit_xxs", num_classes=CLASSES, pretrained_cfg_overlay={"input_size": (3, 64, 64)}
    )


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=CLASSES,
    )
    head: Any = model.heads.head
    # torchvision starts it at zero, which hides every difference
    nn.init.normal_(head.weight, std=0.1)
    return model


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=CLASSES,
    )


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


def _transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_TINY, num_hidden_layers=2, **_LABELS))


def _transformers_dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = {k: v for k, v in _TINY.items() if k != "intermediate_size"}
    return Dinov2ForImageClassification(
        Dinov2Config(**config, mlp_ratio=2, num_hidden_layers=2, **_LABELS)
    )


def _transformers_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            **_LABELS,
        )
    )


def _transformers_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32, **_LABELS)
    )


def _transformers_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPForImageClassification

    return CLIPForImageClassification(
        CLIPConfig(vision_config={**_TINY, "num_hidden_layers": 2}, **_LABELS)
    )


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


HOSTS: dict[str, Host] = {
    name: Host(name, build, (3, size, size), CLASSES)
    for name, build, size in (
        ("timm-vit", _timm_vit, 32),
        ("timm-deit-distilled", _timm_deit, 32),
        ("timm-deit3", _timm_deit3, 32),
        ("timm-eva02", _timm_eva02, 32),
        ("timm-dinov2-registers", _timm_dinov2_registers, 32),
        ("timm-swin", _timm_swin, 32),
        ("timm-convnext", _timm_convnext, 32),
        ("timm-resnet", _timm_resnet, 64),
        ("timm-efficientnet-lite", _timm_efficientnet_lite, 64),
        ("timm-mobilevit", _timm_mobilevit, 64),
        ("torchvision-vit", _torchvision_vit, 32),
        ("torchvision-swin", _torchvision_swin, 32),
        ("torchvision-resnet", _torchvision_resnet, 64),
        ("torchvision-mobilenet", _torchvision_mobilenet, 64),
        ("transformers-vit", _transformers_vit, 32),
        ("transformers-dinov2", _transformers_dinov2, 32),
        ("transformers-swin", _transformers_swin, 32),
        ("transformers-convnext", _transformers_convnext, 32),
        ("transformers-clip", _transformers_clip, 32),
        ("plain", Plain, 32),
    )
}
