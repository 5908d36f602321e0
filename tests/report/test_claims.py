"""Every committed report and their overview say what the intervals beside them say, and
leave no base out.

Intervals are computed here anew, from the values by seed in results.json; sentences and marks are
read off the pages.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenvis.report import verdict as verdicts
from greenvis.report.measures import named, title
from greenvis.report.overview import markdown, overview
from greenvis.report.shape import Results
from greenvis.report.simultaneous import quantile

ROOT = Path(__file__).parents[2]
ALL = sorted(p for p in (ROOT / "reports").glob("*/results.json"))
COMPARING = [p for p in ALL if "baseline" in json.loads(p.read_text())]
HALF = 0.0051  # of the last digit printed of a difference in points
each = pytest.mark.parametrize("path", COMPARING, ids=lambda p: p.parent.name)


@cache
def _found(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@cache
def _page(path: Path) -> str:
    """The Markdown page without its escapes."""
    text = (path.parent / "report.md").read_text()
    text = (
        text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("\u2060", "")
    )
    return re.sub(r"\\([^A-Za-z0-9\s])", r"\1", text).replace("\u00a0", " ")


def _by_seed(row: dict[str, Any], key: str, metric: str) -> dict[str, float]:
    return row[key]["by_seed"] if key == metric else row[f"{key}_j"]["by_seed"]


QUANTITIES = ("train_energy", "train_energy_with_reuse", "inference_energy")


def _groups(found: dict[str, Any], key: str) -> dict[str, list[float]]:
    """Values of the metric, or logarithms of an energy, by arm."""
    metric, out = found["metric"], {}
    for arm, row in found["arms"].items():
        values = list(_by_seed(row, key, metric).values()) if row["seeds"] else []
        if values:
            out[arm] = values if key == metric else [math.log(v) for v in values]
    return out


@cache
def _all_ends(path: Path, key: str) -> dict[str, tuple[float, float, float]]:
    """Mean and simultaneous interval of each arm's difference to the baseline, for arms of two
    seeds."""
    found = _found(path)
    groups, base = _groups(found, key), found["baseline"]
    n = {a: len(v) for a, v in groups.items()}
    df = sum(n.values()) - len(n)
    rivals = [a for a in n if a != base and n[a] > 1] if n.get(base, 0) > 1 else []
    if not rivals:
        return {}
    squares = sum(float(np.sum((np.array(v) - np.mean(v)) ** 2)) for v in groups.values())
    shares = [n[a] / (n[a] + n[base]) for a in rivals]
    c, known = quantile(df, shares), quantile(math.inf, shares)
    out = {}
    for a in rivals:
        half = c * math.sqrt(squares / df * (1 / n[a] + 1 / n[base]))
        if key == "inference_energy":
            spread = {
                x: found["arms"][x]["inference_energy_j"].get("spread", 0.0) for x in (a, base)
            }
            half = max(half, known * math.hypot(*(spread[x] / math.sqrt(n[x]) for x in (a, base))))
        if key == found["metric"]:
            half = max(half, _one_image(found))
        else:
            floor = (found.get("noise_floor") or {}).get(
                "serving" if key == "inference_energy" else "training"
            )
            half += math.log(floor["ratio"]) if floor else 0.0
        mean = float(np.mean(groups[a]) - np.mean(groups[base]))
        out[a] = mean, mean - half, mean + half
    return out


def _one_image(found: dict[str, Any]) -> float:
    """What one image of the smallest test is worth, of a share."""
    tests = [d["test"] for d in found["data"] if isinstance(d, dict) and d.get("test")]
    unit = found.get("metric_unit", named(found["metric"]).unit)
    return 1 / min(tests) if tests and unit == "%" else 0.0


def _gained(found: dict[str, Any], low: float, high: float) -> tuple[float, float]:
    """The interval of the metric so that more is better."""
    return (-high, -low) if found["lower_is_better"] else (low, high)


def _margin(found: dict[str, Any]) -> float:
    """What may be lost, in the metric's own unit: of a share it is written in points."""
    return found["margin"] / (100 if found.get("metric_unit", "%") == "%" else 1)


def _title(found: dict[str, Any]) -> str:
    """The head of the metric's column."""
    return title(named(found["metric"])).replace("\u2060", "")


def _compared(found: dict[str, Any]) -> list[str]:
    return [a for a in found["order"] if a != found["baseline"] and found["arms"][a]["vs_baseline"]]


