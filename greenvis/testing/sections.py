"""The contract every report section keeps, as a check that authors of plug-ins can run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from greenvis.errors import GreenvisError
from greenvis.report import comparison, page
from greenvis.report.section import Section
from greenvis.report.shape import Results

HOSTILE = '<script src="//x.y">alert(1)</script> | `b` **c** [d](javascript:e) ![f](//g.h/i) \\'
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
FENCED = re.compile(r"^(`{3,}).*?^\1$", re.M | re.S)
WRITTEN = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|^```.*$|\\(?=[^\w\s])", re.M)  # Markdown, no text


def check_section(section: type[Section[Any]]) -> None:
    """Try a report section against the contract.

    It computes and renders whatever figures are missing and never writes "None" or "nan"; what it
    shows is not empty, else `compute` returns None; names of strangers stay text in both forms; and
    both forms show the same numbers.

    Args:
        section: The class.

    Raises:
        GreenvisError: With each rule it breaks on a line.

    Example:
        >>> from greenvis.report.sections.cycle import FullCycle
        >>> check_section(FullCycle)
    """
    broken = [f"{what}: {why}" for what in STATES for why in _broken(section(), what)]
    if broken:
        raise GreenvisError(f"report section '{section.name}': " + "\n".join(broken))


def _broken(section: Section[Any], state: str) -> Iterator[str]:
    if not (re.fullmatch(r"[a-z][a-z0-9_-]*", section.name) and section.title.strip()):
        yield f"'{section.name}' is no anchor, or the title '{section.title}' is empty"
    try:
        shown = page.shown(example(state), section)
    except Exception as error:  # whatever a section raises is its failure, not the checker's
        yield f"it raises {type(error).__name__}: {error}"
        return
    if shown is None:
        return
    if not shown.blocks:
        yield "it shows nothing: return None from compute() then"
    html, markdown = page.html("t", [shown]), page.markdown("t", [shown])
    reader = _Reader()
    reader.feed(html.partition("<main>")[2].partition("</main>")[0])
    if reader.foreign:
        yield f"a name became markup in HTML: <{reader.foreign[0]}>"
    if re.search(r"<script|(?<!\\)!?\[[df](?<!\\)\]\(", FENCED.sub("", markdown)):
        yield "a name became markup in Markdown"
    if re.search(r"\b(None|nan|NaN)\b", "".join(reader.text)):
        yield "a missing figure is written as None or nan"
    numbers = [
        sorted(NUMBER.findall(text))
        for text in ("".join(reader.text), WRITTEN.sub(r"\1", markdown.partition("\n## ")[2]))
    ]
    if numbers[0] != numbers[1]:
        more = sorted({*numbers[0]} ^ {*numbers[1]})
        yield f"HTML and Markdown show different numbers: {', '.join(more[:5])}"


class _Reader(HTMLParser):
    """The text of HTML without figures, and elements that no block has."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.foreign: list[str] = []
        self.drawn = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.drawn += tag == "svg"
        if tag in ("script", "img", "iframe") or any(name.startswith("on") for name, _ in attrs):
            self.foreign.append(tag)
        self.text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.drawn -= tag == "svg"
        self.text.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.drawn:
            self.text.append(data)


STATES = ("all figures", "no inference", "no metric and no energy", "no finished run")


