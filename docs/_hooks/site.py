"""What MkDocs calls as it builds the site: pages made from the package, links out of docs/, and
the committed reports beside the pages."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import notebooks
import pages
import pretexts
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

TUTORIALS = {  # in the order of the menu
    "own_images": "Your folder of images",
    "own_loop": "Your own training loop",
    "few_labels": "Forty labels",
    "serve_cheaper": "Cheaper answers",
}
MARKER = re.compile(r"\{\{ (\w+)(?::([\w, ]+))? \}\}")
MARKERS = {
    "techniques": pages.technique_list,
    "measured": pages.measured,
    "pretexts": pretexts.committed,
    "data_sets": pages.data_table,
    "label_seconds": pages.seconds_table,
    "typical": lambda names: pages.typical(*(n.strip() for n in names.split(","))),
}
LINK = re.compile(r"\[([^\]\n]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
REPORTS = "reports"


def on_config(config: Any) -> None:
    """Put the generated pages into the menu."""
    cards = [
        {title.partition(":")[0]: [{n: f"techniques/{n}.md"} for n in names]}
        for title, names in _by_stage().items()
    ]
    tutorials = [{title: f"tutorials/{name}.md"} for name, title in TUTORIALS.items()]
    for entry in config.nav:
        entry.update({k: [*v, *cards] for k, v in entry.items() if k == "Techniques"})
        entry.update({k: tutorials for k in entry if k == "Tutorials"})


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    made = {f"techniques/{name}.md": pages.card(name) for name in pages.techniques()}
    with ThreadPoolExecutor(2) as two:  # each runs in a process of its own
        tutorials = two.map(notebooks.page, map(_notebook, TUTORIALS))
        made |= {f"tutorials/{n}.md": page for n, page in zip(TUTORIALS, tutorials, strict=True)}
    made |= {
        "extending.md": pages.extending(),
        "reference/functions.md": pages.public_functions(),
        "reference/techniques.md": pages.public_techniques(),
        "reference/commands.md": pages.commands(),
        "reference/recipes.md": pages.recipe_fields(),
    }
    made |= {
        f"reports/{path.parent.name}/report.md": path.read_text()
        for path in (pages.ROOT / REPORTS).glob("*/report.md")
        if not (path.parent / "index.html").exists()
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and lead links out of docs/ to where they lead on the site."""

    def fill(match: re.Match[str]) -> str:
        make, words = MARKERS[match[1]], match[2]
        return make(words) if words else make()

    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    if source.startswith(f"{REPORTS}/"):  # its figures lie beside it
        name = source.split("/")[1]
        return LINK.sub(lambda m: f"[{m[1]}](report:{name}/{m[2]})", markdown)
    text = MARKER.sub(fill, markdown)
    folder = (pages.DOCS / source).parent
    if source == "extending.md":  # made from CONTRIBUTING.md, whose links lead from there
        folder = pages.ROOT
    elif source.startswith("tutorials/"):
        folder = pages.ROOT / "examples"
    return LINK.sub(lambda match: _outward(match, folder, source), text)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Make links to reports' own pages and figures relative: MkDocs does not know of them."""
    up = os.path.relpath(REPORTS, os.path.dirname(page.file.src_uri) or ".")
    return re.sub(r'(href|src)="report:', lambda m: f'{m[1]}="{up}/', html)


def on_post_build(config: Any) -> None:
    """Put the committed reports beside the pages."""
    skip = shutil.ignore_patterns("*.jsonl.xz", ".*")
    site = Path(config.site_dir) / REPORTS
    shutil.copytree(pages.ROOT / REPORTS, site, dirs_exist_ok=True, ignore=skip)


def _by_stage() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {title: [] for title in pages.STAGES.values()}
    for name in pages.techniques():
        names[pages.STAGES[pages.survey_stage(name)]].append(name)
    return names


def _notebook(name: str) -> Path:
    return pages.ROOT / "examples" / f"{name}.ipynb"


def _outward(match: re.Match[str], folder: Path, source: str) -> str:
    """Return a link as the site has it."""
    text, target, anchor = match[1], match[2], match[3] or ""
    path = Path(os.path.normpath(folder / target))
    up = os.path.relpath(".", os.path.dirname(source) or ".")
    if path.is_relative_to(pages.DOCS):  # MkDocs checks it
        return f"[{text}]({up}/{path.relative_to(pages.DOCS)}{anchor})"
    if not path.exists():
        raise PluginError(f"{source}: the link to {target} leads nowhere")
    inside = path.relative_to(pages.ROOT)
    if inside.parts[0] == REPORTS and len(inside.parts) > 1:
        name = inside.parts[1]
        if path.suffix == ".svg":
            return f"[{text}](report:{path.relative_to(pages.ROOT / REPORTS)})"
        if (pages.ROOT / REPORTS / name / "index.html").exists():
            return f"[{text}](report:{name}/index.html)"
        return f"[{text}]({up}/{REPORTS}/{name}/report.md)"
    if inside.name == "CONTRIBUTING.md":
        return f"[{text}]({up}/extending.md{anchor})"
    if inside.stem in TUTORIALS:
        return f"[{text}]({up}/tutorials/{inside.stem}.md)"
    return text if text.strip("`") == inside.as_posix() else f"{text} (`{inside.as_posix()}`)"
