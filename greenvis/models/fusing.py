"""Everything that folds in a finished model, folded: the same answers from fewer layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from greenvis.core.beside import LIVE
from greenvis.core.surgery import Snapshot
from greenvis.errors import BadInput, some
from greenvis.models.folding import TOLERANCE, fold_norms
from greenvis.models.structure import example_input
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output

_NATIVE = ("fuse", "reparameterize", "switch_to_deploy")  # as timm's own function asks for them


@dataclass(frozen=True)
class Fusion:
    """What was fused in a model.

    Args:
        model: The model.
        native: Paths of modules that folded their own branches.
        convolutions: Paths of convolutions that took up a batch norm.
        difference: The greatest change of an answer, as a share of the greatest answer.
    """

    model: nn.Module
    native: tuple[str, ...]
    convolutions: tuple[str, ...]
    difference: float
    _before: Snapshot = field(repr=False)

    def undo(self) -> None:
        """Give the model back as it was, bit for bit."""
        self._before.restore()


def fuse(model: nn.Module, x: Tensor | None = None) -> Fusion:
    """Fold everything that folds, in place: techniques that are live on the model (`merge`), the
    branches that a library's model folds by itself (timm's repvgg, mobileone, repvit, fastvit, …),
    and batch norms (`fold_norms`).

    The model is put into eval and is for inference alone. A fused network costs what the plain one
    of the same layers costs: compare it with that, not with its own branches.

    Args:
        model: The model.
        x: Images (batch, channels, height, width) to compare answers on; guessed where absent.

    Returns:
        What was done, with its `undo`; a technique's branches come back by the `undo` of `wrap`.

    Raises:
        BadInput: Where nothing folds, or the answers would change by more than 1e-4 of the
            greatest; nothing but techniques is folded then.
        GreenvisError: Where a live technique cannot be folded; nothing is changed then.

    Example:
        >>> fusion = gv.fuse(resnet)
        >>> len(fusion.convolutions), fusion.difference < 1e-5
        (13, True)
        >>> fusion.undo()
    """
    what = type(model).__name__
    techniques, live = LIVE.get(model, ((), None))
    wrapped = None if live is None else live()
    if techniques and wrapped is None:
        raise BadInput(
            f"this {what} is wrapped with {some(techniques)}, but what wrap() returned is gone, so "
            "that they cannot be folded: hold it, and fuse then"
        )
    example = example_input(model) if x is None else x
    with probing(model):
        expected = main_output(model(example))
    if wrapped is not None and techniques:
        wrapped.merge()  # type: ignore[attr-defined]
    before = Snapshot(model)
    try:
        model.eval()
        native = tuple(
            path
            for path, m in model.named_modules()
            if path and any(hasattr(m, n) for n in _NATIVE)
        )
        if native:
            from timm.utils.model import reparameterize_model

            reparameterize_model(model, inplace=True)
        try:
            convolutions = fold_norms(model, example).convolutions
        except BadInput:
            if not native and not techniques:
                raise
            convolutions = ()
        with probing(model):
            got = main_output(model(example))
        largest = float(expected.float().abs().max())
        change = float((got.float() - expected.float()).abs().max())
        if got.shape != expected.shape or not change <= _limit(expected) * largest:
            raise BadInput(
                f"{what} answers otherwise with its branches folded (by {change:.3g} of "
                f"{largest:.3g}): use it as it is"
            )
    except BaseException:
        before.restore()
        raise
    return Fusion(model, native, convolutions, change / largest if largest else 0.0, before)


def _limit(answers: Tensor) -> float:
    return TOLERANCE if answers.dtype.itemsize >= 4 else 5e-2
