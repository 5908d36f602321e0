"""Options that several benchmarks take: a parameter of `run` that is `Annotated` is one of the
command line's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path | None, typer.Option(help="folder to write the benchmark's report to")]
Rounds = Annotated[int, typer.Option(min=1, help="in which the settings take turns")]
Threads = Annotated[int, typer.Option(min=1, help="of torch")]
Model = Annotated[str, typer.Option(metavar="MODEL", help="as timm/NAME, with random weights")]
Images = Annotated[int, typer.Option(min=1, help="shown to each")]
Runs = Annotated[str, typer.Option(help="folder of run records")]
Techniques = Annotated[
    list[str] | None,
    typer.Option("--technique", metavar="NAME", help="only these; may be repeated"),
]
