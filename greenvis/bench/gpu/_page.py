"""The page of the GPU kit: one table per cell, and on top where the figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.bench import _floor
from greenvis.report.markup import md

FORMS = {
    "ms": "{:.3g}", "units_per_s": "{:.4g}", "gpu_j": "{:.3g}", "total_j": "{:.3g}",
    "speedup": "{:.2f}",
    "energy_ratio": "{:.2f}", "range": "{}", "gmacs": "{:.3g}", "macs_ratio": "{:.2f}",
    "realised": "{:.2f}",
    "peak_mb": "{:,.0f}", "trained": "{:,}", "seconds": "{:.2f}", "integrated_j": "{:.4g}",
    "ratio": "{:.3f}",
    "averaged_ratio": "{:.3f}", "watts": "{:.0f}",
}  # fmt: skip
HEADS = {
    "ms": "ms per call", "units_per_s": "images/s", "gpu_j": "GPU J", "total_j": "total J",
    "speedup": "times as fast",
    "energy_ratio": "energy ×", "gmacs": "GMACs", "macs_ratio": "MACs ×", "peak_mb": "peak MB",
    "trained": "parameters trained", "integrated_j": "power × time, J", "ratio": "counter ÷ power",
    "averaged_ratio": "counter ÷ power averaged by the driver",
}  # fmt: skip


MARGIN = 0.03  # at least; more where settings that do the same work read further apart
SAME = "never"  # of the cell of exits: nobody leaves


def brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a table shows it: without what the meter saw, numbers in three digits."""
    shown = {
        "range" if k == "low" else k: f"{v:.2f} – {row['high']:.2f}" if k == "low" else v
        for k, v in row.items()
        if k not in ("high", "observed")
    }
    return {
        HEADS.get(key, key): "–" if value is None else _figure(FORMS.get(key, "{}"), value)
        for key, value in shown.items()
    }


def _figure(form: str, value: Any) -> str:
    return value if isinstance(value, str) else form.format(value)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the results as the text of report.md."""
    device = result["device"]
    lines = [f"# What techniques save on a GPU: {md(device['name'])}", ""]
    if device["rehearsal"]:
        lines += [
            "**A rehearsal on a processor, with tiny sizes: no figure here says anything of a "
            "GPU.** It shows that the kit "
            "runs. `make gpu` on a machine with a CUDA GPU measures.", "",
        ]  # fmt: skip
    versions = device["versions"]
    lines += [
        f"`greenvis bench gpu`, torch {md(versions['torch'])}, "
        f"timm {md(versions.get('timm', '?'))}, CUDA "
        f"{md(device['cuda'] or 'none')}, "
        f"{device['cpu']['allowed']} CPUs. Random weights, ImageNet's "
        "size: what a technique costs in accuracy stands in other reports. Settings of a cell take "
        "turns; medians over rounds, ratios of what ran in the same round to the cell's first "
        "setting of that model and batch; `range` is the least and the greatest energy ratio of a "
        "round. Joules are per image; the total adds processor and memory (`greenvis doctor` says "
        "how) to the GPU's counter.",
        "",
    ]  # fmt: skip
    lines += _verdicts(result["cells"]) if not device["rehearsal"] else []
    for cell in result["cells"]:
        about = f"{md(cell['about'])} ({cell['seconds']:.0f} s)"
        lines += [f"## {md(cell['cell'])}", "", about, ""]
        if cell["reason"]:
            lines += [f"Not measured: {md(cell['reason'])}", ""]
        rows = [{md(k): md(v) for k, v in brief(row).items()} for row in cell["rows"]]
        lines += [*_floor.table(rows), ""] if rows else []
    return "\n".join(lines)


def _verdicts(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the first screen: what saved energy in each round, what cost more in each, and what
    the rounds do not decide."""
    cells = list(cells)
    rows = [row for cell in cells for row in cell["rows"] if row["setting"] == SAME]
    apart = _floor.ratio(row.get("energy_ratio") for row in rows)
    margin = max(MARGIN, (apart or 1.0) - 1)
    groups: dict[str, list[str]] = {
        f"Saved more than {margin:.0%} of the energy in each round": [],
        f"Cost more than {margin:.0%} of it in each round": [],
        "Neither": [],
    }
    saved, dearer, open_ = groups.values()
    for cell in cells:
        first = cell["rows"][0]["setting"] if cell["rows"] else None
        for row in cell["rows"]:
            if row["setting"] == first or row.get("energy_ratio") is None:
                continue
            batch = f"batch {row['batch']}" if "batch" in row else None
            where = ", ".join(str(v) for v in (row.get("model"), batch) if v)
            setting = md(f"{cell['cell']}: {row['setting']} ({where})")
            text = f"{setting} ×{row['energy_ratio']:.2f}"
            (
                saved if row["high"] < 1 - margin else dearer if row["low"] > 1 + margin else open_
            ).append(text)
    heading = [
        "## In brief",
        "",
        "Energy per image, against the first setting of the same model and batch.",
        "",
        _floor.sentence(apart, "exits that let nobody leave and the unmodified model"),
        "",
    ]
    return heading + [
        line
        for head, texts in groups.items()
        if texts
        for line in (f"**{head}**", "", *(f"- {t}" for t in texts), "")
    ]
