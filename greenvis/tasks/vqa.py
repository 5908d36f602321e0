"""Questions about images, answered in words (visual question answering)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Vqa(Task):
    """Answers in words to questions about images, by a vision–language model that generates.

    A batch is an `Example` of images and questions, int64 (batch, tokens) of one length; the labels
    are answers, int64 (batch, tokens), with the token that ends one, and -1 behind it. Questions
    come behind their image's tokens. In training the model is shown the answers (`forward`); in
    eval mode it generates its own, greedily. An `Example` of `pixel_values` and `input_ids`, as a
    processor of transformers makes it, is taken as it is.

    exact_match is the share of answers that are right in every token.
    """

    name: ClassVar[str] = "vqa"
    form: ClassVar[str] = "vqa"
    primary: ClassVar[Measure] = Measure("exact_match")
    secondary: ClassVar[tuple[Measure, ...] | None] = ()
    class_axis: ClassVar[int | None] = None
    unit: ClassVar[str] = "answer"

    tokens: Annotated[
        int, Field(ge=1, le=10_000, description="the most tokens of an answer without a label")
    ] = 16

    def answer(self, model: Callable[..., Any], x: Any, labels: Any = None) -> Any:
        """Return the logits of each token of the answers, (batch, tokens, vocabulary): in training
        of those in `labels`, else of what the model generates."""
        inputs = inputs_of(model, x)
        if getattr(model, "training", False):
            if not answers.is_tensor(labels):
                raise BadInput("vqa learns from answers: give labels, int64 (batch, tokens)")
            return self.outputs(model(**_with_answers(inputs, labels)))[:, -labels.shape[1] :]
        generate = getattr(getattr(model, "module", model), "generate", None)
        if generate is None:
            raise BadInput(
                f"{type(model).__name__} has no `generate`: vqa wants a vision–language model of "
                "transformers, as plain/llava"
            )
        most = labels.shape[1] if answers.is_tensor(labels) else self.tokens
        out = generate(
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return _stacked(out.logits)

    def outputs(self, raw: Any) -> Tensor:
        """Return the logits of a language model."""
        logits = answers.logits_of(raw)
        if logits.dim() != 3:
            raise BadInput(
                f"vqa wants logits (batch, tokens, vocabulary), not {tuple(logits.shape)}"
            )
        return logits

    def known(self, labels: Any) -> Tensor:
        """Return which questions have an answer."""
        return (labels != answers.UNKNOWN).any(1)

    def losses(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the mean cross entropy of each answer's tokens."""
        import torch.nn.functional as F

        known = labels != answers.UNKNOWN
        steps = min(outputs.shape[1], labels.shape[1])  # it may have ended before
        targets = labels.masked_fill(~known, 0)[:, :steps]
        each = F.cross_entropy(outputs[:, :steps].float().mT, targets, reduction="none")
        return (each * known[:, :steps]).sum(1) / known.sum(1).clamp(min=1)

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"exact_match"}, 0 to 1."""
        from greenvis.tasks._metrics import ExactMatch

        return {"exact_match": ExactMatch()}

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        """Refuse logits that are not of tokens, and labels that are not tokens of as many
        answers."""
        self.outputs(outputs)
        if labels is not None and (
            not answers.is_tensor(labels)
            or labels.dim() != 2
            or len(labels) != len(outputs)
            or labels.is_floating_point()
        ):
            raise BadInput(
                f"vqa wants the tokens of {len(outputs)} answers, int64 (batch, tokens), -1 behind "
                f"each answer's end, not {answers.shape_of(labels)}"
            )

    def example(self, size: int) -> TaskExample:
        """Return logits by chance, answers of one to three tokens, and logits of these."""
        import torch

        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(5, (size, 3), generator=generator)
        lengths = torch.arange(size) % 3
        labels = labels.masked_fill(torch.arange(3) > lengths[:, None], answers.UNKNOWN)
        chance = torch.randn(size, 3, 5, generator=generator)
        best = 10 * torch.eye(5)[labels.clamp(min=0)]
        return TaskExample(chance, labels, best)


def inputs_of(model: Any, x: Any) -> dict[str, Any]:
    """Return what a vision–language model of transformers is called with for a batch.

    Args:
        model: Of a configuration that says how many patches an image has, and which token stands
            for one.
        x: An `Example` of images (batch, channels, height, width) and questions int64 (batch,
            tokens); or of what the model takes, by name.

    Returns:
        pixel_values and input_ids: as many tokens as the image has patches, then the question.

    Raises:
        BadInput: For a batch or a model that is neither.
    """
    import torch

    named = dict(getattr(x, "kwargs", {}))
    if "input_ids" in named:
        return named
    args = getattr(x, "args", ())
    config = getattr(getattr(model, "module", model), "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if len(args) != 2 or token is None:
        raise BadInput(
            f"vqa calls a vision–language model with images and questions, and this is "
            f"{type(model).__name__} with {type(x).__name__}: take plain/llava or "
            "transformers/LlavaForConditionalGeneration, and an Example((images, questions))"
        )
    images, questions = args
    patches = questions.new_full((len(images), image_tokens(config)), token)
    return {"pixel_values": images, "input_ids": torch.cat([patches, questions], 1)}


def image_tokens(config: Any) -> int:
    """Return how many tokens stand for an image, as the configuration of a Llava says."""
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    return count + (getattr(config, "vision_feature_select_strategy", "default") == "full")


def _with_answers(inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return the inputs followed by all tokens of the answers but the last, which none follows."""
    import torch

    shown = labels[:, :-1].clamp(min=0)
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], shown], 1)}
    mask = inputs.get("attention_mask")
    if mask is not None:
        out["attention_mask"] = torch.cat([mask, mask.new_ones(shown.shape)], 1)
    return out


def _stacked(logits: Any) -> Tensor:
    """Return logits of each step as one tensor, (batch, steps, vocabulary)."""
    import torch

    return torch.stack(list(logits), 1)
