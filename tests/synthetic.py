"""Records as a real run would leave them, made up: for tests of reports and for looking at them."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greenvis.meters.record_writer import Writer

CPU = {
    "name": "cpu", "source": "cpu_time", "scope": "process", "observation": "cpu_s",
    "coefficient": {"low": 2.9, "central": 4.0, "high": 5.8, "unit": "W per busy CPU"},
    "provenance": "estimated",
    "citation": "inferred from CPUID and cache size", "reason": "no live RAPL counter",
}  # fmt: skip
RAM = {
    "name": "ram", "source": "resident memory", "scope": "process", "observation": "ram_gb_s",
    "coefficient": {"low": 0.19, "central": 0.37, "high": 0.54, "unit": "W per resident GB"},
    "provenance": "estimated",
    "citation": "Green Algorithms (2021)", "reason": "",
}  # fmt: skip
GPU = {
    "name": "gpu",
    "source": "",
    "scope": "machine",
    "observation": "",
    "provenance": "measured",
    "reason": "no NVIDIA GPU",
}
WORLD = {
    "value": 475.0,
    "low": 30.0,
    "high": 900.0,
    "zone": "WORLD",
    "year": 2023,
    "source": "world average",
    "assumed": True,
}
FRANCE = {
    "value": 56.0,
    "low": 45.0,
    "high": 70.0,
    "zone": "FRA",
    "year": 2023,
    "source": "Ember",
    "assumed": False,
}
NASTY = '<script>alert("x")</script> | `=1+1` $x_1$ **b** [a](javascript:alert(1)) \\ é 漢字'


def write(
    folder: Path,
    arm: str,
    seed: int = 0,
    *,
    name: str = "fashion-lora",
    accuracy: float | None = 0.88,
    cpu_s: float = 400.0,
    epochs: int = 3,
    inputs: str | None = None,
    attempt: int = 0,
    end: str | None = "done",
    start_s: float = 1_760_000_000.0,
    teacher_share: float = 0.0,
    uses: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    header: Mapping[str, Any] | None = None,
    infer_j: float | None = 0.002,
    notes: tuple[str, ...] = (),
) -> Path:
    """Write one record of a run with `epochs` epochs and return its path. `end` None leaves it
    without an end line."""
    rng = random.Random(f"{arm}{seed}{attempt}")
    run_id = hashlib.sha256(f"{name}/{arm}/{seed}/{attempt}/{inputs}".encode()).hexdigest()[:16]
    head: dict[str, Any] = {
        "run": run_id, "name": name, "arm": arm, "seed": seed,
        "inputs": inputs if inputs is not None else f"in-{arm}",
        "attempt": attempt, "rank": 0, "world_size": 1, "host": "bench-1", "boot_id": "b1",
        "pid": 1, "clock_s": start_s,
        "cpu": {"name": "AMD EPYC (name hidden)", "logical": 2}, "versions": {"greenvis": "0.1.0",
        "torch": "2.15.0"},
        "components": [CPU, RAM, GPU], "pue": 1.0, "carbon_intensity": WORLD,
        "command": "greenvis run recipes/fashion-lora.yaml",
        "git": {"commit": "0123abc", "dirty": False}, **(header or {}),
    }  # fmt: skip
    path = (
        folder
        / "".join(c if c.isprintable() and c != "/" else "_" for c in arm)[:40]
        / f"seed{seed}"
        / f"{run_id}.rank0.jsonl"
    )
    writer = Writer(path, head)
    writer.line(
        "sample",
        {
            "phase": "",
            "wall_s": 2.0,
            "cpu_s": 2.5,
            "ram_gb_s": 1.0,
            "mono_s": 2.0,
            "clock_s": start_s + 2,
        },
    )
    each = cpu_s / epochs * rng.uniform(0.97, 1.03)
    for epoch in range(epochs):
        for part in (0.5, 1.0):
            _sample(
                writer,
                f"train/epoch{epoch}",
                each * part * (1 - teacher_share),
                samples=12000 * part,
                flops=4e12 * part,
            )
        if teacher_share:
            _sample(writer, f"train/epoch{epoch}/teacher", each * teacher_share, flops=9e12)
        _sample(writer, "eval", 6.0 * (epoch + 1), samples=10000.0 * (epoch + 1))
        if accuracy is not None:
            reached = (
                accuracy * (1 - 0.25 * math.exp(-1.3 * epoch)) if epoch < epochs - 1 else accuracy
            )
            writer.line(
                "log",
                {
                    "phase": "eval",
                    "epoch": epoch,
                    "step": 94 * (epoch + 1),
                    "loss": 0.9 - 0.1 * epoch,
                    "accuracy": reached,
                },
            )
    for use in uses:
        writer.line("uses", use)
    for note in notes:
        writer.line("note", {"text": note})
    if end == "done":
        _sample(writer, "measure", 3.0)
        _sample(
            writer,
            "measure/latency",
            (infer_j or 0.002) * 2000 / 4.02,
            samples=2000.0 if infer_j else 0.0,
        )
        writer.line("fact", {**_facts(accuracy, arm), **(facts or {})})
    if end is not None:
        writer.close(end, "" if end == "done" else "RuntimeError: loss is not finite")
    return path


def many(folder: Path, arms: int, seeds: int, epochs: int = 5) -> None:
    """Write arms × seeds records, each of 5 + 4 × epochs lines: one real one with other names and
    figures put in."""
    made = write(folder / "made", "ARM", epochs=epochs)
    text, run_id = made.read_text(), made.name.split(".")[0]
    made.unlink()
    rng = random.Random(0)
    for i in range(arms):
        arm = "baseline" if i == 0 else f"arm{i}"
        for seed in range(seeds):
            path = folder / f"r{i // 100}" / arm / f"seed{seed}" / "x.rank0.jsonl"
            path.parent.mkdir(parents=True)
            k = rng.uniform(0.8, 1.2)
            one = re.sub(r'"cpu_s":([\d.]+)', lambda m, k=k: f'"cpu_s":{float(m[1]) * k:.6f}', text)
            one = (
                one.replace("ARM", arm)
                .replace(run_id, f"{i:08x}{seed:08x}")
                .replace('"seed":0', f'"seed":{seed}')
            )
            path.write_text(
                one.replace('"accuracy":0.88,', f'"accuracy":{0.8 + 0.1 * rng.random():.4f},')
            )


def _sample(writer: Writer, phase: str, cpu_s: float, **more: float) -> None:
    values = {
        "wall_s": cpu_s / 1.8,
        "cpu_s": cpu_s,
        "ram_gb_s": cpu_s * 0.5,
        "steal_s": cpu_s * 0.02,
        **more,
    }
    writer.line("sample", {"phase": phase, "mono_s": 1.0, "clock_s": 1.0, **values})


def _facts(accuracy: float | None, arm: str) -> dict[str, Any]:
    full = arm == "baseline"
    return {
        **({} if accuracy is None else {"accuracy": accuracy}),
        "macs": 1.26e9 if full else 0.74e9,
        "params": 5_717_416,
        "trainable_params": 5_717_416 if full else 147_456,
        "delta_bytes": 22_869_664 if full else 589_824,
        "latency_ms": {"p50": 11.2, "p95": 14.9, "batch_size": 1},
        "images_per_s": 212.0,
        "peak_memory_mb": 903.0,
        "data": {"name": "fashion-mnist", "checksum": "sha256:5f1e", "train": 12000},
        "model": {
            "ref": "timm/vit_tiny_patch16_224",
            "options": {"variant": arm},
            "fingerprint": "ab12",
        },
        "recipe": "name: fashion-lora\narms: {baseline: {}}\n",
    }


def teacher(joules: float = 9000.0, name: str = "fashion-teacher/teacher") -> dict[str, Any]:
    """Return a `uses` line for a teacher."""
    e = {"value": joules, "low": joules * 0.72, "high": joules * 1.45, "provenance": "estimated"}
    return {"role": "teacher", "name": name, "runs": ["t-0"], "energy_j": e}


def study(folder: Path) -> Path:
    """Write a whole study: three arms × three seeds, a crash and its resumption, an old version,
    one that never ended."""
    for seed in range(3):
        t = 1_760_000_000.0 + 1000 * seed
        write(
            folder,
            "baseline",
            seed,
            accuracy=0.886 + 0.003 * seed,
            cpu_s=800 + 9 * seed,
            epochs=6,
            start_s=t,
            infer_j=0.0031,
        )
        write(
            folder,
            "lora",
            seed,
            accuracy=0.884 + 0.004 * seed - 0.003 * (seed == 1),
            cpu_s=380 + 8 * seed,
            epochs=6,
            start_s=t + 300,
            infer_j=0.0031,
        )
        write(
            folder, "distilled", seed, accuracy=0.901 + 0.002 * seed, cpu_s=900 + 20 * seed,
            epochs=6, start_s=t + 600,
            teacher_share=0.3, uses=[teacher()], infer_j=0.0012,
            facts={"codecarbon": {"energy_j": 5200.0 + 300 * seed, "mode": "process"}},
        )  # fmt: skip
    write(
        folder,
        "lora",
        2,
        attempt=-1,
        accuracy=0.7,
        cpu_s=120,
        epochs=2,
        end=None,
        start_s=1_759_999_000.0,
    )
    write(folder, "lora", 0, inputs="older", accuracy=0.6, cpu_s=150, start_s=1_750_000_000.0)
    write(
        folder,
        "frozen",
        0,
        accuracy=0.81,
        cpu_s=90,
        epochs=6,
        infer_j=0.0031,
        start_s=1_760_009_000.0,
        notes=("codecarbon departs from the band",),
    )
    write(folder, "diverged", 0, accuracy=0.2, cpu_s=60, end="failed", start_s=1_760_010_000.0)
    return folder
