"""`greenvis bench loading`: how fast a recipe's loader is beside torchvision's ImageFolder and a
plain DataLoader, with the same transforms and workers. A few minutes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from greenvis.bench import _output
from greenvis.bench._options import Images, Out, Rounds
from greenvis.data import DataSpec, batches, dataset, load
from greenvis.experiment.optim import threads as cpu_threads

if TYPE_CHECKING:
    from greenvis.data.transforms import Transform

SIDE, CLASSES, BATCH = 224, 10, 64
DRAWN = 500  # different images; each file differs in how strongly it is packed
TARGET = 0.9  # of ImageFolder's images per second
Workers = Annotated[int, typer.Option(min=0, help="processes that load")]


def run(
    images: Images = 10_000, rounds: Rounds = 3, workers: Workers = 2, out: Out = None
) -> dict[str, Any]:
    """Return {"rows": [{"images", "workers", "batch", "ours_per_s", "imagefolder_per_s", "ratio",
    "target", "met", "setup_ours_s", "setup_imagefolder_s"}]}.

    Args:
        images: JPEG files of 224 pixels, drawn by greenvis, in ten classes.
        rounds: In each, both load all images once, in turn; figures are medians.
        workers: Processes that load.
        out: A folder to write report.md and results.json to.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, images)
        row = _measured(folder, images, rounds, workers)
    result = {"rows": [row]}
    if out is not None:
        command = f"greenvis bench loading --images {images} --rounds {rounds} --workers {workers}"
        lines = [
            "# Loading images beside torchvision's ImageFolder",
            "",
            f"`{command} --out {out}`, {os.cpu_count()} logical CPUs. Both decode the same "
            f"{images:,} JPEG files of {SIDE} pixels, bring them to size, normalise them and give "
            f"batches of {BATCH}, in {workers} processes; they take turns {rounds} times, figures "
            "are medians of the rounds. `setup` is what comes before the first batch, once: "
            "greenvis looks at every file for what is broken, hashes them, and takes mean and "
            "deviation of 2,000 images.",
            "",
            "| " + " | ".join(row) + " |",
            "|" + "---|" * len(row),
            "| " + " | ".join(str(value) for value in row.values()) + " |",
            "",
        ]
        _output.write(out, result, "\n".join(lines))
    return result


def _write(folder: Path, count: int) -> None:
    """Write JPEG files into class folders below `train`, and two of each class below `test`."""
    drawn = min(DRAWN, count)
    stored = dataset.find(DataSpec(name="shapes:labels", img_size=SIDE, train=drawn, test=1)).read()
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in stored.train.images]
    for part, number in (("train", count), ("test", 2 * CLASSES)):
        for i in range(number):
            target = folder / part / f"class{i % CLASSES}"
            target.mkdir(parents=True, exist_ok=True)
            pictures[i % drawn].save(target / f"{i:06}.jpg", quality=70 + i // drawn % 25)


def _measured(folder: Path, images: int, rounds: int, workers: int) -> dict[str, Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    started = time.monotonic()
    ours = load(DataSpec(name=f"folder:{folder}", img_size=SIDE)).train
    setup_ours = time.monotonic() - started
    started = time.monotonic()
    theirs = ImageFolder(str(folder / "train"), plain(ours.transform))
    setup_theirs = time.monotonic() - started
    loaders: dict[str, Callable[[int], Iterable[Any]]] = {
        "ours": lambda turn: batches(
            ours, BATCH, epoch=turn, seed=0, shuffle=True, workers=workers
        ),
        "imagefolder": lambda turn: DataLoader(theirs, BATCH, shuffle=True, num_workers=workers),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    with cpu_threads(1):
        for turn in range(rounds):
            for name in sorted(loaders, reverse=bool(turn % 2)):
                started = time.monotonic()
                count = sum(len(y) for _, y in loaders[name](turn))
                assert count == images
                speeds[name].append(count / (time.monotonic() - started))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    pairs = zip(speeds["ours"], speeds["imagefolder"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return {
        "images": images,
        "workers": workers,
        "batch": BATCH,
        "ours_per_s": round(medians["ours"]),
        "imagefolder_per_s": round(medians["imagefolder"]),
        "ratio": round(ratio, 3),
        "target": TARGET,
        "met": ratio >= TARGET,
        "setup_ours_s": round(setup_ours, 1),
        "setup_imagefolder_s": round(setup_theirs, 1),
    }


def plain(form: Transform) -> Any:
    """Return the same transform in torchvision's words, of one PIL image."""
    import torch
    from torchvision.transforms import v2

    return v2.Compose([
        v2.ToImage(),
        v2.Resize([SIDE], antialias=True),
        v2.CenterCrop([SIDE, SIDE]),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(form.mean), list(form.std)),
    ])  # fmt: skip
