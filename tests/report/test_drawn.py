"""Images that a model drew: into a record, out of it, and on the page."""

from __future__ import annotations

import base64
import zlib
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from greenvis.data.image_set import ImageSet
from greenvis.data.splits import Split
from greenvis.data.transforms import Transform
from greenvis.experiment.drawn import drawn
from greenvis.report import page, pictures, sections
from greenvis.report.arm_results import Picture, Setting
from greenvis.report.figures import short
from greenvis.report.shape import Results
from greenvis.tasks.classification import Classification
from greenvis.tasks.generation import Drawn, Generation
from greenvis.tasks.segmentation import PICTURES, Segmentation
from greenvis.tasks.unsupervised_segmentation import UnsupervisedSegmentation
from greenvis.testing.sections import STATES, example


def _packed(values: bytes) -> str:
    return base64.b64encode(zlib.compress(values)).decode()


def _setting(name: str, metric: float, joules: float, entropy: float) -> Setting:
    accuracy: Any = {"mean": metric, "std": 0.0, "n": 1, "by_seed": {"0": metric}}
    return Setting(
        setting=name, accuracy=accuracy, inference_energy_j=joules, energy_ratio=joules,
        energy_spread=None, macs=None, macs_ratio=None, realised=None, exits=[], calls=10.0,
        class_entropy=entropy,
    )  # fmt: skip


def _results(entropy: float) -> Results:
    results = example(STATES[0])
    results.rows["plain"].operating_points = [
        _setting("ddpm 100", 0.9, 1.0, 3.2), _setting("dpm++ 10", 0.8, 0.1, entropy),
        _setting("dpm++ 10, every 2", 0.7, 0.07, 3.1),
    ]  # fmt: skip
    picture = Picture(setting="ddpm 100", shape=(2, 1, 2, 2), pixels=_packed(bytes(range(8))))
    results.rows["plain"].drawn = [picture]
    return results


def test_a_setting_that_draws_fewer_classes_is_the_first_sentence() -> None:
    shown = page.shown(_results(1.4), sections.DOOR.find("drawn")())
    assert shown is not None
    text = page.markdown("t", [shown])
    assert "Classes go missing: plain at dpm++ 10 draws" in text
    assert "1.40 bit" in text
    figures = [
        f for block in shown.blocks for f in getattr(block, "items", ()) if hasattr(f, "svg")
    ]
    assert [f.name for f in figures] == ["drawn-vs-energy", "drawn"]
    assert "plain: dpm++ 10, cached: dpm++ 10, every 2" in figures[0].desc
    assert "data:image/png;base64" in figures[1].svg
    varied = page.shown(_results(3.0), sections.DOOR.find("drawn")())
    assert varied is not None
    assert "No setting draws fewer classes" in page.markdown("t", [varied])


def test_images_are_drawn_alike_for_each_setting_and_stored_in_the_datas_range() -> None:
    scale = [1.0]

    @contextmanager
    def brighter(by: float) -> Any:
        scale[0] = by
        yield {}
        scale[0] = 1.0

    def answer(x: Any, y: Any) -> Drawn:
        return Drawn(scale[0] * torch.rand(len(y), 1, 40, 40), x)

    class Images:
        shape = (1, 40, 40)

        class transform:  # noqa: N801
            mean, std = (0.0,), (1.0,)

    images: Any = Images()
    test: ImageSet = images
    points = lambda: {"full": brighter(1.0), "half": brighter(0.5)}  # noqa: E731
    before = torch.get_rng_state()
    entries = drawn(points, answer, Generation(), test, 3)
    assert torch.equal(before, torch.get_rng_state())
    full, half = pictures.pictures(entries)
    assert full.shape == (10, 1, 32, 32)
    pairs = zip(pictures.pixels(full), pictures.pixels(half), strict=True)
    assert all(abs(a / 2 - b) <= 1 for a, b in pairs)
    assert drawn(points, answer, Classification(), test, 3) == []


def _squares(count: int, side: int) -> Any:
    """Images with a square of one of two classes, and the masks."""
    y = torch.zeros(count, side, side, dtype=torch.int64)
    for i in range(count):
        y[i, i % 5 : i % 5 + 9, 2:12] = 1 + i % 2
    x = torch.stack([(y * 100).to(torch.uint8)] * 3, 1)
    form = Transform(side, 3, mean=(0.5,) * 3, std=(0.5,) * 3)
    return ImageSet(Split(x, y), torch.arange(count), form)


@pytest.mark.parametrize("task", [Segmentation(), UnsupervisedSegmentation()])
def test_segments_are_shown_in_the_colours_of_their_classes(task: Any) -> None:
    """A model that answers with the right segments by another name is right where names are
    matched, and there alone."""
    test = _squares(10, 24)
    named = torch.tensor([0, 2, 1])

    def answer(x: Any, y: Any) -> Any:
        return torch.nn.functional.one_hot(named[y], 3).movedim(-1, 1).float()

    entries = drawn(dict, answer, task, test, 3)
    images, masks, answers = pictures.pictures(entries)
    assert [p.setting for p in (images, masks, answers)] == [*PICTURES]
    assert all(p.shape == (8, 3, 24, 24) for p in (images, masks, answers))
    assert pictures.pixels(images) == bytes(test.split.images[:8].flatten().tolist())
    colours = torch.tensor([*pictures.pixels(masks)]).view(8, 3, 24, 24).movedim(1, -1)
    assert all(len(colours[test.split.labels[:8] == k].unique(dim=0)) == 1 for k in range(3))
    assert len(colours.flatten(0, 2).unique(dim=0)) == 3
    assert (answers.pixels == masks.pixels) == isinstance(task, UnsupervisedSegmentation)

    results = example(STATES[0])
    for row in results.rows.values():
        row.drawn = [images, masks, answers]
    shown = page.shown(results, sections.DOOR.find("segments")())
    assert shown is not None
    (figure,) = (f for block in shown.blocks for f in getattr(block, "items", ()))
    arms = [*results.rows]
    assert figure.svg.count("data:image/png;base64") == 2 + len(arms)
    assert f"test images; masks; {'; '.join(map(short, arms))}." in figure.desc
    assert page.shown(results, sections.DOOR.find("drawn")()) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"setting": "a", "shape": [1, 1, 2, 2], "pixels": "no base64!"},
        {"setting": "a", "shape": [1, 1, 2, 2], "pixels": _packed(bytes(9))},  # too many
        {"setting": "a", "shape": [1, 1, 2, 3], "pixels": _packed(bytes(4))},  # too few
        {"setting": "a", "shape": [9, 9, 999, 999], "pixels": _packed(bytes(4))},
        {"setting": "a", "shape": [1, 1, 2, True], "pixels": _packed(bytes(2))},
        {"setting": "a", "pixels": 3},
    ],
)
def test_what_is_no_picture_is_left_out(entry: dict[str, Any]) -> None:
    assert pictures.pictures([entry]) == []
