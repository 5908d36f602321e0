"""Images that a model drew: into a record, out of it, and on the page."""

from __future__ import annotations

import base64
import zlib
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from greenvis.data.image_set import ImageSet
from greenvis.experiment.drawn import drawn
from greenvis.report import page, pictures, sections
from greenvis.report.arm_results import Picture, Setting
from greenvis.report.shape import Results
from greenvis.tasks.classification import Classification
from greenvis.tasks.generation import Drawn, Generation
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
