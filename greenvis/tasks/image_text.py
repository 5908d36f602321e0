"""Images and texts that belong together: a contrastive loss, judged by what is found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Pairs(NamedTuple):
    """What a model says of a batch of images and texts.

    Args:
        logits: (images, texts), how well each goes with each.
        images: Their embeddings (images, features).
        texts: Those of the texts (texts, features).
    """

    logits: Tensor
    images: Tensor
    texts: Tensor


class ImageText(Task):
    """Images and texts: a batch is an `Example` of both, labels int64 (batch,) the number of the
    text, equal for equal texts, -1 where an image has none.

    Judged over the whole test by the nearest texts, each text once: recall_1 is the share of images
    whose nearest text is theirs, recall_5 that of the five nearest. zero_shot is the share nearest
    to the mean of their own class's texts.
    """

    name: ClassVar[str] = "image_text"
    form: ClassVar[str] = "image_text"
    primary: ClassVar[Measure] = Measure("recall_1")
    secondary: ClassVar[tuple[Measure, ...] | None] = (Measure("recall_5"), Measure("zero_shot"))
    class_axis: ClassVar[int | None] = None

    def outputs(self, raw: Any) -> Pairs:
        """Return logits and embeddings of a dual encoder, as of transformers' CLIP or SigLIP."""
        if isinstance(raw, Pairs):
            return raw
        named = raw if isinstance(raw, Mapping) else getattr(raw, "__dict__", {})
        parts = [named.get(k) for k in ("logits_per_image", "image_embeds", "text_embeds")]
        if not all(answers.is_tensor(part) for part in parts):
            raise BadInput(
                f"image_text wants logits_per_image, image_embeds and text_embeds, which an output "
                f"of type {type(raw).__name__} does not have: take a dual encoder, as hf/clip"
            )
        return Pairs(*parts)  # type: ignore[arg-type]

    def known(self, labels: Any) -> Tensor:
        """Return which images have a text."""
        return labels != answers.UNKNOWN

    def losses(self, outputs: Pairs, labels: Any) -> Tensor:
        """Return the contrastive loss of each pair: the mean of the cross entropies of its image
        among the texts and of its text among the images (Radford et al., 2021).

        Texts of one number are all right for an image.
        """
        known = self.known(labels)
        same = ((labels[:, None] == labels[None]) & known[:, None] & known[None]).float()
        targets = same / same.sum(1, keepdim=True).clamp(min=1)
        # pairs without a text compete nowhere
        logits = outputs.logits.float().masked_fill(~known, -1e9)
        across = outputs.logits.float().T.masked_fill(~known, -1e9)
        entropies = -(targets * (logits.log_softmax(1) + across.log_softmax(1))).sum(1)
        return 0.5 * entropies

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"recall_1", "recall_5", "zero_shot"}, 0 to 1."""
        from greenvis.tasks._retrieval import Recall, ZeroShot

        return {"recall_1": Recall(1), "recall_5": Recall(5), "zero_shot": ZeroShot()}

    def check(self, outputs: Pairs, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs that are not a text per image, and labels that are not one number each."""
        if outputs.logits.dim() != 2 or outputs.images.shape != outputs.texts.shape:
            raise BadInput(
                f"{tuple(outputs.images.shape)} images and {tuple(outputs.texts.shape)} texts: "
                "give a text per image"
            )
        images = outputs.images.shape[:1]
        if labels is not None and (
            not answers.is_tensor(labels) or labels.shape != images or labels.is_floating_point()
        ):
            raise BadInput(
                f"image_text wants the number of the text of each of {images[0]} images, not "
                f"{answers.shape_of(labels)}"
            )

    def example(self, size: int) -> TaskExample:
        """Return embeddings by chance, text numbers of which some are equal, and right ones."""
        import torch
        import torch.nn.functional as F

        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(size) * 2 // 3
        own = torch.eye(size)[labels]

        def pairs(images: Tensor, texts: Tensor) -> Pairs:
            images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
            return Pairs(10 * images @ texts.T, images, texts)

        chance = torch.randn(2, size, size, generator=generator)
        return TaskExample(pairs(chance[0], own), labels, pairs(own, own))
