"""Whatever `greenvis.__all__` names has an example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import warnings

import pytest
from doctests import names

import greenvis as gv

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", gv.__all__)
def test_the_example_of_a_public_name_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    examples = doctest.DocTestParser().get_doctest(
        getattr(gv, name).__doc__ or "", names(), name, None, 0
    )
    assert examples.examples, f"{name} has no example in its docstring"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        outcome = doctest.DocTestRunner(optionflags=FLAGS).run(examples, out=print)
    assert outcome.failed == 0, capsys.readouterr().out
