"""In a new virtual environment, with greenvis installed and one trainer's package added, that
trainer's example runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = shutil.which(
    "uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
)
OPTIONAL = {
    "lightning",
    "ray",
    "onnx",
    "datasets",
    "pytest",
    "ruff",
    "pyright",
}  # of our extras: none may be needed


def _do(*command: str | Path, cwd: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = {**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd)}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="uv makes the environment: `make test-slow` installs it")
@pytest.mark.parametrize(
    ("added", "example"),
    [([], "transformers_trainer.py"), (["lightning"], "lightning_trainer.py")],
    ids=["transformers", "lightning"],
)
def test_an_example_runs_in_a_fresh_environment(
    added: list[str], example: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"  # so that building leaves nothing here
    shutil.copytree(
        ROOT / "greenvis", source / "greenvis", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    assert UV is not None
    python = tmp_path / "env" / "bin" / "python"
    _do(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "env", cwd=tmp_path)
    _do(
        UV,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "-c",
        ROOT / "constraints.txt",
        source,
        *added,
        cwd=tmp_path,
    )
    there = {
        one["name"]
        for one in json.loads(
            _do(UV, "pip", "list", "--format", "json", "--python", python, cwd=tmp_path)
        )
    }
    assert {"greenvis", *added} <= there
    assert not (OPTIONAL - {*added}) & there
    shutil.copy(ROOT / "examples" / example, tmp_path)
    assert "energy" in _do(python, example, cwd=tmp_path)
    assert "Lora" in _do(python, "-m", "greenvis", "explain", "lora", "--json", cwd=tmp_path)
