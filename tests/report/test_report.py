"""Reports from records: the numbers, that they do not depend on where records lie, and that nothing
burnt is lost."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic

from greenvis.errors import BadInput
from greenvis.meters import grid, pricing, record
from greenvis.meters.record_writer import Writer
from greenvis.report import report, results, tables
from greenvis.report.folder import LIST
from greenvis.report.results_file import to_json
from greenvis.report.shape import Results
from greenvis.report.simultaneous import quantile

typed = Results.from_json


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.study(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def found(study: Path) -> dict[str, Any]:
    return results(study).as_json()


def _joules(path: Path, *, apart: bool) -> float:
    run = record.read(path)
    parts = pricing.phases(run)
    chosen = [
        r for p, c in parts.items() if apart or not p.startswith("measure") for r in c.values()
    ]
    return pricing.add(chosen).value or 0.0


def test_results_have_the_agreed_keys(found: dict[str, Any]) -> None:
    assert {
        "schema",
        "name",
        "baseline",
        "metric",
        "arms",
        "environment",
        "recipe",
        "command",
    } <= set(found)
    arm = found["arms"]["lora"]
    assert {
        "accuracy", "train_energy_j", "carbon_g", "macs", "train_flops", "params",
        "trainable_params", "delta_bytes",
        "latency_ms", "images_per_s", "peak_memory_mb", "wall_s", "vs_baseline", "uses", "status",
        "seeds", "attempts",
    } <= set(arm)  # fmt: skip
    assert {"mean", "std", "n"} <= set(arm["accuracy"])
    assert {"value", "low", "high", "provenance"} <= set(arm["train_energy_j"])
    assert found["baseline"] == "baseline"
    assert found["order"][0] == "baseline"


def test_training_energy_is_the_mean_over_seeds_of_what_led_to_the_result(
    study: Path, found: dict[str, Any]
) -> None:
    paths = {s: list((study / "lora" / f"seed{s}").glob("*.jsonl")) for s in range(3)}
    by_seed = {
        s: sum(
            _joules(p, apart=False) for p in of_seed if record.read(p).header["inputs"] != "older"
        )
        for s, of_seed in paths.items()
    }
    assert len(paths[2]) == 2  # one crashed, one resumed: both count
    assert found["arms"]["lora"]["train_energy_j"]["value"] == pytest.approx(
        sum(by_seed.values()) / 3
    )
    assert found["arms"]["lora"]["train_energy_j"]["by_seed"]["2"] == pytest.approx(by_seed[2])


def test_everything_burnt_is_in_the_totals(study: Path, found: dict[str, Any]) -> None:
    assert found["totals"]["energy_j"]["value"] == pytest.approx(
        sum(_joules(p, apart=True) for p in record.find([study]))
    )
    assert found["totals"]["unfinished_energy_j"]["value"] > 0
    assert found["arms"]["lora"]["spent"]["older_inputs_energy_j"]["value"] > 0
    [row] = found["incomplete"]
    assert (row["arm"], row["attempts"]) == ("diverged", ["failed"])
    assert found["arms"]["diverged"]["status"] == "incomplete"
    assert found["arms"]["diverged"]["train_energy_j"]["value"] is None


def _dunnett(groups: dict[str, list[float]], arm: str) -> tuple[float, float, float]:
    """Mean and interval of an arm's difference to the baseline, computed apart from the report."""
    n = {a: len(v) for a, v in groups.items()}
    df = sum(n.values()) - len(n)
    pooled = sum(float(np.var(v, ddof=1)) * (len(v) - 1) for v in groups.values() if len(v) > 1)
    shares = [k / (k + n["baseline"]) for a, k in n.items() if a != "baseline" and k > 1]
    half = quantile(df, shares) * math.sqrt(pooled / df * (1 / n[arm] + 1 / n["baseline"]))
    mean = float(np.mean(groups[arm]) - np.mean(groups["baseline"]))
    return mean, mean - half, mean + half