@each
def test_intervals_and_what_they_decide_are_those_of_the_values_by_seed(path: Path) -> None:
    found = _found(path)
    metric, margin = found["metric"], _margin(found)
    assert found["comparisons"] == len(_all_ends(path, "train_energy"))
    for arm in _compared(found):
        vs = found["arms"][arm]["vs_baseline"]
        if arm in (ends := _all_ends(path, metric)):
            mean, low, high = ends[arm]
            assert [vs[metric][k] for k in ("mean", "low", "high")] == pytest.approx(
                [mean, low, high], abs=1e-9
            )
            low, high = _gained(found, low, high)
            verdict = (
                "keeps" if low >= -margin else "loses" if high < -margin else "not yet decided"
            )
            assert vs[metric]["verdict"] == verdict, arm
        for key in QUANTITIES:
            if arm in (ends := _all_ends(path, key)):
                each = [math.exp(max(-700.0, min(700.0, x))) for x in ends[arm]]
                known = [vs[key][k] for k in ("ratio", "low", "high")]
                assert known == pytest.approx(each, rel=1e-6), (arm, key)


GAIN = re.compile(
    r"([+−]?[\d.]+)(?: points)? \(95 % interval ([+−]?[\d.]+) to ([+−]?[\d.]+)\): (\w+)"
)
NUMBER = r"(?:over |under )?[\d.,]+"
SHOWN = re.compile(
    rf"({NUMBER}) (times|%) (less|more) (?:training )?energy(?: per image)?(?: "
    rf"\(({NUMBER})–({NUMBER})\))?"
)
OPEN = re.compile(
    rf"no difference shown in (?:training )?energy(?: per image)? \(×({NUMBER}), "
    rf"({NUMBER})–({NUMBER})\)"
)


def _number(text: str) -> float:
    return float(
        text.replace("−", "-").replace(",", "").removeprefix("over ").removeprefix("under ")
    )


def _check_sentences(text: str, margin: float, lower: bool = False) -> int:
    for _, low, high, word in GAIN.findall(text):
        least, most = _gained({"lower_is_better": lower}, _number(low), _number(high))
        fine = {
            "kept": least >= -margin - HALF,
            "loses": most < -margin + HALF,
            "not": least < -margin + HALF and most >= -margin - HALF,
        }
        assert fine[word], (low, high, word)
    for k, unit, _, near, far in SHOWN.findall(text):
        ends = [_number(x) for x in (near, far) if x] or [_number(k)]
        assert all(end >= (1 if unit == "times" else 0) for end in ends), (k, unit, near, far)
    for _, low, high in OPEN.findall(text):
        assert _number(low) <= 1 <= _number(high), (low, high)
    return len(GAIN.findall(text))


@each
def test_sentences_agree_with_the_interval_in_them(path: Path) -> None:
    found = _found(path)
    details = _page(path).partition("## Every arm in detail")[2].partition("### What was gained")[0]
    said = _check_sentences(details, found["margin"], found["lower_is_better"])
    assert said == len(_all_ends(path, found["metric"]))


MARKS = {"keeps": "●", "not yet decided": "○", "loses": "▽"}
CELL = re.compile(rf"×({NUMBER}) \(({NUMBER})–({NUMBER})\)")


@each
def test_a_mark_and_bold_in_the_table_of_arms_are_what_its_interval_says(path: Path) -> None:
    found = _found(path)
    rows = {row["Arm"]: row for row in _of_page(path)[0]}
    ends = _all_ends(path, found["metric"])
    for arm in _compared(found):
        row = next(r for a, r in rows.items() if re.split(r" \(|<br>", _unescaped(a))[0] == arm)
        change = next(cell for head, cell in row.items() if head.startswith("Δ"))
        verdict = found["arms"][arm]["vs_baseline"][found["metric"]]
        assert change[0] == MARKS[verdict["verdict"]] if arm in ends else change[0] not in "●○▽"
        for head, cell in row.items():
            if m := CELL.search(cell):
                low, high = _number(m[2]), _number(m[3])
                if 1 not in (low, high):  # else it is rounded
                    assert cell.startswith("**") == (not low <= 1 <= high), (arm, head, cell)


