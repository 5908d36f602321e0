"""`report` and `meter`: what is compared, and where the energy comes from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from greenvis.experiment.recipe._section import Section


class ReportSpec(Section):
    """What the report compares."""

    baseline: str | None = Field(
        default=None, description="the arm the others are measured against; the first where absent"
    )
    arm: str | None = Field(
        default=None,
        description="the arm that is asked about, of which the verdict speaks; the one that the "
        "intervals speak for where absent",
    )
    metric: Annotated[str, Field(max_length=100)] | None = Field(
        default=None, description="of the task's metrics; its primary one where absent"
    )
    margin: (
        Annotated[
            float,
            Field(
                ge=0,
                le=1e6,
                description="how much of the metric an arm may lose and still keep it: points of a "
                "share (0.5 where absent), else in the metric's unit (0)",
            ),
        ]
        | None
    ) = None
    title: str | None = None
    note: str | None = Field(
        default=None,
        description="what its author has to say of the outcome, shown below the verdict",
    )


class MeterSpec(Section):
    """Where the energy comes from and where the machine stands."""

    country: str | None = Field(
        default=None, description="ISO-3 code; the world average, marked as assumed, where absent"
    )
    intensity: Annotated[float, Field(ge=0, description="grams of CO2e per kWh")] | None = None
    pue: Annotated[float, Field(ge=1)] = 1.0
    codecarbon: bool = Field(
        default=True, description="record codecarbon's own figure as a cross-check"
    )
    own_caches: bool = Field(
        default=False,
        description="no run reads what another computed of a frozen part: each pays for all it "
        "uses",
    )
