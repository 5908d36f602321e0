"""Own techniques, and those of an outside package that is really installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the outside package is installed."""
    folder = tmp_path_factory.mktemp("outside")
    copy = shutil.copytree(OUTSIDE, folder / "package")  # building writes into the source folder
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]
    install = [sys.executable, "-m", "pip", "install", *options, str(copy)]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    return folder / "site"


def beside(site: Path, code: str, **env: str) -> Any:
    """Run a program where the outside package is installed; return the JSON it prints."""
    paths = os.pathsep.join([str(site), str(OUTSIDE.parents[1])])
    command = [sys.executable, "-c", "import json, greenvis as gv\n" + code]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_outside_technique_is_found_and_works(site: Path) -> None:
    code = (
        "import torch\n"
        "from greenvis.techniques import registry\n"
        "m = torch.nn.Linear(3, 2); live = gv.wrap(m, [registry.find('scale_loss')(factor=2.0)])\n"
        "x = torch.ones(1, 3); l = m(x)\n"
        "print(json.dumps([registry.names(), float(live.loss(x, None, l)), float(2 * "
        "l.square().mean()), gv.ScaleLoss.name]))\n"
    )
    names, loss, expected, attribute = beside(site, code)
    assert "scale_loss" in names
    assert loss == expected
    assert attribute == "scale_loss"


def test_an_outside_meter_source_meters_a_run(site: Path, tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from greenvis.meters import pricing, record\n"
        f"with gv.track('plug', dir={str(tmp_path)!r}) as run:\n"
        "    time.sleep(0.3)\n"
        "found = record.read(run.path)\n"
        "parts = [dict(r._asdict()) for r in pricing.phases(found)[''].values()]\n"
        "print(json.dumps([run.header['components'], parts, found.totals['']]))\n"
    )
    (plug,), (reading,), totals = beside(site, code, CONSTANT_PLUG_W="60")
    assert (plug["name"], plug["source"], plug["observation"]) == (
        "machine",
        "constant_plug",
        "constant_plug_j",
    )
    assert (reading["method"], reading["provenance"]) == ("constant_plug", "measured")
    assert reading["value"] == pytest.approx(60 * totals["wall_s"])
    assert totals["wall_s"] > 0.3
    components, _, _ = beside(site, code)  # nothing is plugged in: the others go on
    assert "constant_plug" not in [c["source"] for c in components]


def test_an_outside_meter_source_keeps_the_contract_and_doctor_names_it(site: Path) -> None:
    code = (
        "from greenvis.meters.doctor import doctor\n"
        "from greenvis.testing import check_meter_source\n"
        "from greenvis_outside.meter import ConstantPlug\n"
        "row = next(r for r in doctor() if r['what'] == 'meter source constant_plug')\n"
        "print(json.dumps([check_meter_source(ConstantPlug), row['source'], row['why']]))\n"
    )
    check, state, _ = beside(site, code, CONSTANT_PLUG_W="60")
    assert (check, state) == (["constant_plug", "works", ""], "available")
    (_, outcome, reason), state, why = beside(site, code)
    assert (outcome, state) == ("refuses", "not available")
    assert reason == why == "$CONSTANT_PLUG_W names no watts"


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