@each
def test_the_first_screen_says_what_the_intervals_say(path: Path) -> None:
    """The sentence, the tiles and the marks, against the intervals of the arm they are about."""
    found = _found(path)
    content = Results.from_json(found)
    chosen = verdicts.choice(content)
    text = _page(path).partition("## Arms")[0]
    (sentence,) = re.findall(r"^\*\*(.+)\*\*$", text, re.M)
    assert sentence == _plain(verdicts.opening(content))
    ends, arm = _all_ends(path, found["metric"]), chosen.arm
    low, high = _gained(found, *ends[arm][1:]) if arm in ends else (0.0, 0.0)
    if " keeps its " in sentence:
        assert low >= -_margin(found)
    better = "gains|lowers the" if found["lower_is_better"] else "gains|raises the"
    worse = "loses|raises the" if found["lower_is_better"] else "loses|lowers the"
    if re.search(rf" ({better}) ", sentence):
        assert low > 0
    if re.search(rf" ({worse}) ", sentence):
        assert high < -_margin(found)
    if m := re.search(
        r"([\d.]+) (?:times|%) (less|more) (training energy|energy)(?! per)", sentence
    ):
        if chosen.why == "saves":
            r = chosen.distance.ratio
            assert r is not None
            assert m[2] == "less"
            assert (r.high or 9) < 1
        else:
            key = verdicts.cost(content, arm)
            key = "train_energy_with_reuse" if m[3] == "energy" else key
            _, low, high = _all_ends(path, key)[arm]
            assert (high < 0) if m[2] == "less" else (low > 0)
    shown = re.findall(r"^- .*: \*\*(.+?)\*\* \((.*)\)$", text, re.M)
    assert len(shown) == 3
    for value, sub in shown[::2]:
        if m := re.match(r"95 %: ([\d.]+)–", sub):
            assert value.endswith(("less", "more"))
            assert float(m[1]) > (1 if "times" in value else 0)
        assert not value.startswith("×") or "no difference shown" in sub


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.parent.name)
def test_no_other_test_is_cited(path: Path) -> None:
    for page in (
        *path.parent.glob("*.md"),
        *path.parent.glob("index.html"),
        *path.parent.glob("exports/*.md"),
    ):
        assert not re.search(r"p = 0|p < 0|Holm|(?<!no )difference shown \(p", page.read_text()), (
            page
        )


def _tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables of a page, each a list of rows by column."""
    out = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *rows = (
            [c.strip() for c in line.strip("|\n").split(" | ")] for line in block.splitlines()
        )
        out.append([dict(zip(head, row, strict=False)) for row in rows])
    return out


@cache
def _of_page(path: Path) -> list[list[dict[str, str]]]:
    return _tables(_page(path))


def _cells(path: Path, title: str) -> dict[str, str]:
    """A column's cells by arm, {} where the page has no such column."""
    for rows in _of_page(path):
        if rows and title in rows[0]:
            return {re.split(r"<br>| \(", next(iter(row.values())))[0]: row[title] for row in rows}
    return {}


@each
def test_bold_in_a_table_is_what_its_interval_leaves_out(path: Path) -> None:
    found = _found(path)
    own = (
        "Own training energy"
        if any(r["uses"] for r in found["arms"].values())
        else "Training energy"
    )
    columns = {
        found["metric"]: f"{_title(found)} vs baseline",
        "train_energy": f"{own} ÷ baseline",
        "train_energy_with_reuse": "Energy ÷ baseline, base and teacher included",
        "inference_energy": f"One {found.get('unit', 'image')} ÷ baseline",
    }
    for key, head in columns.items():
        cells, ends = _cells(path, head), _all_ends(path, key)
        for arm in _compared(found) if cells else ():
            shown = arm in ends and not ends[arm][1] <= 0 <= ends[arm][2]
            assert cells[arm].startswith("**") == shown, (arm, head, cells[arm])
            assert shown or "×" not in cells[arm] or "no difference shown" in cells[arm]


@each
def test_the_headline_keeps_the_metric_at_less_energy_or_says_that_none_does(path: Path) -> None:
    found = _found(path)
    verdict = re.findall(r"^\*\*(.+)\*\*$", _page(path), re.M)[0]
    metric, good = found["metric"], []
    for arm in _compared(found):
        uses = found["arms"][arm]["uses"]
        goes_on = any(u["name"] == f"{found['name']}/{found['baseline']}" for u in uses)
        averages = (found["arms"][arm].get("continual") or {}).get("averages", [])[:-1]
        key = "inference_energy" if goes_on else "train_energy_with_reuse"
        gains, costs = _all_ends(path, metric), _all_ends(path, key)
        if arm in gains and arm in costs and not (averages and None in averages):
            low, _ = _gained(found, *gains[arm][1:])
            good += [arm] if low >= -_margin(found) and costs[arm][2] < 0 else []
    if asked := found.get("arm"):
        assert verdict.startswith(f"{asked} takes ")
        assert asked not in good or re.search(r" (keeps its|gains|lowers the|raises the) ", verdict)
    elif good:
        assert not verdict.startswith("No arm is shown to cost less than")
    elif _compared(found) and " than plain training with the same " not in verdict:
        assert verdict.startswith("No arm is shown to cost less than") or "one seed" in verdict


