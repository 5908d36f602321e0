"""Sentences that readers stumbled over are gone from what they read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GONE = (
    "MACs an image",
    "Whoever leaves has no other outputs",
    "what an arm left",
    "Energies are ratios to that arm",
    "Charging the base",
    "alike, yet read",
    "no seed in common",
)
READ = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("greenvis/**/*.py"),
    *ROOT.glob("greenvis/**/*.j*"),
    *ROOT.glob("recipes/**/*.yaml"),
    *ROOT.glob("reports/*/report.md"),
    *ROOT.glob("reports/*/exports/*"),
]


def test_they_are_gone() -> None:
    assert len(READ) > 300
    for path in READ:
        text = re.sub(r"\s+(?:#\s|\")?", " ", path.read_text(encoding="utf-8"))
        assert not [words for words in GONE if words in text], path