def test_ratios_have_simultaneous_intervals(found: dict[str, Any]) -> None:
    logs = {
        a: [math.log(v) for v in row["train_energy_j"]["by_seed"].values()]
        for a, row in found["arms"].items()
        if row["seeds"]
    }
    ratio = found["arms"]["lora"]["vs_baseline"]["train_energy"]
    expected = [math.exp(x) for x in _dunnett(logs, "lora")]
    assert [ratio[k] for k in ("ratio", "low", "high")] == pytest.approx(expected)
    one = found["arms"]["frozen"]["vs_baseline"]
    assert one["train_energy"]["low"] is None  # one seed: no interval
    assert one["accuracy"]["low"] is None


def test_a_reused_teacher_is_beside_and_never_added(found: dict[str, Any]) -> None:
    arm = found["arms"]["distilled"]
    assert [u["role"] for u in arm["uses"]] == ["teacher"]
    assert arm["base_reuse"]["whole_j"]["value"] == pytest.approx(9000)
    assert arm["base_reuse"]["shared_j"] == pytest.approx(3000)  # three seeds use it
    assert arm["base_reuse"]["whole_g"]["value"] == pytest.approx(9000 / 3.6e6 * 475)
    assert arm["base_reuse"]["shared_g"] == pytest.approx(3000 / 3.6e6 * 475)
    assert arm["train_energy_j"]["value"] < 9000
    cycle = arm["full_cycle"]
    assert cycle["total_whole_j"] - cycle["total_shared_j"] == pytest.approx(6000)
    vs = arm["vs_baseline"]
    assert vs["train_energy_with_reuse"]["ratio"] > vs["train_energy"]["ratio"]
    assert vs["payback"]["with_reuse"]["images"] > vs["payback"]["own"]["images"]
    assert arm["energy_by_phase_j"]["teacher"] > 0  # its forward passes in this run are this run's


def test_records_copied_elsewhere_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    flat = tmp_path / "elsewhere"
    flat.mkdir()
    for i, path in enumerate(sorted(record.find([study]), reverse=True)):
        shutil.copy(path, flat / f"{i}.jsonl")
    assert to_json(results(flat)) == to_json(results(study))
    assert to_json(results([flat, study, flat])) == to_json(
        results(study)
    )  # a record met twice counts once
    for out in ("a", "b"):
        report(flat if out == "a" else study, out=tmp_path / out)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) > 12
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert str(tmp_path) not in (tmp_path / "a" / "results.json").read_text()


def test_a_repeated_run_is_not_charged_to_the_result(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "baseline", attempt=1, start_s=1.0)
    once = results(tmp_path).as_json()["arms"]["baseline"]["train_energy_j"]["value"]
    synthetic.write(tmp_path, "baseline", attempt=2, end=None, start_s=2.0)
    synthetic.write(tmp_path, "baseline", attempt=3, start_s=3.0)
    row = results(tmp_path).as_json()["arms"]["baseline"]
    assert row["train_energy_j"]["value"] == pytest.approx(
        2 * once, rel=0.1
    )  # the broken start and the one that finished
    assert row["spent"]["repeated_energy_j"]["value"] == pytest.approx(once, rel=0.1)
    assert row["attempts"] == {"crashed": 1, "done": 2}


def test_ranks_count_the_machine_once_and_processes_summed(tmp_path: Path) -> None:
    socket = {
        **synthetic.CPU,
        "name": "rapl",
        "scope": "machine",
        "observation": "cpu_j",
        "coefficient": {"central": 1.0},
    }
    for rank in range(2):
        header = {
            "run": "r",
            "name": "ddp",
            "arm": "a",
            "inputs": "i",
            "rank": rank,
            "world_size": 3,
            "host": "h",
            "boot_id": "b",
        }
        writer = Writer(
            tmp_path / f"r.rank{rank}.jsonl",
            {**header, "components": [socket, synthetic.RAM], "clock_s": 1.0},
        )
        writer.line(
            "sample", {"phase": "train", "wall_s": 10.0, "cpu_j": 100.0 + rank, "ram_gb_s": 50.0}
        )
        writer.close("done")
    found = results(tmp_path).as_json()
    assert found["arms"]["a"]["train_energy_j"]["value"] == pytest.approx(101.0 + 2 * 50.0 * 0.37)
    assert found["arms"]["a"]["wall_s"] == 10.0
    assert found["missing_ranks"] == 1


