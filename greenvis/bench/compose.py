"""`greenvis bench compose`: every pair of techniques on four hosts, against the contract. Half an
hour or more."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from greenvis.bench import _output
from greenvis.bench._hosts import HOSTS
from greenvis.bench._options import Out, Techniques
from greenvis.core.technique import Technique
from greenvis.techniques import registry
from greenvis.testing import Host, Result, check_technique, check_together

ON = ("timm-vit", "transformers-vit", "timm-resnet", "timm-convnext")
Part = tuple[type[Technique], Mapping[str, Any]]


def run(
    out: Out = None, techniques: Techniques = None, hosts: Sequence[str] = ON
) -> dict[str, Any]:
    """Return {"rows": [{"pair", HOST: outcome, …}], "reasons", "unclear", "seconds"}.

    An outcome is "works", "refuses", "fails", or "alone" where one of the two refuses the host by
    itself. A technique stands with the first of its examples that works on the host. unclear:
    refusals that do not name both techniques.
    out: a folder to write report.md and results.json to. techniques: names; default all there are.
    """
    started = time.monotonic()
    names = registry.names() if techniques is None else sorted(techniques)
    rows: dict[str, dict[str, Any]] = {
        f"{a} + {b}": {"pair": f"{a} + {b}"} for a, b in combinations(names, 2)
    }
    results: list[Result] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for host in (HOSTS[h] for h in hosts):
            parts = {name: _part(name, host) for name in names}
            for a, b in combinations(names, 2):
                first, second = parts[a], parts[b]
                if first is None or second is None:
                    rows[f"{a} + {b}"][host.name] = "alone"
                    continue
                result = check_together([first, second], host)
                results.append(result)
                rows[f"{a} + {b}"][host.name] = result.outcome
    reasons = [
        {"pair": r.technique, "host": r.host, "outcome": r.outcome, "reason": r.reason}
        for r in results
        if r.reason
    ]
    result = {
        "rows": list(rows.values()),
        "reasons": reasons,
        "unclear": [
            r
            for r in reasons
            if r["outcome"] == "refuses"
            and not all(n in r["reason"] for n in r["pair"].split(" + "))
        ],
        "seconds": round(time.monotonic() - started),
    }
    if out is not None:
        _output.write(out, result, markdown(result, names, hosts))
    return result


def _part(name: str, host: Host) -> Part | None:
    """Return the technique with the first of its examples that works on the host alone, or None."""
    kind = registry.find(name)
    for example in kind.examples:
        if all(r.outcome == "works" for r in check_technique(kind, [host], [example])):
            return kind, example
    return None


def markdown(result: Mapping[str, Any], names: Sequence[str], hosts: Sequence[str]) -> str:
    """Return the report: a matrix with, in each cell, on how many hosts the pair works, and the
    reasons of the rest."""
    cells = {row["pair"]: _cell([row[h] for h in hosts]) for row in result["rows"]}
    fails = sum(row[h] == "fails" for row in result["rows"] for h in hosts)
    lines = [
        "# Composition: which techniques go together", "",
        f"`greenvis bench compose --out OUT`, {result['seconds']} s. Hosts: {', '.join(hosts)}; "
        "tiny, random weights.",
        "The pair is held to the contract of a single technique: neutral when fresh, bit-exact "
        "undo, a gradient to every",
        "declared trainable, delta saved and loaded, merge, resume, roll-back. A cell says on how "
        "many hosts the pair works,",
        f"of those that take each of the two alone; – where it is refused. **{fails} fail.**", "",
        f"| | {' | '.join(names[1:])} |", "|---" * len(names) + "|",
    ]  # fmt: skip
    for i, a in enumerate(names[:-1]):
        shown = ["" if j <= i else cells[f"{a} + {b}"] for j, b in enumerate(names) if j]
        lines.append(f"| {a} | {' | '.join(shown)} |")
    lines += [
        "",
        "## What does not go, and why",
        "",
        "| pair | outcome | hosts | reason |",
        "|---|---|---|---|",
    ]
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for r in result["reasons"]:
        grouped.setdefault(
            (r["pair"], r["outcome"], " ".join(r["reason"].replace("|", "\\|").split())), []
        ).append(r["host"])
    lines += [
        f"| {pair} | {outcome} | {', '.join(on)} | {why} |"
        for (pair, outcome, why), on in sorted(grouped.items())
    ]
    return "\n".join(lines) + "\n"


def _cell(outcomes: Sequence[str]) -> str:
    tried = [o for o in outcomes if o != "alone"]
    if "fails" in tried:
        return "**FAILS**"
    if not tried:
        return ""
    return f"{tried.count('works')}/{len(tried)}" if "works" in tried else "–"
