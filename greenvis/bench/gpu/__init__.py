"""`greenvis bench gpu` (`make gpu`): what techniques save on a GPU, in under 8 minutes; without
one, a rehearsal on tiny sizes.

Cells run in order of importance, each in a file of its own under `cells/`: a run that is cut short
goes on with the next cell when the same command is given again. All weights are random: what a
technique costs in accuracy stands in other reports.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from greenvis.bench import _output
from greenvis.bench._options import Out, Rounds
from greenvis.bench.gpu import _counter, _page, _serving, _training
from greenvis.bench.gpu._measure import Bench, NotMeasured
from greenvis.bench.gpu._stored import read_cell
from greenvis.core import files
from greenvis.errors import BadInput, nearest, some
from greenvis.meters.header import commit, cpu, versions


class Cell(NamedTuple):
    """One question: a name, the seconds it is expected to take on an H200, and what answers it."""

    name: str
    seconds: float
    rows: Callable[[Bench], list[dict[str, Any]]]


# most important first; seconds on an H200, those of attention a guess
CELLS = (
    Cell("counter", 35, _counter.counter),
    Cell("tokens", 45, _serving.tokens),
    Cell("tuning", 35, _training.tuning),
    Cell("exits", 85, _serving.exits),
    Cell("teacher", 20, _training.teacher),
    Cell("precision", 20, _serving.precision),
    Cell("pipeline", 40, _training.pipeline),
    Cell("attention", 60, _serving.attention),
    Cell("int8", 52, _serving.int8),
    Cell("tokens-compiled", 78, _serving.tokens_compiled),
)
BUDGET_S = 470.0


def run(
    out: Out = None,
    cells: Annotated[
        list[str] | None, typer.Option("--cell", metavar="NAME", help="only these; may be repeated")
    ] = None,
    budget_s: Annotated[
        float, typer.Option(help="seconds; no cell is begun that would likely end later")
    ] = BUDGET_S,
    look_s: float | None = None,
    rounds: Rounds = 3,
) -> dict[str, Any]:
    """Measure the cells and return {"rows": one per setting in brief, "device", "cells": all that
    was measured}.

    Args:
        out: a folder (cells/*.json, results.json, report.md). Cells it holds of this device and
            these versions are not measured again; those of a rehearsal are replaced by those of a
            GPU.
        cells: names of those wanted; all without.
        budget_s: seconds; no cell is begun that would likely end later.
        look_s: seconds each setting works in each round; one on a GPU, a tenth in a rehearsal.
        rounds: how often each setting has its turn.

    Raises:
        BadInput: for an unknown cell, and where `out` holds figures of another GPU, or a file
            that is no cell's result.
    """
    names = [cell.name for cell in CELLS]
    for name in cells or ():
        if name not in names:
            raise BadInput(
                f"unknown cell '{name}'{nearest(name, names)}; there are {some(names, len(names))}"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = device.type == "cpu"
    described = _describe(device, small)
    _refuse_other_device(out, described)
    bench = Bench(device, small, look_s or (0.1 if small else 1.0), rounds)
    started, results = time.monotonic(), []
    for cell in CELLS:
        if cells and cell.name not in cells:
            continue
        results.append(_cell(cell, bench, described, out, budget_s - (time.monotonic() - started)))
        if out is not None:
            content = {"device": described, "cells": results}
            _output.write(out, content, _page.markdown(content))
    rows = [{"cell": r["cell"], **_page.brief(row)} for r in results for row in r["rows"]]
    rows += [
        {"cell": r["cell"], "setting": f"not measured: {r['reason']}"}
        for r in results
        if r["reason"]
    ]
    return {"rows": rows, "device": described, "cells": results}


def _describe(device: torch.device, small: bool) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (rehearsal)"
    return {
        "name": name, "rehearsal": small, "cpu": cpu(),
        "cuda": torch.version.cuda if not small else None,
        "versions": versions() | {"torch": torch.__version__}, "git": commit(Path.cwd()),
    }  # fmt: skip


def _refuse_other_device(out: Path | None, described: dict[str, Any]) -> None:
    for path in sorted((out / "cells").glob("*.json")) if out is not None else ():
        other = read_cell(path, path.stem)["device"]
        if other["name"] != described["name"] and not other["rehearsal"]:
            raise BadInput(
                f"{out} holds figures of '{other['name']}', and this is '{described['name']}': "
                "give another folder (--out), or delete that one"
            )


def _cell(
    cell: Cell, bench: Bench, described: dict[str, Any], out: Path | None, left_s: float
) -> dict[str, Any]:
    """Return one cell's result: as it lies in `out`, or measured now. A cell that breaks does not
    take the others along."""
    path = None if out is None else out / "cells" / f"{cell.name}.json"
    if path is not None and path.exists():
        earlier = read_cell(path, cell.name)
        same = all(earlier["device"][key] == described[key] for key in ("name", "versions"))
        if same and not earlier["reason"]:
            return earlier
    started, rows, reason = time.monotonic(), [], ""
    expected = 1.0 if bench.small else cell.seconds
    if left_s < expected:
        reason = (
            f"{left_s:.0f} s were left and it takes about {expected:.0f}; give the same command "
            "again"
        )
    else:
        try:
            rows = cell.rows(bench)
        except NotMeasured as why:
            reason = str(why)
        except (
            Exception
        ) as error:  # out of memory, a compiler that refuses, a library that is another there
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    result = {
        "cell": cell.name, "about": (cell.rows.__doc__ or "").strip(), "device": described,
        "reason": reason,
        "seconds": round(time.monotonic() - started, 1), "rows": rows,
    }  # fmt: skip
    if path is not None:
        files.write(
            files.own_folder(path.parent, path.parent.parent) / path.name,
            json.dumps(result, indent=1) + "\n",
        )
    return result
