"""`greenvis bench coverage`: every technique on every host, against the contract; and attach-only
over timm's models."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from greenvis.bench import _output
from greenvis.bench._hosts import HOSTS
from greenvis.bench._options import Out, Techniques
from greenvis.bench.coverage import tools
from greenvis.bench.coverage.attach import REQUESTS, attach, counts, sample
from greenvis.techniques import registry
from greenvis.testing import Result, check_technique

LIBRARIES = ("greenvis", "timm", "torchvision", "transformers", "peft", "torch")


def run(
    out: Out = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="attach to every model timm lists, not to a sample (an hour)"),
    ] = False,
    techniques: Techniques = None,
) -> dict[str, Any]:
    """Return {"rows": one a host, with the outcome of each technique, "results", "tools", "attach",
    "attached", "versions", …}.

    out: a folder to write report.md and results.json to. every: whether to attach to all models of
    timm (an hour or two), or to one of each family. techniques: names; default all there are.
    """
    per_family = None if every else 1
    started = time.monotonic()
    names = registry.names() if techniques is None else list(techniques)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [r for name in names for r in check_technique(registry.find(name), HOSTS)]
        matrix_seconds = round(time.monotonic() - started)
        under_tools = tools.table(names)
        tools_seconds = round(time.monotonic() - started) - matrix_seconds
        models = sample(per_family)
        attached = attach(models)
    result = {
        "rows": [
            {"host": host, **{n: _outcome(results, n, host) for n in names}} for host in HOSTS
        ],
        "results": [{k: str(v) for k, v in vars(r).items()} for r in results],
        "tools": under_tools,
        "attach": counts(attached),
        "attached": attached,
        "per_family": per_family,
        "versions": {name: version(name) for name in LIBRARIES},
        "seconds": {
            "matrix": matrix_seconds,
            "tools": tools_seconds,
            "attach": round(time.monotonic() - started) - matrix_seconds - tools_seconds,
        },
    }
    if out is not None:
        _output.write(out, result, markdown(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return the report: the matrix, the reasons of refusals, the counts, and models to which
    nothing attaches."""
    rows, attached = result["rows"], result["attached"]
    names = [k for k in rows[0] if k != "host"]
    how = (
        "every model"
        if result["per_family"] is None
        else f"{result['per_family']} drawn from each family"
    )
    fails = sum(row[n] == "fails" for row in rows for n in names)
    lines = [
        "# Coverage: which technique goes with which model", "",
        f"`greenvis bench coverage{'' if result['per_family'] else ' --all'} --out OUT`; "
        f"{' + '.join(map(str, result['seconds'].values()))} s; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".", "",
        # of one who put the results together
        *([result["note"], ""] if result.get("note") else ()),
        "## The contract", "",
        "Tiny models with random weights, all points of the contract (`greenvis.testing`): neutral "
        "when fresh, bit-exact",
        "undo, every declared trainable gets a gradient, finite steps, delta saved and loaded, "
        "merge, resume, roll-back.",
        f"A pair works where at least one of the technique's examples does and none fails. {fails} "
        "pairs fail.", "",
        f"| host | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
    ]  # fmt: skip
    lines += [f"| {row['host']} | {' | '.join(_shown(row[n]) for n in names)} |" for row in rows]
    lines += [
        "",
        "## What does not go, and why",
        "",
        "| technique | arguments | host | outcome | reason |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['technique']} | `{r['arguments']}` | {r['host']} | {r['outcome']} | "
        f"{_cell(r['reason'])} |"
        for r in result["results"]
        if r["outcome"] != "works"
    ]
    lines += _tools(result["tools"])
    lines += [
        "", "## Attaching to timm's classification models", "",
        f"{len(attached)} models ({how}), built on the meta device without weights: structure is "
        "found and the technique's",
        "parts are put in; values are not checked. " + "; ".join(
            f"{t}: {' else '.join(str(r or 'defaults') for r in requests)}" for t,
            requests in REQUESTS.items()) + ".", "",
        f"| models | tried | {' | '.join(REQUESTS)} | at least one | fails |",
        "|---" * (len(REQUESTS) + 4) + "|",
    ]  # fmt: skip
    lines += [
        f"| {c['kind']} | {c['models']} | {' | '.join(str(c[t]) for t in REQUESTS)} | "
        f"{c['at least one']} ({c['at least one'] / c['models']:.1%}) | {c['fails']} |"
        for c in result["attach"]
    ]
    lines += ["", "Without a place for low-rank changes or adapters, or failing:", ""]
    odd = [(r["model"], t, r[t]) for r in attached for t in REQUESTS if _notable(t, r[t])]
    lines += [f"- {model}, {technique}: {_cell(why)}" for model, technique, why in odd] or [
        "- none"
    ]
    return "\n".join(lines) + "\n"


def _tools(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the section on the tools people train with."""
    columns = [k for k in rows[0] if k not in ("technique", "host")]
    lines = [
        "", "## Under the tools people train with", "",
        "Each technique, with the first of its examples that fits the host: torch.compile (backend "
        "\"aot_eager\": captured and",
        "differentiated as in any backend, not compiled to machine code; same outputs and "
        "gradients), torch.export (same",
        "outputs), bf16 autocast (finite gradients), gradient checkpointing (same gradients), "
        "copy.deepcopy (alike, apart),",
        "state_dict through pickle into a new model, and DistributedDataParallel on 2 CPU ranks "
        "(the mean of both).",
        "",
        f"| technique | host | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|",
    ]  # fmt: skip
    short = {"works": "works", "refuses": "–", "fails": "**FAILS**"}
    cells = [[row[c].partition(":") for c in columns] for row in rows]
    lines += [
        f"| {row['technique']} | {row['host']} | {' | '.join(short[cell[0]] for cell in line)} |"
        for row, line in zip(rows, cells, strict=True)
    ]
    why = {
        (row["technique"], row["host"], row[c]): c
        for row in rows
        for c in columns
        if row[c] != "works"
    }
    lines += ["", "What does not work, and why:", ""]
    for (technique, host, reason), tool in why.items():
        lines.append(
            f"- {technique} on {host}{f', {tool}' if reason.startswith('fails') else ''}: "
            f"{_cell(reason)}"
        )
    return lines if why else [*lines, "- nothing"]


def _notable(technique: str, outcome: str) -> bool:
    return outcome.startswith("fails") or (technique != "prompt" and outcome != "attaches")


def _outcome(results: Sequence[Result], technique: str, host: str) -> str:
    outcomes = {r.outcome for r in results if (r.technique, r.host) == (technique, host)}
    return next(o for o in ("fails", "works", "refuses") if o in outcomes)


def _shown(outcome: str) -> str:
    return {"works": "works", "refuses": "–", "fails": "**FAILS**"}[outcome]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