def example(state: str) -> Results:
    """Return small results with hostile names.

    Args:
        state: What is missing in them, one of `STATES`.
    """
    arms = {name: _arm(state, k) for name, k in (("plain", 1.0), (HOSTILE, 0.5))}
    finished = state != "no finished run"
    energy = _estimate(40.0 if finished else None)
    return comparison.compared(
        Results.from_json(
            {
                "schema": 2, "name": HOSTILE, "title": None, "note": HOSTILE, "baseline": "plain",
                "metric": "accuracy", "margin": 0.5, "served": 1000, "comparisons": 0,
                "lower_is_better": False, "arms": arms, "order": list(arms), "family": None,
                "totals": {"energy_j": energy, "carbon_g": energy, "unfinished_energy_j": energy,
                           "runs": 6, "attempts": {"done": 6} if finished else {"crashed": 6}},
                "incomplete": [] if finished else [
                    {"arm": HOSTILE, "seed": 0, "attempts": ["crashed"], "reason": HOSTILE,
                     "energy_j": _estimate(None)}
                ],
                "environment": {"cpu": [{"name": HOSTILE}], "gpu": [], "host": [HOSTILE], "os": [],
                                "versions": [], "world_size": []},
                "command": ["greenvis", HOSTILE], "commands": [["greenvis", HOSTILE]],
                "recipe": [f"name: {HOSTILE}"], "git": [], "data": [{"name": HOSTILE}],
                "models": [], "sources": [{"name": HOSTILE, "source": None}],
                "carbon_intensity": [{"value": 50.0, "zone": HOSTILE, "assumed": True}],
                "pue": [], "crosscheck": [], "not_counted": [HOSTILE], "notes": [HOSTILE],
                "newest_run_s": 1.7e9, "damaged_lines": 0, "missing_ranks": 0, "steal_s": None,
                "cpu_s": None, "repriced": False, "pricing_model": "linear",
            }
        )
    )  # fmt: skip


def _arm(state: str, k: float) -> dict[str, Any]:
    """Return an arm that takes k times the energy of the other, as a file holds it."""
    done = state != "no finished run"
    seeds = [0, 1, 2] if done else []
    known = state in STATES[:2]
    energy = _estimate(10.0 * k if known else None, seeds)
    served = _estimate(0.01 * k if state == STATES[0] else None, seeds)
    spread = {"0": 0.9, "1": 0.91, "2": 0.93} if known else {}
    nothing = _estimate(0.0)
    size = 1e6 if state == STATES[0] else None
    return {
        "accuracy": {"mean": 0.9133 if known else None, "std": 0.01 if known else None,
                     "n": len(spread), "by_seed": spread},
        "status": "done" if done else "incomplete", "seeds": seeds,
        "attempts": {"done": 3} if done else {"crashed": 3},
        "uses": [{"role": "base", "name": HOSTILE, "runs": [], "used_by_runs": 3,
                  "energy_j": _estimate(None)}] if done else [],
        "base_reuse": {"whole_j": _estimate(None), "whole_g": _estimate(None), "shared_j": None,
                       "shared_g": None} if done else None,
        "train_energy_j": energy, "train_energy_with_reuse_j": energy, "total_energy_j": energy,
        "carbon_g": energy, "total_carbon_g": energy, "inference_energy_j": served, "by_seed": {},
        "spent": {"energy_j": energy, "unfinished_energy_j": nothing,
                  "repeated_energy_j": nothing, "older_inputs_energy_j": nothing},
        "sci": {"e_kwh": None, "i_g_per_kwh": None, "m_g": None, "g_per_image": None},
        "std": {"latency_p50_ms": None}, "zones": [HOSTILE], "assumed_grid": True,
        "curve": {"0": [[1.0, 0.5], [2.0, 0.9]]} if known else {},
        "energy_by_phase_j": {HOSTILE: 10.0 * k} if known else {}, "energy_by_component_j": {},
        "latency_ms": {"p50": 2.0} if state == STATES[0] else None,
        "techniques": [{HOSTILE: {}}], "macs": size, "params": size, "trainable_params": size,
        "delta_bytes": None, "train_flops": None, "images_per_s": None, "peak_memory_mb": None,
        "wall_s": None, "embodied_g": None,
    }  # fmt: skip


def _estimate(value: float | None, seeds: list[int] | None = None) -> dict[str, Any]:
    """Return a reading, 1 % apart from seed to seed."""
    if value is None:
        missing = {"value": None, "low": None, "high": None, "provenance": None, "reason": HOSTILE}
        return missing | ({} if seeds is None else {"by_seed": {}})
    band = {"value": value, "low": 0.8 * value, "high": 1.3 * value, "provenance": "estimated"}
    by_seed = {str(s): value * (1 + 0.01 * s) for s in seeds or ()}
    return {**band, "method": HOSTILE, "std": 0.01 * value, "n": len(by_seed), "by_seed": by_seed}
