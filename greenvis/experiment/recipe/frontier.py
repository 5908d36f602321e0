"""The ladder of a recipe's `frontier`: plain arms that do what people do without techniques, train
for a shorter time, a smaller network, smaller images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from greenvis.errors import BadInput

if TYPE_CHECKING:
    from greenvis.experiment.recipe.recipe import Recipe

SHARES = (0.25, 0.5, 2.0)  # of the arm's epochs, where none are named
MOST = 64  # arms of a ladder


class FrontierSpec(BaseModel):
    """Plain arms, one for each combination of what is named here, that the report reads savings
    against."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    arm: str | None = Field(
        default=None, description="whose training they shorten; the baseline where absent"
    )
    epochs: tuple[Annotated[int, Field(ge=1, le=10**6)], ...] = Field(
        default=(), description="a quarter, half and twice the arm's where absent"
    )
    models: tuple[str | dict[str, Any], ...] = Field(
        default=(), description="further networks, by reference, or as the recipe's `model`"
    )
    img_sizes: tuple[Annotated[int, Field(ge=4, le=16_384)], ...] = Field(
        default=(), description="further sides of the images, in pixels"
    )


def ladder(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the plain arms that a recipe's `frontier` stands for, by name.

    Raises:
        BadInput: where the arm they shorten has a technique, stages, a stream or a subset, where
            an arm has a name of theirs, and where they are too many.
    """
    spec = recipe.frontier
    if spec is None:
        return {}
    name = spec.arm or recipe.baseline
    own, where = recipe.arms.get(name), recipe.where("frontier")
    if own is None:
        raise BadInput(f"{where}: frontier.arm '{name}' is no arm of this recipe")
    if own.techniques or own.stages or own.subset or recipe.data.stream:
        raise BadInput(
            f"{where}: a frontier is of plain training, and arm '{name}' has techniques, stages, "
            "a stream or a subset; name a plain one in frontier.arm"
        )
    trained = recipe.arm(name).train.epochs
    epochs = spec.epochs or tuple(dict.fromkeys(max(1, round(share * trained)) for share in SHARES))
    out: dict[str, dict[str, Any]] = {}
    for model, side, n in itertools.product(
        (None, *spec.models), (None, *spec.img_sizes), dict.fromkeys((trained, *epochs))
    ):
        if (model, side, n) == (None, None, trained):
            continue  # the arm itself
        changed = {"ref": model} if isinstance(model, str) else model or {}
        rung = "-".join(_words(changed, side, n))
        if rung in recipe.arms or rung in out:
            raise BadInput(f"{where}: a second arm is named '{rung}', as one of the frontier is")
        out[rung] = {
            "model": changed or own.model,
            "train": {**own.train, "epochs": n},
            "data": own.data if side is None else {**own.data, "img_size": side},
        }
    if len(out) > MOST:
        raise BadInput(f"{where}: {len(out)} plain arms, and at most {MOST} can be told apart")
    return out


def _words(model: dict[str, Any], side: int | None, epochs: int) -> Iterator[str]:
    yield "plain"
    if model:
        ref = str(model.get("ref", "model")).rpartition("/")[2]
        yield "".join(c if c.isalnum() or c in "._" else "_" for c in ref)
    if side is not None:
        yield f"{side}px"
    yield f"{epochs}ep"
