"""A report's results in others' formats: Hub model card, SPDX 3.0.1, SCI, AI Act Annex XI items,
LaTeX, BibTeX.

Formats only: none of these claims a certificate, a rating or compliance.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import Any

from greenvis.errors import BadInput, nearest
from greenvis.meters.pricing import JOULES_PER_KWH
from greenvis.report import figures, formatting, measures, paper, verdict
from greenvis.report.arm_results import ArmResults
from greenvis.report.estimates import Estimate
from greenvis.report.markup import md
from greenvis.report.results_file import to_json
from greenvis.report.shape import Results

NAMES = {
    "model-card.md": "Hub model card",
    "spdx.json": "SPDX 3.0.1",
    "sci.json": "SCI",
    "annex-xi.json": "AI Act Annex XI items",
    "table.tex": "LaTeX table",
    "methods.txt": "methods paragraph",
    "citation.bib": "BibTeX",
}
HUB_TASKS = {  # by the name of ours; the Hub has no word for others
    "classification": "image-classification", "multilabel": "image-classification",
    "segmentation": "image-segmentation", "detection": "object-detection",
    "image_text": "zero-shot-image-classification",
    "generation": "unconditional-image-generation",
}  # fmt: skip


def files(results: Results) -> dict[str, str]:
    """Return the exports by file name; the model card is that of the arm in the verdict."""
    return {
        "model-card.md": model_card(results, verdict.headline(results)),
        "spdx.json": _json(spdx(results)),
        "sci.json": _json(sci(results)),
        "annex-xi.json": _json(annex_xi(results)),
        "table.tex": paper.table(results),
        "methods.txt": paper.methods(results) + "\n",
        "citation.bib": paper.bibtex(results),
    }


def model_card(results: Results, arm: str) -> str:
    """Return a model card (Markdown with metadata on top) for one arm, as the Hugging Face Hub
    reads it.

    `co2_eq_emissions.emissions` is in grams, for training one model: the mean over seeds. Raises
    BadInput for an unknown arm.
    """
    row = _row(results, arm)
    meta: dict[str, Any] = {"library_name": "greenvis", "tags": ["greenvis", "energy-efficiency"]}
    data = next((d for d in results.data if isinstance(d, dict)), {})
    ref, origin = _origin(row)
    if origin and ref:
        meta["base_model"] = ref
    if data.get("name"):
        meta["datasets"] = [str(data["name"])]
    grams = row.carbon_g
    if grams.value is not None:
        how = (
            f"greenvis, {row.train_energy_j.provenance}: {row.train_energy_j.method}; "
            f"{grams.method}"
        )
        how += "; the grid is assumed" if row.assumed_grid else ""
        meta["co2_eq_emissions"] = {
            "emissions": grams.value,
            "source": how,
            **_training_type(results, row),
            "geographical_location": ", ".join(row.zones) or "unknown",
            "hardware_used": ", ".join(_hardware(results)) or "unknown",
        }
    metric = results.metric
    task = results.task or ("classification" if metric == measures.DEFAULT else "")
    if row.gain.mean is not None and data.get("name"):
        result = {
            "task": {"type": HUB_TASKS.get(task, "other")},
            "dataset": {"name": str(data["name"]), "type": str(data["name"])},
            "metrics": [
                {
                    "type": metric,
                    "value": row.gain.mean,
                    "name": f"{measures.written(results.measure)}{measures.suffix(results.measure)}"
                    f", mean of {row.gain.n} seed(s)",
                }
            ],
        }
        meta["model-index"] = [{"name": f"{results.name}/{arm}", "results": [result]}]
    # JSON is YAML
    front = "\n".join(f"{k}: {json.dumps(_clean(v), ensure_ascii=True)}" for k, v in meta.items())
    energy, n = row.train_energy_j, len(row.seeds)
    joules, band = (
        formatting.si(energy.value, "J"),
        f"{formatting.si(energy.low, 'J')} to {formatting.si(energy.high, 'J')}",
    )
    carbon = f"Carbon: {formatting.si(grams.value, 'g')} CO₂e."
    body = [
        f"# {md(results.name)}: {md(arm)}",
        md(verdict.sentence(results, arm)),
        md(
            f"Own training energy: {joules} ({band}, {energy.provenance or 'unknown'}). "
            f"{carbon} Mean of {n} seed(s)."
        ),
        *([md(_line(row))] if row.uses else []),
        md(f"{origin or 'Weights: trained here from random ones.'} {_prepared(data)}".rstrip()),
    ]
    return f"---\n{front}\n---\n\n" + "\n\n".join(body) + "\n"


def spdx(results: Results) -> dict[str, Any]:
    """Return an SPDX 3.0.1 document (JSON-LD) with one AI package for each finished arm and its
    energy in kWh."""
    key = hashlib.sha256(to_json(results).encode()).hexdigest()[:32]
    base = f"urn:spdx:greenvis:{key}"
    info, agent, document = "_:creationinfo", f"{base}:agent", f"{base}:document"
    arms = [a for a in results.order if results.arms[a].train_energy_j.value is not None]
    packages = [_package(results, a, f"{base}:arm{i}", info) for i, a in enumerate(arms)]
    created = datetime.datetime.fromtimestamp(results.newest_run_s, datetime.UTC).strftime(
        "%Y-%m-%dT%H:%M:%SZ"
    )
    graph = [
        {
            "type": "CreationInfo",
            "@id": info,
            "specVersion": "3.0.1",
            "created": created,
            "createdBy": [agent],
        },
        {"type": "SoftwareAgent", "spdxId": agent, "creationInfo": info, "name": "greenvis"},
        *packages,
        {
            "type": "SpdxDocument",
            "spdxId": document,
            "creationInfo": info,
            "name": figures.clean(results.name),
            "profileConformance": ["core", "software", "ai"],
            "rootElement": [p["spdxId"] for p in packages] or [agent],
        },
    ]
    return {"@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld", "@graph": graph}


def _package(results: Results, arm: str, spdx_id: str, info: str) -> dict[str, Any]:
    row = results.arms[arm]
    kind = "ai_finetuningEnergyConsumption" if _tuned(row) else "ai_trainingEnergyConsumption"
    consumption: dict[str, Any] = {
        "type": "ai_EnergyConsumption",
        kind: [_kwh(row.train_energy_j.value)],
    }
    if row.inference_energy_j.value is not None:
        consumption["ai_inferenceEnergyConsumption"] = [_kwh(row.inference_energy_j.value)]
    reading = row.train_energy_j
    band = f"{_plain(reading.low)} to {_plain(reading.high)}"
    out = {
        "type": "ai_AIPackage",
        "spdxId": spdx_id,
        "creationInfo": info,
        "name": figures.clean(f"{results.name}/{arm}"),
        "ai_energyConsumption": consumption,
        "comment": f"Energy is {reading.provenance} ({reading.method}), {band} kWh, the mean "
        f"of {reading.n} seed(s). "
        f"Inference energy is for one {results.unit}.",
    }
    metric, mean = results.metric, row.gain.mean
    if mean is not None:
        out["ai_metric"] = [{"type": "DictionaryEntry", "key": metric, "value": f"{mean:.6g}"}]
    return out


def _kwh(joules: float | None) -> dict[str, str]:
    return {
        "type": "ai_EnergyConsumptionDescription",
        "ai_energyQuantity": _plain(joules),
        "ai_energyUnit": "kilowattHour",
    }


def _plain(joules: float | None) -> str:
    """Return joules as kWh in plain decimal digits: xsd:decimal knows no exponent."""
    return f"{(joules or 0.0) / JOULES_PER_KWH:.15f}".rstrip("0").rstrip(".") or "0"


def sci(results: Results) -> dict[str, Any]:
    """Return the Software Carbon Intensity of one inference by arm: ((E × I) + M) / R, the terms
    apart."""
    return {
        "standard": "ISO/IEC 21031:2024",
        "boundary": f"one {results.unit} through the model; training, network and storage are "
        "outside it",
        "functional_unit": f"one {results.unit}",
        "arms": {
            a: {
                "e_kwh": s.e_kwh,
                "i_g_per_kwh": s.i_g_per_kwh,
                "m_g": s.m_g,
                "sci_g_per_image": s.g_per_image,
                "note": "no embodied carbon was given: M is not counted" if s.m_g is None else "",
            }
            for a, s in ((a, results.arms[a].sci) for a in results.order)
        },
    }


def annex_xi(results: Results) -> dict[str, Any]:
    """Return, arm by arm, the figures that items 2(d) and 2(e) of the EU AI Act's Annex XI ask for.
    A format, no compliance."""
    return {
        "format": "Regulation (EU) 2024/1689, Annex XI, section 1, items 2(d) and 2(e)",
        "arms": {
            a: {
                "2d_training_flops": row.train_flops,
                "2d_training_time_s": row.wall_s,
                "2d_hardware": _hardware(results),
                "2d_seeds": row.seeds,
                "2e_energy_kwh": _per_kwh(row.train_energy_j),
                "2e_known_or_estimated": row.train_energy_j.provenance,
                "2e_method": row.train_energy_j.method,
                "2e_base_energy_kwh": _per_kwh(row.base_reuse.whole_j) if row.base_reuse else None,
                "2e_not_counted": row.unknown,
            }
            for a, row in ((a, results.arms[a]) for a in results.order)
        },
    }


def _per_kwh(reading: Estimate) -> dict[str, float | None]:
    bounds = {"value": reading.value, "low": reading.low, "high": reading.high}
    return {k: None if j is None else j / JOULES_PER_KWH for k, j in bounds.items()}


def _line(row: ArmResults) -> str:
    """Return what the whole line of a model took, and what of it nobody knows."""
    line = formatting.si(row.train_energy_with_reuse_j.value, "J")
    names = ", ".join(dict.fromkeys(f"{u.role} {u.name}" for u in row.uses))
    return f"With all it builds on ({names}): {line}.{verdict.not_counted(row)}"


def _origin(row: ArmResults) -> tuple[str, str]:
    """Return the reference of an arm's network, and where its weights began, where that is on
    record: with others or with a run of ours."""
    ref = str(row.network[0]) if row.network and row.network[0] else ""
    bases = list(dict.fromkeys(u.name for u in row.uses if u.role == "base"))
    if not bases:
        return ref, ""
    licence = ", under the licence their makers gave them (not on record)" if row.unknown else ""
    return ref, f"Weights: began as {', '.join(bases)}{licence}."


def _prepared(data: dict[str, Any]) -> str:
    """Return how images were prepared, as the records state it."""
    size, channels, classes = (data.get(k) for k in ("img_size", "in_chans", "classes"))
    if not size:
        return ""
    text = f"Images: {size} × {size} pixels, {channels} channel{'' if channels == 1 else 's'}"
    mean, std = data.get("mean"), data.get("std")
    text += f", less the mean {mean}, divided by {std}" if mean and std else ""
    chosen = f" (numbers {data['only']} of the set's)" if data.get("only") else ""
    return f"{text}; {classes} classes{chosen}." if classes else f"{text}."


def _tuned(row: ArmResults) -> bool:
    """Whether the arm starts from a trained base, or trains a part of a model only."""
    learned, total = row.trainable_params, row.params
    return any(u.role == "base" for u in row.uses) or (
        learned is not None and total is not None and learned < total
    )


def _training_type(results: Results, row: ArmResults) -> dict[str, str]:
    """Return the Hub's word for how the arm was trained; none where the records do not say what it
    began with."""
    if _tuned(row):
        return {"training_type": "fine-tuning"}
    return {"training_type": "pre-training"} if results.models else {}


def _hardware(results: Results) -> list[str]:
    env = results.environment
    return [
        str(
            (value.get("name") or value.get("model") or value) if isinstance(value, dict) else value
        )
        for value in (*env.cpu, *env.gpu)
    ]


def _row(results: Results, arm: str) -> ArmResults:
    if arm not in results.arms:
        raise BadInput(f"no arm '{arm}' in this report{nearest(arm, results.arms)}")
    return results.arms[arm]


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_clean(v) for v in value]
    return figures.clean(value) if isinstance(value, str) else value


def _json(value: Any) -> str:
    # for people to read; of thousands it would take long
    many = len(value.get("arms") or value.get("@graph") or ()) > 100
    return json.dumps(value, indent=None if many else 1, ensure_ascii=False, allow_nan=False) + "\n"
