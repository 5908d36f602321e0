"""Exports are what their readers accept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import synthetic
from huggingface_hub import ModelCard

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.report import exports, page, paper, report, results
from greenvis.report.shape import Results

REPORTS = Path(__file__).parents[2] / "reports"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(synthetic.study(tmp_path_factory.mktemp("runs")))


def test_model_card_is_read_by_the_hub_library(found: Results) -> None:
    card = ModelCard(exports.model_card(found, "lora"))
    emitted: Any = card.data.get("co2_eq_emissions")
    assert emitted["emissions"] == pytest.approx(found.arms["lora"].carbon_g.value)  # grams
    assert emitted["geographical_location"] == "WORLD"
    assert "assumed" in emitted["source"]
    assert card.data.library_name == "greenvis"
    [result] = card.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("accuracy", pytest.approx(0.887))
    assert "not yet decided" in card.text
    assert "Weights: trained here from random ones" in exports.model_card(found, "baseline")
    with pytest.raises(BadInput, match="did you mean 'lora'"):
        exports.model_card(found, "lorra")


def test_exports_speak_the_metric_unit_and_task_of_the_records(tmp_path: Path) -> None:
    measure = {"name": "frechet", "unit": "", "higher_is_better": False}
    task = {"name": "generation", "unit": "generated image", "metrics": [measure]}
    for seed in (0, 1):
        facts = {"task": task, "frechet": 3.0 + seed}
        synthetic.write(tmp_path, "vae", seed=seed, accuracy=None, facts=facts)
    found = results(tmp_path)
    assert found.task == "generation"
    [result] = ModelCard(exports.model_card(found, "vae")).data.eval_results or []
    assert (result.task_type, result.metric_type) == ("unconditional-image-generation", "frechet")
    assert result.metric_value == pytest.approx(3.5)
    assert result.metric_name == "Fréchet distance, mean of 2 seed(s)"
    assert exports.sci(found)["functional_unit"] == "one generated image"
    assert r"energy and Fr{\'e}chet distance of" in paper.bibtex(found)
    assert "accuracy" not in "".join(exports.files(found).values())


def test_a_tuned_base_is_fine_tuning(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "tuned", uses=[{**synthetic.teacher(), "role": "base"}])
    found = results(tmp_path)
    assert '"training_type": "fine-tuning"' in exports.model_card(found, "tuned")
    [package] = [e for e in exports.spdx(found)["@graph"] if e["type"] == "ai_AIPackage"]
    assert "ai_finetuningEnergyConsumption" in package["ai_energyConsumption"]


def test_spdx_holds_energy_in_kwh(found: Results) -> None:
    document = exports.spdx(found)
    packages = {e["name"]: e for e in document["@graph"] if e["type"] == "ai_AIPackage"}
    assert len(packages) == 4  # the unfinished arm has none
    assert "ai_finetuningEnergyConsumption" in packages["fashion-lora/lora"]["ai_energyConsumption"]
    [quantity] = packages["fashion-lora/baseline"]["ai_energyConsumption"][
        "ai_trainingEnergyConsumption"
    ]
    assert float(quantity["ai_energyQuantity"]) * 3.6e6 == pytest.approx(
        found.arms["baseline"].train_energy_j.value
    )
    assert "e" not in quantity["ai_energyQuantity"]  # xsd:decimal
    assert quantity["ai_energyUnit"] == "kilowattHour"


def test_spdx_is_read_by_its_library(found: Results, tmp_path: Path) -> None:
    model = pytest.importorskip(
        "spdx_python_model", reason="spdx-python-model is not installed"
    ).v3_0_1
    file = tmp_path / "spdx.json"
    file.write_text(json.dumps(exports.spdx(found)))
    objects = model.SHACLObjectSet()
    with file.open("rb") as f:
        model.JSONLDDeserializer().read(f, objects)
    objects.create_index()
    assert not objects.missing_ids
    assert len(list(objects.foreach_type(model.ai_AIPackage))) == 4


def test_sci_is_e_times_i_plus_m(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "plain")
    made = {"embodied": {"kg": 1200.0, "lifetime_years": 4.0, "share": 0.1}}
    synthetic.write(
        tmp_path, "made", header={**made, "pue": 1.5, "carbon_intensity": synthetic.FRANCE}
    )
    arms = exports.sci(results(tmp_path))["arms"]
    assert arms["plain"]["m_g"] is None
    assert "not counted" in arms["plain"]["note"]
    assert arms["plain"]["sci_g_per_image"] == pytest.approx(arms["plain"]["e_kwh"] * 475)
    assert arms["made"]["m_g"] == pytest.approx(1200e3 * 0.1 / (4 * 365.25 * 86400) / 212.0)
    assert arms["made"]["sci_g_per_image"] == pytest.approx(
        arms["made"]["e_kwh"] * 56 * 1.5 + arms["made"]["m_g"]
    )


def test_annex_xi_items_and_bibtex(found: Results) -> None:
    item = exports.annex_xi(found)["arms"]["lora"]
    assert item["2d_training_flops"] > 0
    assert item["2e_known_or_estimated"] == "estimated"
    assert item["2e_energy_kwh"]["value"] * 3.6e6 == pytest.approx(
        found.arms["lora"].train_energy_j.value
    )
    entry = paper.bibtex(found)
    assert entry.startswith("@misc{greenvis-fashion-lora,")
    assert "year = {2025}" in entry
    assert (
        paper.bibtex(found.model_copy(update={"name": "100% $x_1$ \\a{b}"})).count(
            r"100\% \$x\_1\$ \textbackslash{}a\{b\}"
        )
        == 1
    )


def test_all_files_are_written_and_named(found: Results) -> None:
    files = exports.files(found)
    assert set(files) == set(exports.NAMES)
    for name, text in files.items():
        if name.endswith(".json"):
            json.loads(text)


def test_the_table_is_latex(found: Results) -> None:
    walker = pytest.importorskip("pylatexenc.latexwalker", reason="pylatexenc is not installed")
    nasty = found.model_copy(update={"title": r"100 % of $x_1$ \\ & \end{table} ß漢é ≤ ~^"})
    for content in (found, nasty):
        text = paper.table(content)
        assert text.isascii()
        nodes, _, _ = walker.LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
        environments = [
            n.environmentname for n in nodes if n.isNodeType(walker.LatexEnvironmentNode)
        ]
        assert environments == ["table"]
        body = text.partition("\\toprule")[2].partition("\\bottomrule")[0]
        rows = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(rows) == 1 + len(content.order)
        columns = text.partition("\\begin{tabular}{")[2].partition("}")[0]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_the_table_compiles(found: Results, tmp_path: Path) -> None:
    head = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}\n{paper.table(found)}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_the_methods_paragraph_names_what_reviewers_ask(found: Results) -> None:
    text = paper.methods(found)
    for words in (
        "AMD EPYC", "CPU: cpu_time, estimated at 4 W per busy CPU (2.9 to 5.8)",
        "WORLD, 475 g CO₂e per kWh (30 to 900)", "assumed", "1 to 3 seeds", "kWh (", "Dunnett",
        "within 0.5 points", "bases and teachers",
    ):  # fmt: skip
        assert words in text, words
    assert [question for question, _ in paper.reviewers(found)] == [
        "Energy of all runs", "CO₂e of all runs", "Hardware", "Region", "How measured",
    ]  # fmt: skip
    flagship = json.loads((REPORTS / "flagship" / "results.json").read_text())
    known = paper.methods(Results.from_json(flagship))
    for words in (
        "AMD EPYC",
        "CPU: cpu-time model, estimated at",
        "475 g CO₂e per kWh",
        "2 seeds",
        "kWh (",
    ):
        assert words in known, words


def test_the_citation_is_that_of_the_package() -> None:
    text = (REPORTS.parent / "CITATION.cff").read_text()
    assert f"version: {gv.__version__}\n" in text
    assert "license: Apache-2.0" in text


@pytest.mark.slow
def test_figures_are_pdf_where_that_is_asked_for(tmp_path: Path) -> None:
    for seed in (0, 1):
        synthetic.write(tmp_path / "runs", "one", seed)
    folders = [report(tmp_path / "runs", out=tmp_path / o, pdf=True).parent for o in "ab"]
    drawn = {p.name: p.read_bytes() for p in folders[0].glob("figures/*.pdf")}
    assert {p.stem for p in folders[0].glob("figures/*.svg")} == {
        n.removesuffix(".pdf") for n in drawn
    }
    assert all(data.startswith(b"%PDF") and b"/FontFile2" in data for data in drawn.values())
    assert drawn == {p.name: p.read_bytes() for p in folders[1].glob("figures/*.pdf")}
    page.write(results(tmp_path / "runs"), folders[0])
    assert not list(folders[0].glob("figures/*.pdf"))  # those of the report before are gone
