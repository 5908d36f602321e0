"""Settings every test shares."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import Counter
from collections.abc import Iterator

import brief
import forked
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
brief.measurements()
settings.register_profile(  # how long one takes is no fault
    "busy machines", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machines")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow, of each test that is marked `one_in(n)`, all cases but its first, n+1-th …"""
    cases: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: each part of a training begins with a full collection


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Triton's bindings count what is left at the end


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    gc.freeze()  # what the files before have imported stays as well


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    yield
    forked.end_all()


@pytest.fixture(scope="session")
def with_outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes in which the package of tests/outside is installed."""
    folder = tmp_path_factory.mktemp("outside")
    # building writes into the source folder
    source = shutil.copytree(Path(__file__).parent / "outside", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    install = [*pip, "--no-index", "--target", str(folder / "site"), str(source)]
    subprocess.run(install, check=True, capture_output=True)
    paths = [str(folder / "site"), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(autouse=True, scope="session")
def _own_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the runs of tests out of the user's index."""
    from greenvis.report import listing_index

    file = tmp_path_factory.mktemp("index") / "greenvis" / "listing.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing_index, "location", lambda: file)
        yield
