"""A technique from outside: all a third party has to write."""

from typing import Any, ClassVar

from greenvis import Installed, Technique


class ScaleLoss(Technique):
    """Add `factor` times the mean squared logit to the loss."""

    name: ClassVar[str] = "scale_loss"
    stage: ClassVar[Any] = "objective"
    factor: float = 0.1

    def install(self, model: Any) -> Installed:
        """Nothing in the model changes."""
        return _Live(self.factor)


class _Live(Installed):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def terms(self, x: Any, y: Any, logits: Any) -> dict[str, Any]:
        return {"scale_loss": self.factor * logits.square().mean()}