@each
def test_no_base_is_left_out_silently(path: Path) -> None:
    found, page = _found(path), _page(path)
    sentences = dict(
        re.findall(
            r"^- ([^ ,]+)((?:,| reached).*?)$",
            page.partition("## Every arm in detail")[2].partition("### What was")[0],
            re.M,
        )
    )
    builds = {
        **_cells(path, "Builds on"),
        **{f"{a} ": c for a, c in _cells(path, "Builds on, charged whole").items()},
    }
    for arm, row in found["arms"].items():
        known = [u for u in row["uses"] if u["energy_j"]["value"] is not None]
        unknown = [u["name"] for u in row["uses"] if u["energy_j"]["value"] is None]
        line, own = (row[k]["by_seed"] for k in ("train_energy_with_reuse_j", "train_energy_j"))
        assert all((line[s] > own[s]) == bool(known) for s in own), arm
        said = sentences.get(arm, "")
        if said and arm in _compared(found) and len(row["seeds"]) > 1:
            assert not known or "included" in said, (arm, said)
            assert all(
                f"Not counted, for its cost is not known: {name}" in said or name in said
                for name in unknown
            ), arm
        for name in unknown:
            assert any(name in text and "not known" in text for text in found["not_counted"]), name
            assert f"{name} (a " in page.partition("### Not counted")[2].partition("###")[0]
        for label in (arm, f"{arm} "):
            cell = builds.get(label, "")
            assert not (row["uses"] and re.match(r"(0 J|nothing|–)", cell)), (arm, cell)
            assert not unknown or "not known" in cell, (arm, cell)


@each
def test_one_seed_is_compared_with_nothing(path: Path) -> None:
    found, page = _found(path), _page(path)
    for arm in found["order"]:
        if len(found["arms"][arm]["seeds"]) == 1 and arm != found["baseline"]:
            said = re.findall(rf"^.*\b{re.escape(arm)} reached .*$", page, re.M)
            assert all(
                not re.search(
                    r"times (less|more)|% (less|more)|points \(",
                    text.partition(f"{arm} reached")[2],
                )
                for text in said
            )
            cells = _cells(path, "Training energy ÷ baseline") or _cells(
                path, "Own training energy ÷ baseline"
            )
            if cells:
                assert cells[arm].startswith("–"), cells[arm]
            else:  # a column of dashes is left out
                assert all(len(row["seeds"]) == 1 for row in found["arms"].values())


@each
def test_a_card_says_pre_training_of_nothing_that_builds_on_others_or_trains_a_part(
    path: Path,
) -> None:
    found = _found(path)
    card = (path.parent / "exports" / "model-card.md").read_text()
    (name,) = re.findall(r"^# (.+)$", card, re.M)
    arm = _unescaped(name).partition(": ")[2]
    row = found["arms"][arm]
    part = row["trainable_params"] < row["params"] or any(u["role"] == "base" for u in row["uses"])
    assert ('"training_type": "fine-tuning"' in card) == part
    assert ('"training_type": "pre-training"' in card) == (not part)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([^A-Za-z0-9\s])", r"\1", text)


