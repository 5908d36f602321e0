"""Commands and recipes to repeat the runs with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from greenvis.report.blocks import Block, Code, Heading, paragraph
from greenvis.report.markup import shell
from greenvis.report.section import Section
from greenvis.report.shape import Results

MOST_COMMANDS, MOST_RECIPES = 10, 5


class Repeat(Section[tuple[list[str], list[str]]]):
    """How to repeat the runs."""

    name = "repeat"
    title = "Repeat it"
    folded = True

    def compute(self, results: Results) -> tuple[list[str], list[str]]:
        """Return commands and recipes."""
        recipes = [
            text if isinstance(text, str) else json.dumps(text, indent=1, ensure_ascii=False)
            for text in results.recipe[:MOST_RECIPES]
        ]
        return [shell(c) for c in results.commands[:MOST_COMMANDS]], recipes

    def render(self, value: tuple[list[str], list[str]]) -> Sequence[Block]:
        """Return each as it was given."""
        commands, recipes = value
        blocks: list[Block] = [Code(c, f"Command {i}") for i, c in enumerate(commands, 1)]
        if not commands:
            blocks = [paragraph("No command was recorded.")]
        for i, text in enumerate(recipes, 1):
            title = "Recipe" if len(recipes) == 1 else f"Recipe {i}"
            blocks += [Heading(title), Code(text, f"Recipe {i}")]
        return blocks
