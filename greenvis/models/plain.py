"""Small models of our own, by reference `plain/NAME`: the ones continual learning's literature is
measured on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from greenvis.errors import BadInput


def mlp(
    *,
    num_classes: int = 10,
    in_chans: int = 1,
    img_size: int = 28,
    hidden: Sequence[int] = (100, 100),
) -> nn.Sequential:
    """Return a multi-layer perceptron on flattened images: Linear and ReLU for each of `hidden`,
    then the classifier.

    Weights start as Glorot and Bengio (2010) have it, uniform, biases at 0.

    Args:
        num_classes: Outputs.
        in_chans: Channels of the images.
        img_size: Their side in pixels.
        hidden: Width of each hidden layer.

    Returns:
        The model.
    """
    widths = [in_chans * img_size**2, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], num_classes))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def convnet(
    *,
    num_classes: int = 10,
    in_chans: int = 1,
    img_size: int = 28,
    channels: Sequence[int] = (32, 64, 128),
) -> nn.Sequential:
    """Return a convolutional network for small images: for each of `channels` a 3 x 3 convolution,
    batch norm, ReLU and 2 x 2 max pooling, then the classifier on the mean over positions.

    It is the Conv-4 of few-shot learning (Vinyals et al., 2016), of any width and depth. Its first
    convolution sees every pixel, where that of a ResNet for ImageNet leaves a quarter of 28.

    Args:
        num_classes: Outputs.
        in_chans: Channels of the images.
        img_size: Their side in pixels: at least 2 to the power of the number of blocks.
        channels: Output channels of each block.

    Returns:
        The model.

    Raises:
        BadInput: Where pooling leaves no pixel.
    """
    if img_size < 2 ** len(channels):
        raise BadInput(
            f"plain/convnet: {len(channels)} blocks halve images of {img_size} pixels to nothing; "
            f"use images of {2 ** len(channels)} pixels or fewer channels"
        )
    blocks = [
        nn.Sequential(
            nn.Conv2d(width, following, 3, padding=1, bias=False),
            nn.BatchNorm2d(following),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        for width, following in pairwise([in_chans, *channels])
    ]
    classifier = nn.Linear(channels[-1], num_classes)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


def vit(
    *,
    num_classes: int = 10,
    in_chans: int = 1,
    img_size: int = 28,
    patch_size: int = 4,
    embed_dim: int = 64,
    depth: int = 4,
    num_heads: int = 2,
    global_pool: str = "avg",
    patch_drop_rate: float = 0.0,
) -> nn.Module:
    """Return a vision transformer of timm's for few images: its tokens are made by three 3 x 3
    convolutions with batch norm and ReLU, or as many as halve the image to its patches (Xiao et
    al., 2021), not by one whose kernel ends where the patch does.

    Args:
        num_classes: Outputs.
        in_chans: Channels of the images.
        img_size: Their side in pixels.
        patch_size: Pixels from token to token, a power of 2.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Heads of their attention.
        global_pool: What is classified, as timm has it: "avg" for the mean of the patches, "token"
            for the class token.
        patch_drop_rate: Share of the patches that a training step leaves out, drawn for each image.

    Returns:
        The model, of (img_size / patch_size)² + 1 tokens.

    Raises:
        BadInput: For a patch_size that is no power of 2, or does not divide the image.
    """
    from timm.layers.hybrid_embed import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer

    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or img_size % patch_size:
        raise BadInput(
            f"plain/vit: patch_size is {patch_size}, which is no power of 2 that divides img_size "
            f"({img_size})"
        )
    count = max(3, halvings)
    widths = [in_chans, *[max(1, embed_dim >> i) for i in reversed(range(1, count - 1))]]
    widths += [embed_dim] * 2
    stem = nn.Sequential(
        *[
            nn.Sequential(
                nn.Conv2d(width, following, 3, 1 + (i < halvings), padding=1, bias=False),
                nn.BatchNorm2d(following),
                nn.ReLU(),
            )
            for i, (width, following) in enumerate(pairwise(widths))
        ]
    )
    return VisionTransformer(
        img_size=img_size,
        patch_size=1,  # of what the stem gives
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        global_pool=global_pool,  # type: ignore[arg-type]
        patch_drop_rate=patch_drop_rate,
        embed_layer=partial(HybridEmbed, backbone=stem),
    )


def vae(*, num_classes: int = 10, in_chans: int = 1, img_size: int = 28) -> nn.Module:
    """Return a conditional variational autoencoder that draws images of a class.

    Args:
        num_classes: Classes.
        in_chans: Channels of the images.
        img_size: Their side in pixels.

    Returns:
        The model.
    """
    from greenvis.models.vae import Vae

    return Vae(num_classes, in_chans, img_size)


def clip(
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
    patch_size: int = 8,
    embed_dim: int = 64,
    depth: int = 2,
    num_heads: int = 2,
    tokens: int = 256,
    length: int = 77,
) -> nn.Module:
    """Return a small CLIP (Radford et al., 2021) of transformers with random weights, for images
    and texts.

    Args:
        num_classes: Not used: its answers are texts.
        in_chans: Channels of the images.
        img_size: Their side in pixels.
        patch_size: Side of a patch in pixels.
        embed_dim: Width of both encoders.
        depth: Blocks of each.
        num_heads: Heads of their attention.
        tokens: Size of the vocabulary; 0 pads, the largest ends a text.
        length: The most tokens of a text.

    Returns:
        The model, called with images and tokens.
    """
    from greenvis.models.dual import clip_of

    return clip_of(in_chans, img_size, patch_size, embed_dim, depth, num_heads, tokens, length)


def llava(
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 48,
    patch_size: int = 8,
    vision_dim: int = 96,
    vision_depth: int = 3,
    embed_dim: int = 128,
    depth: int = 4,
    num_heads: int = 4,
    tokens: int = 64,
    length: int = 32,
) -> nn.Module:
    """Return a small Llava (Liu et al., 2023) of transformers with random weights: a CLIP of images
    whose patches are words to a Llama.

    Args:
        num_classes: Not used: its answers are texts.
        in_chans: Channels of the images.
        img_size: Their side in pixels.
        patch_size: Side of a patch in pixels.
        vision_dim: Width of the part that reads images.
        vision_depth: Its blocks.
        embed_dim: Width of the part that reads and writes words.
        depth: Its blocks.
        num_heads: Heads of the attention of both.
        tokens: Size of the vocabulary; 0 pads, the largest ends an answer. The number behind it
            stands for a patch.
        length: The most tokens of question and answer.

    Returns:
        The model, called with pixel_values and input_ids.
    """
    from greenvis.models.llava import llava_of

    vision = {
        "hidden_size": vision_dim, "num_hidden_layers": vision_depth, "num_channels": in_chans,
        "image_size": img_size, "patch_size": patch_size,
    }  # fmt: skip
    text = {"hidden_size": embed_dim, "num_hidden_layers": depth}
    return llava_of(vision, text, num_heads, tokens, length)