def _plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def test_the_overview_agrees_with_the_intervals_in_it() -> None:
    text = markdown(overview(ROOT / "reports")).replace("\u00a0", " ")
    rows = next(rows for rows in _tables(text) if rows and "verdict" in rows[0])
    seen = 0
    for row in rows:
        name = re.findall(r"\[(.+?)\]", row["measured in"])[0]
        found = _found(ROOT / "reports" / name / "results.json")
        arm, gain, kept = _unescaped(row["arm"]), row["metric"], row["verdict"]
        if kept == "one seed":
            assert gain.split()[-1] == "–"  # behind a metric that is not accuracy
            continue
        _, low, high = (_number(x) for x in re.findall(r"[+−]?\d[\d.]*", gain))
        least, most, margin = (
            found["arms"][arm]["vs_baseline"][found["metric"]],
            0.0,
            found["margin"],
        )
        word = (
            "keeps"
            if least["low"] >= -margin / 100
            else "loses"
            if least["high"] < -margin / 100
            else "not yet decided"
        )
        assert (kept, "**" in gain) == (
            word,
            not low - HALF <= most <= high + HALF or not least["low"] <= 0 <= least["high"],
        )
        for column in (
            "energy to train, base and teacher included",
            "own share",
            "energy of an image",
        ):
            _check_ratio(row[column])
        known = found["arms"][arm]["vs_baseline"]["train_energy_with_reuse"]
        first = re.findall(rf"×({NUMBER})", row["energy to train, base and teacher included"])[0]
        assert _number(first) == pytest.approx(known["ratio"], rel=0.006)
        unknown = any(u["energy_j"]["value"] is None for u in found["arms"][arm]["uses"])
        assert ("not known" in row["energy to train, base and teacher included"]) == unknown
        seen += 1
    assert seen > 100
    said = 0
    for line in text.splitlines():
        of = re.match(r"- \*\*\[([\w-]+)\]\(", line)
        if of and "baseline" in _found(file := ROOT / "reports" / of[1] / "results.json"):
            (sentence,) = re.findall(r"^\*\*(.+)\*\*$", _page(file).partition("## Arms")[0], re.M)
            assert sentence in _unescaped(_of_line(line))  # which its own test reads
            said += 1
    assert said > 20


def _of_line(line: str) -> str:
    for escaped, text in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"), ("\u2060", "")):
        line = line.replace(escaped, text)
    return line


def _check_ratio(cell: str) -> None:
    if cell != "–":
        low, high = (_number(x) for x in re.findall(rf"\(({NUMBER})–({NUMBER})\)", cell)[0])
        shown = low > 1 or high < 1
        assert cell.startswith("**") == shown or 1 in (low, high), (
            cell
        )  # an end that rounds to 1 tells nothing here


def test_a_row_that_names_no_other_difference_has_none() -> None:
    """The arms of one report that are said to differ by their technique alone, against their
    recipes as greenvis reads them."""
    from greenvis.experiment.recipe import load_recipe
    from greenvis.report.overview import ALONE, overview

    rows = [row for row in overview(ROOT / "reports")["techniques"] if row["differs in"] == ALONE]
    assert rows
    read = cache(load_recipe)
    for row in rows:
        (command,) = re.findall(
            r"greenvis run (\S+\.yaml)", (Path(row["measured in"]).parent / "report.md").read_text()
        )[:1]
        recipe = read(ROOT / command)
        arm, base = (recipe.arm(name) for name in (row["arm"], row["against"]))
        assert (arm.model, arm.stream, arm.subset) == (base.model, base.stream, base.subset), row
        assert arm.train.model_copy(update={"seeds": ()}) == base.train.model_copy(
            update={"seeds": ()}
        ), row
        assert len(arm.techniques) == len(base.techniques) + 1


def _choices(page: str) -> list[str]:
    return re.findall(
        r"^- (?:[\d, or]+ training images were held out|No validation images were held out).*",
        page,
        re.M,
    )


@each
def test_every_report_says_on_which_images_choices_were_made(path: Path) -> None:
    """Thresholds and targets on images held out, or that none were; never nothing, never both."""
    found = _found(path)
    (said,) = _choices(_page(path))
    held = any(d.get("held_out") for d in found["data"] if isinstance(d, dict))
    assert ("were held out; thresholds" in said) == held
    assert ("may be too good" in said) != held
    calibrated = any(
        "early_exit" in t for a in found["arms"].values() for t in a.get("techniques") or ()
    )
    assert held or not calibrated
    reached = any(found["arms"][a].get("energy_to_baseline_j") for a in found["order"])
    assert ("is read off test images, epoch by epoch" in _page(path)) == reached


@each
def test_joules_and_grams_have_two_figures_where_they_are_estimated(path: Path) -> None:
    """Three only of what was measured, with a scatter below half a per cent (`formatting.reading`)."""
    if any(s["provenance"] == "measured" for s in _found(path)["sources"]):
        pytest.skip("a counter told these")
    body = _page(path).partition("### Environment")[0]
    long = re.findall(r"(?<![\d.,])(?:\d[\d,]*\.?\d*) [kMGmµn]?(?:J|g)\b(?! CO₂e per kWh)", body)
    assert long
    assert not [
        text
        for text in long
        if len(re.sub(r"^0+|\D", "", text.split()[0].replace(".", "")).rstrip("0")) > 2
    ]
    assert "Noise floor" in body


@each
def test_no_character_of_a_page_was_replaced(path: Path) -> None:
    for name in ("index.html", "report.md"):
        assert "\ufffd" not in (path.parent / name).read_text()