def test_a_run_inside_another_run_counts_once_in_the_total(tmp_path: Path) -> None:
    outer = record.read(synthetic.write(tmp_path, "outer"))
    synthetic.write(tmp_path, "inner", header={"nested_in": outer.id})
    found = results(tmp_path).as_json()
    assert found["totals"]["energy_j"]["value"] == pytest.approx(
        found["arms"]["outer"]["total_energy_j"]["value"]
    )
    assert found["totals"]["nested_runs"] == 1


def test_tracked_runs_of_one_name_are_arms_of_their_own(tmp_path: Path) -> None:
    for run in ("r1", "r2"):
        header = {"run": run, "inputs": run, "clock_s": float(run[1])}
        synthetic.write(tmp_path, "pets", attempt=int(run[1]), name="pets", header=header)
    assert results(tmp_path).as_json()["order"] == ["pets", "pets (2)"]


def test_another_grid_changes_grams_and_nothing_else(study: Path, found: dict[str, Any]) -> None:
    other = results(study, grid=50.0).as_json()
    mine, theirs = found["arms"]["lora"], other["arms"]["lora"]
    assert theirs["train_energy_j"] == mine["train_energy_j"]
    assert theirs["carbon_g"]["value"] == pytest.approx(
        mine["train_energy_j"]["value"] / 3.6e6 * 50
    )
    assert not theirs["assumed_grid"]
    assert mine["assumed_grid"]
    assert results(study, grid={"value": 50, "zone": "X"}).as_json()["carbon_intensity"] == [
        {"value": 50, "zone": "X"}
    ]
    [sweden] = results(study, grid="SWE").as_json()["carbon_intensity"]
    assert sweden == grid.lookup("SWE")
    assert results(study, grid="50").as_json()["carbon_intensity"][0]["value"] == 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baseline": "bseline"}, "did you mean 'baseline'"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"metric": "wall_s"}, "name what is gained"),
        ({"grid": "nowhere"}, "no carbon intensity for country 'nowhere'"),
        ({"grid": "SWW"}, "did you mean"),
        ({"grid": -1}, "grams of CO2e per kWh, 0 or more"),
        ({"served": 0}, "number of images"),
        ({"served": float("nan")}, "number of images"),
        ({"grid": {"zone": "FRA"}}, 'no number "value"'),
    ],
)
def test_bad_input_says_what_and_what_else(
    study: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        results(study, **options)


def test_nothing_to_report_and_what_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run record"):
        results(tmp_path)
    with pytest.raises(BadInput, match="no file matches"):
        results(str(tmp_path / "*.jsonl"))
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "newer.jsonl").write_text('{"type": "header", "schema": 99}\n')
    with pytest.raises(BadInput, match="not a greenvis record"):
        results(tmp_path / "other.jsonl")
    synthetic.write(tmp_path, "baseline")
    notes = results(str(tmp_path / "**")).as_json()["notes"]
    assert any("other.jsonl was left out" in n for n in notes)
    assert any("schema 99" in n for n in notes)
    assert not any(str(tmp_path) in n for n in notes)


