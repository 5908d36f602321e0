"""What README and the pages of docs/ tell their reader to type works, after `make demo`; so do the examples of the help."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import greenvis
from PIL import Image

from greenvis.cli.app import EXAMPLES as OF_VERBS
from greenvis.cli.main import VERBS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PAGES = [*sorted((ROOT / "docs").rglob("*.md"))]
LINES = [
    line.partition(" #")[0].strip()
    for block in re.findall(
        r"```sh\n(.*?)```", "\n".join([TEXT, *(page.read_text() for page in PAGES)]), re.S
    )
    for line in block.splitlines()
    if line.strip() and not line.startswith("make ")
]
assert VERBS  # whose modules fill in the examples
FETCHES = "greenvis data fetch"  # needs the network
EXAMPLES = [line for line in OF_VERBS.values() if not line.startswith(FETCHES)]
COMMANDS = list(dict.fromkeys(LINES + EXAMPLES))
MINUTES = (
    "advise",
    "probe",
    "torchrun",
    "--on ray",
    "0.01,0.003",
    "--repeat",
    "run my.yaml",
    "plan my.yaml",
    "card my/",
    "greenvis labels",
    "bench",
    "tune",
    "epochs=3",
    "tensorboard",
    "greenvis track",
    "runs/loop",
)  # words of commands that only the slow test runs


def _clone(folder: Path) -> dict[str, str]:
    """Make a folder like a fresh clone, and return an environment in which `greenvis` is on the
    path."""
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("quickstart", "flagship"):
        shutil.copytree(ROOT / "reports" / name, folder / "reports" / name)
    for number in range(12):  # the images of the reader
        image = Image.new("RGB", (32, 32), (20 * number, 100, 200 - 10 * number))
        file = folder / "my-folder" / ("cats", "dogs", "owls")[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    (folder / "bin").mkdir()
    for name, words in (
        ("greenvis", "-m greenvis"),
        ("torchrun", "-m torch.distributed.run"),
        ("python", ""),
    ):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    more = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    return (
        {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | more
        | {"OMP_NUM_THREADS": "1"}
    )


def _run(command: str, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    return done.stdout


def _run_forked(command: str, folder: Path, env: dict[str, str]) -> str:
    """Run it without a shell, in a process that has nothing to import."""
    name, *words = shlex.split(command)
    assert name == "greenvis"
    done = greenvis(*words, cwd=folder, env=env)
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    return done.stdout


def _demo() -> str:
    """Return what `make demo` runs."""
    (line,) = re.findall(
        r"^demo:.*\n\t\$\(BIN\)/(greenvis .*)$", (ROOT / "Makefile").read_text(), re.M
    )
    return line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A clone after `make demo` of recipes that train for one epoch, with one seed."""
    folder = tmp_path_factory.mktemp("clone")
    env = _clone(folder)
    for path in (folder / "recipes").glob("quickstart*.yaml"):
        path.write_text(
            re.sub(
                r"seeds: \[0, 1, 2\]",
                "seeds: [0]",
                re.sub(r"epochs: \d+, batch", "epochs: 1, batch", path.read_text()),
            ).replace("{name: digits,", "{name: digits, train: 100, test: 60,")
        )
    _run_forked(_demo(), folder, env)
    return folder, env


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in MINUTES)])
def test_a_command_of_the_readme_runs_after_the_demo(
    command: str, demo: tuple[Path, dict[str, str]]
) -> None:
    if "--log-with tensorboard" in command:
        pytest.importorskip("tensorboard")
    if "--to onnx" in command:
        pytest.importorskip("onnxscript")
    if " diff " in command:
        command = command.replace(
            "+100%", "+900%"
        )  # one seed and one epoch: what is tested is that it can be said
    shutil.rmtree(demo[0] / "exports", ignore_errors=True)  # several pages export the same model
    assert _run_forked(command, *demo)


@pytest.mark.slow
def test_every_command_of_the_readme_runs_after_make_demo(tmp_path: Path) -> None:
    env = _clone(tmp_path)
    _run(_demo(), tmp_path, env)
    for command in COMMANDS:
        shutil.rmtree(tmp_path / "exports", ignore_errors=True)
        _run(command, tmp_path, env)


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are those of a user's own script: model, teacher, loader, criterion, evaluate."""
    import torch

    from greenvis import models

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    size = {
        "img_size": 8,
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
        "in_chans": 1,
    }
    model, teacher = (models.build("timm/vit_tiny_patch16_224", **size) for _ in range(2))
    loader = [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    user = {
        "torch": torch,
        "model": model,
        "teacher": teacher,
        "loader": loader,
        "evaluate": lambda model: 0.5,
    }
    monkeypatch.chdir(tmp_path)
    exec(code, {**user, "criterion": torch.nn.functional.cross_entropy})
    assert (tmp_path / "reports/pets/index.html").exists()
