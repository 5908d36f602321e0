"""What a weight file's card must be to be believed: written by strangers, it may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greenvis.core.validation import explain
from greenvis.errors import BadInput
from greenvis.meters.record import Provenance

# what a weight file's card must hold to be an ancestor, beside its cost
KEYS = ("run", "arm", "seed")
COST = ("observed", "energy_j")  # as observations; in older cards as joules
MOST_ROWS, MOST_COMPONENTS = 1000, 100  # of a family tree; of a meter
_Name = Annotated[str, Field(max_length=300)]
_Amount = Annotated[float, Field(ge=0)]
_Joules = _Amount | None


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Energy(_Loose):
    value: _Joules
    low: _Joules = None
    high: _Joules = None
    provenance: Provenance = "estimated"


class _Coefficient(_Loose):
    low: _Amount = 0.0
    central: _Amount = 0.0
    high: _Amount = 0.0


class _Component(_Loose):
    name: _Name
    source: _Name = ""
    observation: _Name = ""
    coefficient: _Coefficient = _Coefficient()
    repeatability: _Coefficient | None = None
    provenance: Provenance = "estimated"
    reason: Annotated[str, Field(max_length=10_000)] = ""


class _Observed(_Loose):
    components: Annotated[list[_Component], Field(max_length=MOST_COMPONENTS)]
    totals: Annotated[dict[_Name, float], Field(max_length=10 * MOST_COMPONENTS)]


class _Use(_Loose):
    role: _Name
    name: _Name
    seed: int | None
    runs: Annotated[list[_Name], Field(max_length=10_000)]
    observed: list[_Observed] | None = None
    energy_j: _Energy | None = None
    of: Annotated[list[_Name], Field(max_length=MOST_ROWS)]


class _Metric(_Loose):
    name: _Name
    unit: _Name = "%"
    higher_is_better: bool = True
    value: float | None = None


class _Card(_Loose):
    run: _Name
    arm: _Name
    seed: int
    metric: _Metric | None = None
    accuracy: float | None = None
    observed: list[_Observed] | None = None
    energy_j: _Energy | None = None
    uses: Annotated[list[_Use], Field(max_length=MOST_ROWS)] = []
    recipe: Annotated[str, Field(max_length=10**6)] = ""
    data: dict[str, Any] | None = None
    techniques: list[Any] | None = None


def checked(path: Path, card: Any) -> dict[str, Any]:
    """Return a card as the schema has it. Raises BadInput with the file and the field."""
    try:
        return _Card.model_validate(card).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise BadInput(explain(error, _Card, lambda *key: f"{path}: its card")) from error


def is_card(card: Any) -> bool:
    """Whether this is the card of a run: what it is of, and what that took."""
    return (
        isinstance(card, dict)
        and all(key in card for key in KEYS)
        and any(card.get(key) is not None for key in COST)
    )


def cost(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card says of its cost, in its own words."""
    return {key: card[key] for key in COST if key in card}