def test_every_ending_of_a_record_is_stated(tmp_path: Path) -> None:
    """Cut off, filled with noise, failed, stopped: still a report, which says what is missing."""
    cut = synthetic.write(tmp_path, "cut", end=None)
    cut.write_bytes(cut.read_bytes()[:-40])
    noisy = synthetic.write(tmp_path, "noisy")
    lines = noisy.read_bytes().split(b"\n")
    noisy.write_bytes(
        b"\n".join([*lines[:4], b"\x00\xff\x07 noise", b'{"type": "sample"}', *lines[4:]])
    )
    for end in ("failed", "stopped"):
        synthetic.write(tmp_path, end, end=end)
    header_only = tmp_path / "empty.jsonl"
    header_only.write_text(
        cut.read_text(errors="replace")
        .split("\n")[0]
        .replace('"arm":"cut"', '"arm":"bare","run":"x"')
        + "\n"
    )
    found = results(tmp_path).as_json()
    assert found["damaged_lines"] == 3
    assert {r["arm"]: r["attempts"][0] for r in found["incomplete"]} == {
        "bare": "crashed", "cut": "crashed", "failed": "failed", "stopped": "stopped",
    }  # fmt: skip
    page = report(tmp_path, out=tmp_path / "out").read_text()
    for words in (
        "damaged line",
        "loss is not finite",
        "cut has no finished run (crashed)",
        "the record has no end",
        "stopped",
    ):
        assert words in page


def test_without_accuracy_energy_or_grid_the_report_says_so(tmp_path: Path) -> None:
    header = {"components": [], "carbon_intensity": None, "command": None}
    synthetic.write(tmp_path, "tracked", accuracy=None, header=header, infer_j=None)
    found = results(tmp_path).as_json()
    arm = found["arms"]["tracked"]
    assert arm["train_energy_j"]["value"] is None
    assert arm["carbon_g"]["value"] is None
    assert "not measured" in arm["inference_energy_j"]["reason"]
    page = report(tmp_path, out=tmp_path / "out").read_text()
    assert "No carbon intensity is known" in page
    assert "tracked took an unknown energy; no accuracy was recorded" in page


def test_a_metric_where_less_is_better(tmp_path: Path) -> None:
    for seed in range(2):
        synthetic.write(tmp_path, "baseline", seed, facts={"val_loss": 1.0 + 0.1 * seed})
        synthetic.write(tmp_path, "better", seed, cpu_s=300, facts={"val_loss": 0.5 + 0.12 * seed})
    found = results(tmp_path, metric="val_loss").as_json()
    assert found["lower_is_better"]
    assert found["arms"]["better"]["val_loss"]["mean"] == pytest.approx(0.56)
    page = report(tmp_path, out=tmp_path / "out", metric="val_loss").read_text()
    assert "better reached 0.560 ± 0.085 val_loss" in page


