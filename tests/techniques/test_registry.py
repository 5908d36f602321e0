"""Techniques by name; those of an outside package are in test_outside.py."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from typing import Annotated, Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.techniques import registry


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


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.find(n).only_with])
def test_a_field_that_changes_nothing_beside_another_is_refused(name: str) -> None:
    kind = registry.find(name)
    for field, (other, values) in kind.only_with.items():
        default = kind.model_fields[field].default
        changed = (
            not default
            if isinstance(default, bool)
            else next(v for v in _values(kind, field) if v != default)
            if isinstance(default, str)
            else next(iter(_words(kind, field)), None) or _other_number(kind, field)
        )
        with pytest.raises(BadInput, match=f"'{field}' changes nothing with {other}"):
            kind(
                **{field: changed, other: next(v for v in _values(kind, other) if v not in values)}
            )
        assert dict(kind(**{field: changed, other: values[0]}))[field] == changed
        assert kind(
            **{field: default, other: next(v for v in _values(kind, other) if v not in values)}
        )


def _other_number(kind: Any, field: str) -> Any:
    """Return a number the field takes that is not its default."""
    info = kind.model_fields[field]
    default = info.default or 0
    for number in (default + 2, default / 2):
        with suppress(ValidationError):
            return TypeAdapter(Annotated[info.annotation, info]).validate_python(number)
    raise AssertionError(f"{kind.name}.{field} takes no other number")


def _words(kind: type, field: str) -> list[str]:
    """Return what a field that is absent by default may say: "exp" of Literal["exp"] | None."""
    return [v for part in _values(kind, field) for v in get_args(part) if isinstance(v, str)]


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
