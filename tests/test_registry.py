"""Own techniques, and those of an outside package that is really installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.techniques import registry

OUTSIDE = Path(__file__).parent / "outside"


def test_names_derive_from_the_folder() -> None:
    assert {"distill", "lora"} <= set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_every_technique_says_what_it_is(name: str) -> None:
    kind = registry.find(name)
    assert kind.name == name
    assert registry.find_class(kind.__name__) is kind
    assert len(kind.__doc__ or "") > 80, (
        "a technique's docstring says what it saves and what it costs"
    )
    assert getattr(gv, kind.__name__) is kind
    assert kind.__name__ in gv.__all__


def test_a_typo_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"unknown technique 'distil'; did you mean 'distill'"):
        registry.find("distil")
    with pytest.raises(AttributeError, match="Lroa"):
        _ = gv.Lroa  # type: ignore[attr-defined]


def test_an_outside_package_is_found_and_works(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(_copy(tmp_path))], check=True, capture_output=True)
    code = (
        "import json, torch, greenvis as gv\n"
        "from greenvis.techniques import registry\n"
        "m = torch.nn.Linear(3, 2); live = gv.wrap(m, [registry.find('scale_loss')(factor=2.0)])\n"
        "x = torch.ones(1, 3); l = m(x)\n"
        "print(json.dumps([registry.names(), float(live.loss(x, None, l)), float(2 * "
        "l.square().mean()), gv.ScaleLoss.name]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout
    names, loss, expected, attribute = json.loads(out)
    assert "scale_loss" in names
    assert loss == expected
    assert attribute == "scale_loss"


def _copy(tmp_path: Path) -> Path:
    """Build from a copy: building writes into the source folder."""
    import shutil

    return Path(shutil.copytree(OUTSIDE, tmp_path / "outside"))


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.find(n).only_with])
def test_a_field_that_changes_nothing_beside_another_is_refused(name: str) -> None:
    kind = registry.find(name)
    for field, (other, values) in kind.only_with.items():
        default = kind.model_fields[field].default
        changed = (
            not default
            if isinstance(default, bool)
            else "batch"
            if isinstance(default, str)
            else default + 2
        )
        with pytest.raises(BadInput, match=f"'{field}' changes nothing with {other}"):
            kind(
                **{field: changed, other: next(v for v in _values(kind, other) if v not in values)}
            )
        assert dict(kind(**{field: changed, other: values[0]}))[field] == changed
        assert kind(
            **{field: default, other: next(v for v in _values(kind, other) if v not in values)}
        )


def _values(kind: type, field: str) -> tuple[object, ...]:
    return get_args(kind.model_fields[field].annotation)


def test_the_catalogue_is_what_the_classes_say() -> None:
    assert registry.CATALOGUE.read_text() == registry.catalogue(), "run `make readme`"


@pytest.mark.parametrize(
    "words", [["explain", "lora"], ["techniques"], ["schema"], ["--help"]], ids=lambda w: w[0]
)
def test_texts_of_techniques_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys; from greenvis.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