def test_torch_is_not_imported(study: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from greenvis.report import report; report(sys.argv[1], out=sys.argv[2]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(study), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_results_json_is_what_results_returns(
    study: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    page = report(study, out=tmp_path)
    assert json.loads((page.parent / "results.json").read_text()) == json.loads(
        to_json(typed(found))
    )


def test_older_figures_of_the_same_folder_go(study: Path, tmp_path: Path) -> None:
    report(study, out=tmp_path)
    (tmp_path / "figures" / "tasks-7.svg").write_text("old")
    (tmp_path / "figures" / "mine.svg").write_text("of the user's")
    marked = json.loads((tmp_path / LIST).read_text())
    (tmp_path / LIST).write_text(json.dumps({"files": [*marked["files"], "figures/tasks-7.svg"]}))
    report(study, out=tmp_path)
    assert (tmp_path / "figures" / "mine.svg").exists()
    assert not (tmp_path / "figures" / "tasks-7.svg").exists()


def test_the_verdict_names_no_arm_that_had_all_tasks_at_once(found: dict[str, Any]) -> None:
    from greenvis.report.verdict import headline, sentence

    arms = {
        a: {**row, "continual": {"averages": [None, 0.9] if a == "lora" else [0.8, 0.7]}}
        for a, row in found["arms"].items()
    }
    stream = {**found, "arms": arms}
    two = typed({**found, "order": ["baseline", "lora"]})
    assert headline(two) == "lora" != headline(typed(stream))
    assert sentence(typed(stream), "lora").startswith(
        "lora, trained on all tasks at once as no stream allows, reached "
    )
    assert sentence(typed(stream), "frozen") == sentence(typed(found), "frozen")
    only = {**stream, "order": ["baseline", "lora"]}
    assert headline(typed(only)) == "lora"


def test_the_verdict_claims_what_is_shown(
    study: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    from greenvis.report.verdict import headline, sentence

    said = sentence(typed(found), "lora")
    assert "1.8 times less training energy (1.4–2.3) than baseline" in said
    assert (
        "accuracy −0.20 points (95\u00a0% interval −0.96 to +0.56): not yet decided at 0.5 points, "
        "about 10 more seeds" in said
    )
    assert sentence(typed(found), "frozen").startswith(
        "frozen reached 81.0\u00a0% for 540 J of training energy (one seed"
    )
    assert (
        "%" not in sentence(typed(found), "frozen").partition("for")[2]
    )  # one seed is compared with nothing
    said = sentence(typed(found), "distilled")
    assert (
        "3.7 times more energy (2.9–4.7) than baseline (the teacher of distilled included; own "
        "training ×1.13" in said
    )
    assert sentence(typed(found), "diverged").startswith("diverged has no finished run")
    for seed, cpu_s in enumerate((390, 405, 402)):
        synthetic.write(tmp_path, "baseline", seed, cpu_s=400)
        synthetic.write(tmp_path, "same", seed, cpu_s=cpu_s)
    assert "no difference shown in training energy" in sentence(results(tmp_path), "same")
    alone = results(study / "frozen")
    assert (
        sentence(alone, headline(alone))
        == "frozen reached 81.0\u00a0% for 540 J of training energy (one seed: no spread is known)."
    )


def test_what_does_not_keep_the_metric_is_not_the_headline_without_saying_so(
    tmp_path: Path,
) -> None:
    from greenvis.report.verdict import opening

    for seed in range(3):
        synthetic.write(tmp_path, "baseline", seed, accuracy=0.90 + 0.002 * seed, cpu_s=400 + seed)
        synthetic.write(tmp_path, "cheap", seed, accuracy=0.80 + 0.003 * seed, cpu_s=100 + seed)
        synthetic.write(
            tmp_path, "unsure", seed, accuracy=(0.79, 0.88, 0.85)[seed], cpu_s=60 + seed
        )
    found = results(tmp_path).as_json()
    verdicts = {
        a: found["arms"][a]["vs_baseline"]["accuracy"]["verdict"] for a in ("cheap", "unsure")
    }
    assert verdicts == {"cheap": "loses", "unsure": "not yet decided"}
    assert opening(typed(found)).startswith(
        "No arm is shown to cost less than baseline and keep its accuracy; nearest comes unsure: "
        "5.1 times less training energy than baseline"
    )
    for seed in range(3):
        synthetic.write(tmp_path, "good", seed, accuracy=0.96 + 0.002 * seed, cpu_s=200 + seed)
    assert opening(results(tmp_path)).startswith(
        "good takes 1.9 times less training energy than baseline and gains 6.0 points of accuracy"
    )


def test_a_noisier_arm_does_not_pass_by_its_noise(tmp_path: Path) -> None:
    """A mean loss within both scatters passed once: the noisier the arm, the sooner (er-ace over
    derpp)."""
    from greenvis.report.verdict import headline

    base = (0.68, 0.73, 0.77, 0.72, 0.70)
    for seed, accuracy in enumerate(base):
        synthetic.write(tmp_path, "baseline", seed, accuracy=accuracy, cpu_s=400 + seed)
        synthetic.write(
            tmp_path,
            "noisy",
            seed,
            accuracy=accuracy - (0.01, 0.09, -0.06, 0.02, 0.08)[seed],
            cpu_s=100 + seed,
        )
        synthetic.write(
            tmp_path, "steady", seed, accuracy=accuracy + 0.004 + 0.001 * seed, cpu_s=150 + seed
        )
    found = results(tmp_path).as_json()
    lost = found["arms"]["noisy"]["vs_baseline"]["accuracy"]
    assert lost["low"] < -0.005 < lost["high"]
    assert lost["verdict"] == "not yet decided"
    assert headline(typed(found)) == "steady"


@pytest.mark.parametrize(
    "quantity", ["accuracy", "train_energy", "inference_energy", "latency_p50"]
)
def test_every_interval_holds_together_with_those_of_all_arms(
    tmp_path: Path, quantity: str
) -> None:
    groups: dict[str, list[float]] = {}
    for arm in ("baseline", "a0", "a1", "a2"):
        for seed in range(3):
            rng = random.Random(f"{arm} {seed}")
            latency = rng.uniform(9, 11)
            drawn = {
                "accuracy": rng.uniform(0.8, 0.9),
                "infer_j": rng.uniform(2e-3, 3e-3),
                "cpu_s": rng.uniform(300, 400),
            }
            facts = {"latency_ms": {"p50": latency}, "macs": 1.0 + len(groups)}
            synthetic.write(tmp_path, arm, seed, facts=facts, **drawn)
        groups[arm] = []
    content = results(tmp_path)
    for arm, row in content.arms.items():
        of = {
            "accuracy": row.gain.by_seed,
            "train_energy": row.train_energy_j.seeds,
            "inference_energy": row.inference_energy_j.seeds,
            "latency_p50": row.by_seed["latency_p50"],
        }[quantity]
        groups[arm] = [v if quantity == "accuracy" else math.log(v) for v in of.values()]
    versus = content.arms["a1"].vs_baseline
    assert versus is not None
    d = versus.gain if quantity == "accuracy" else versus.ratio(quantity)
    assert d is not None
    ends = (
        [d.low, d.high] if quantity == "accuracy" else [math.log(x or 0) for x in (d.low, d.high)]
    )
    assert ends == pytest.approx(_dunnett(groups, "a1")[1:])


def test_the_verdict_is_on_the_arm_that_the_recipe_asks_about(tmp_path: Path) -> None:
    from greenvis.report.verdict import choice, opening

    for seed in range(3):
        header = {"recipe": "report: {arm: drawn}"}
        for name, accuracy, cpu_s in (("baseline", 0.9, 400), ("good", 0.96, 200)):
            synthetic.write(
                tmp_path, name, seed, accuracy=accuracy + 0.002 * seed, cpu_s=cpu_s + seed
            )
        synthetic.write(
            tmp_path, "drawn", seed, accuracy=0.8 + 0.003 * seed, cpu_s=4000 + seed, header=header
        )
    asked = results(tmp_path)
    assert choice(asked).arm == "drawn"
    assert opening(asked).startswith(
        "drawn takes 9.6 times more training energy than baseline; it "
    )
    assert opening(asked).endswith("; it loses 9.9 points of accuracy.")
    assert choice(asked.model_copy(update={"arm": None})).arm == "good"
    assert choice(asked.model_copy(update={"arm": "gone"})).arm == "good"
    page = report(tmp_path, out=tmp_path / "out", arm="good")
    assert "**good takes " in (page.parent / "report.md").read_text()
    with pytest.raises(BadInput, match="no arm 'god' to speak of; did you mean 'good'"):
        report(tmp_path, out=tmp_path / "out", arm="god")


def test_the_verdict_on_an_arm_asked_about_says_what_serving_it_takes(tmp_path: Path) -> None:
    from greenvis.report.verdict import opening

    for seed in range(3):
        for name, infer_j in (("baseline", 0.003), ("short", 0.0015)):
            synthetic.write(
                tmp_path, name, seed, accuracy=0.9 + 0.002 * seed, cpu_s=400 + seed,
                infer_j=infer_j + 1e-6 * seed, header={"recipe": "report: {arm: short}"},
            )  # fmt: skip
    assert opening(results(tmp_path)).endswith("; it serves with 2.0 times less energy per image.")


def test_the_margin_is_the_recipes_or_the_readers(tmp_path: Path) -> None:
    for seed in range(3):
        header = {"recipe": "report: {margin: 3, title: Study}"}
        synthetic.write(
            tmp_path,
            "baseline",
            seed,
            accuracy=0.90 + 0.002 * seed,
            cpu_s=400 + seed,
            header=header,
        )
        synthetic.write(
            tmp_path, "less", seed, accuracy=0.88 + 0.0021 * seed, cpu_s=200 + seed, header=header
        )
    for margin, stated, verdict in (
        (None, 3.0, "keeps"),
        (0.5, 0.5, "loses"),
        (2.0, 2.0, "not yet decided"),
    ):
        found = results(tmp_path, margin=margin).as_json()
        assert found["title"] == "Study"
        assert (found["margin"], found["arms"]["less"]["vs_baseline"]["accuracy"]["verdict"]) == (
            stated,
            verdict,
        )
    with pytest.raises(BadInput, match="points that may be lost"):
        results(tmp_path, margin=-1)


def test_an_arm_that_goes_on_from_the_baseline_is_judged_by_its_inference(tmp_path: Path) -> None:
    from greenvis.report.verdict import opening, sentence

    for seed in range(3):
        synthetic.write(
            tmp_path,
            "baseline",
            seed,
            accuracy=0.90 + 0.002 * seed,
            cpu_s=400 + seed,
            infer_j=0.003,
        )
        whole = synthetic.teacher(1600.0, "fashion-lora/baseline") | {"role": "base"}
        more = {"accuracy": 0.901 + 0.002 * seed, "cpu_s": 10 + seed, "uses": [whole]}
        synthetic.write(tmp_path, "merged", seed, **more, infer_j=0.0015 + 1e-6 * seed)
    assert opening(results(tmp_path)) == (
        "merged takes 2.0 times less energy per image than baseline (from which it goes on) "
        "and keeps its accuracy within 0.5 points."
    )
    said = sentence(results(tmp_path), "merged")
    assert said.startswith(
        "merged reached 90.3\u00a0% ± 0.2, going on from baseline, with 2.0 times less energy per "
        "image"
    )
    assert "Making it: 1.4 % less energy (0.31–2.5)" in said
    assert "the base of merged included; own training ×0.0749" in said


def test_no_payback_is_stated_from_noise(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate([(3.0, 3.1), (3.1, 2.9), (2.9, 2.8)]):
        synthetic.write(tmp_path, "baseline", seed, cpu_s=400 + seed, infer_j=a / 1e3)
        synthetic.write(tmp_path, "same", seed, cpu_s=500 + seed, infer_j=b / 1e3)
        synthetic.write(tmp_path, "half", seed, cpu_s=500 + seed, infer_j=a / 2e3)
    found = results(tmp_path).as_json()
    pay = {a: found["arms"][a]["vs_baseline"]["payback"]["own"] for a in ("same", "half")}
    assert (pay["same"]["verdict"], pay["same"]["images"]) == ("not shown", None)
    assert pay["half"]["verdict"] == "pays back"
    page = report(tmp_path, out=tmp_path / "out").read_text()
    assert (
        "same: no difference shown in the energy of one image to baseline, so no payback is stated."
        in page
    )
    bold = _bold(typed(found))
    assert bold["half"] == {"Training energy ÷ baseline", "One image ÷ baseline"}
    assert bold["same"] == {"Training energy ÷ baseline"}
    assert not bold["baseline"]


def _bold(found: Results) -> dict[str, set[str]]:
    """Titles of the cells that show a difference, by arm."""
    columns = [*tables.costs(found), *tables.cycle(found)]
    return {
        arm: {
            column.title
            for column, cell in zip(columns, tables.cells(row, columns), strict=True)
            if cell.shown
        }
        for arm, row in found.arms.items()
    }


def test_predicted_against_actual(tmp_path: Path) -> None:
    for seed in range(2):
        said = {
            "energy_j": {"value": 1000.0, "low": 900.0, "high": 1100.0}, "wall_s": {"value": 900.0,
            "low": 1.0, "high": 2.0},
            "carbon_g": {"value": 7.0, "low": 7.0, "high": 7.0}, "flops": {"value": 1e13,
            "low": 9e12, "high": 1.3e13},
        }  # fmt: skip
        synthetic.write(tmp_path, "baseline", seed, facts={"predicted": said}, cpu_s=240)
        synthetic.write(tmp_path, "unplanned", seed, facts={"predicted": None})
    found = results(tmp_path, grid=100.0).as_json()
    p = found["arms"]["baseline"]["predicted"]
    spent = found["arms"]["baseline"]["energy_by_phase_j"]
    assert p["energy_j"]["actual"] == pytest.approx(spent["train"] + spent["eval"])
    assert p["energy_j"]["ratio"] == pytest.approx(p["energy_j"]["actual"] / 1000)
    assert p["energy_j"]["inside"]
    assert not p["wall_s"]["inside"]
    assert p["flops"]["actual"] == pytest.approx(1.2e13)
    assert p["carbon_g"]["value"] == pytest.approx(1000 / 3.6e6 * 100)  # both sides with one grid
    assert p["carbon_g"]["ratio"] == pytest.approx(p["energy_j"]["ratio"])
    assert "predicted" not in found["arms"]["unplanned"]
    folder = report(tmp_path, out=tmp_path / "out").parent
    for file in ("index.html", "report.md"):
        assert "inside the band" in (folder / file).read_text()
        assert "OUTSIDE the band" in (folder / file).read_text()
    assert (
        "\n\n| Arm | Energy: predicted → actual |" in (folder / "report.md").read_text()
    )  # else no table on a code host


def test_the_usage_is_the_readers(study: Path, tmp_path: Path) -> None:
    row = results(study, served=5e6).as_json()["arms"]["lora"]
    assert row["full_cycle"]["serve_j"] == pytest.approx(5e6 * row["inference_energy_j"]["value"])
    assert "5,000,000 images" in report(study, out=tmp_path, served=5e6).read_text()


def test_arms_look_different_and_keep_both_ends_of_their_names() -> None:
    from greenvis.report import figures

    looks = [figures.style(i) for i in range(22)]
    assert len({(x["color"], x["marker"]) for x in looks}) == 22
    assert sum(x["color"] == looks[0]["color"] for x in looks) == 1  # the baseline's alone
    assert figures.short("adapter in every block, rank 4", 18) == "adapter in e…ank 4"
    assert figures.short("lora") == "lora"


def test_time_without_a_processor_is_said_with_what_memory_took_meanwhile(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "runs", "baseline", 0, cpu_s=240)
    busy = results(tmp_path / "runs")
    assert (busy.waiting_s, busy.waiting_ram_j) == (0, 0)  # its wall is below its CPU time
    four = re.sub(r'"wall_s":[^,]+(.*"cpu_s":)([^,}]+)',
                  lambda m: f'"wall_s":{4 * float(m[2])}{m[1]}{m[2]}', path.read_text())  # fmt: skip
    path.write_text(four)
    found = results(tmp_path / "runs")
    assert found.waiting_s == pytest.approx(3 * (found.cpu_s or 0))
    ram = sum(phase["ram"].value or 0.0 for phase in pricing.phases(record.read(path)).values())
    assert found.waiting_ram_j == pytest.approx(0.75 * ram)
    text = (report(tmp_path / "runs", out=tmp_path / "out").parent / "report.md").read_text()
    assert "no processor worked for the runs" in text
