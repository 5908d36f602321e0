"""The GPU kit, rehearsed on this machine: cells measure, lie in one folder, and are not measured
twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from greenvis.bench import gpu
from greenvis.errors import BadInput

KIT = Path(__file__).parents[2] / "reports" / "gpu"
QUICK = {"look_s": 0.01, "rounds": 2}
SETTINGS = {
    "tokens": {"unmodified", "merged, r 2"},
    "tuning": {"full", "lora, rank 8", "last 2 blocks", "last 2 blocks, prefix kept"},
    "exits": {"unmodified", "never", "20% leave", "40% leave", "70% leave"},
    "teacher": {"no teacher", "teacher live", "teacher's answers kept"},
    "attention": {"unmodified", "relu", "elu", "polaformer", "hedgehog", "ssd"},
    "precision": {"fp32", "tf32", "bf16", "int8"},
    "pipeline": {"ViT-B/16 serves", "loading, 0 workers", "loading, 1 workers"},
}

rehearsal = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU this measures for minutes: make gpu"
)


def cell(result: dict, name: str) -> dict:
    return next(c for c in result["cells"] if c["cell"] == name)


@pytest.mark.one_in(4)
@rehearsal
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cell_measures_each_of_its_settings(name: str) -> None:
    one = cell(gpu.run(cells=[name], **QUICK), name)
    assert one["reason"] == ""
    assert {row["setting"] for row in one["rows"]} >= SETTINGS[name] - {"int8"}
    measured = [row for row in one["rows"] if "ms" in row]
    for row in measured:
        assert row["ms"] > 0
        assert row["units_per_s"] > 0
        assert len(row["observed"]) == 2
    firsts = [row for row in measured if row["setting"] == measured[0]["setting"]]
    assert all(row["speedup"] == 1 for row in firsts)


@rehearsal
def test_without_a_gpu_the_page_says_that_it_is_a_rehearsal(tmp_path: Path) -> None:
    result = gpu.run(tmp_path, cells=["counter", "precision"], **QUICK)
    assert "no NVIDIA GPU" in cell(result, "counter")["reason"]
    page = (tmp_path / "report.md").read_text()
    assert "no figure here says anything of a GPU" in page
    assert "a tiny ViT in its place" in page
    assert "Not measured: no NVIDIA GPU here" in page


@rehearsal
def test_goes_on_with_the_cells_that_are_missing(tmp_path: Path) -> None:
    first = gpu.run(tmp_path, cells=["precision"], **QUICK)
    both = gpu.run(tmp_path, cells=["precision", "tokens"], **QUICK)
    assert cell(both, "precision") == json.loads(json.dumps(cell(first, "precision")))
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == [
        "precision.json",
        "tokens.json",
    ]


@rehearsal
def test_begins_no_cell_that_would_end_too_late(tmp_path: Path) -> None:
    late = gpu.run(tmp_path, cells=["tokens"], budget_s=0, **QUICK)
    assert "give the same command again" in cell(late, "tokens")["reason"]
    assert cell(gpu.run(tmp_path, cells=["tokens"], **QUICK), "tokens")["rows"]


@rehearsal
def test_one_cell_that_breaks_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(bench: object) -> list:
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(gpu, "CELLS", (gpu.Cell("broken", 1, broken), *gpu.CELLS))
    result = gpu.run(cells=["broken", "tokens"], **QUICK)
    assert cell(result, "broken")["reason"] == "RuntimeError: CUDA error: out of memory"
    assert cell(result, "tokens")["rows"]


@rehearsal
def test_refuses_a_folder_of_another_gpu_and_an_unknown_cell(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    measured = json.loads((KIT / "cells" / "tokens.json").read_text())
    measured["device"]["name"] = "NVIDIA H100"
    (tmp_path / "cells" / "tokens.json").write_text(json.dumps(measured))
    with pytest.raises(BadInput, match="holds figures of 'NVIDIA H100'"):
        gpu.run(tmp_path, cells=["precision"], **QUICK)
    with pytest.raises(BadInput, match="did you mean 'tokens'"):
        gpu.run(cells=["token"])


@pytest.mark.slow
@rehearsal
def test_merged_models_compile() -> None:
    assert cell(gpu.run(cells=["tokens-compiled"], **QUICK), "tokens-compiled")["rows"]


def test_the_whole_kit_fits_its_time() -> None:
    assert sum(c.seconds for c in gpu.CELLS) <= gpu.BUDGET_S
