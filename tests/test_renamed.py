"""What the first releases called otherwise still works, and says so."""

import importlib
import sys

import pytest
import torch

import greenvis as gv


@pytest.mark.parametrize(("old", "new"), sorted(gv._RENAMED.items()))
def test_a_renamed_module_is_the_one_it_became(old: str, new: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == new


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("greenvis.tecnique")


def test_tasks_of_a_stream_by_their_first_name() -> None:
    from greenvis.core import technique

    with pytest.warns(DeprecationWarning, match="Task is Experience now"):
        task = technique.Task(0, (0, 1), (0, 1), 2)
    live = gv.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), [gv.Ncm()])
    with pytest.warns(DeprecationWarning, match="begin_experience now"):
        live.begin_task(task)
    with pytest.warns(DeprecationWarning, match="end_experience now"):
        live.end_task([(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))])
    with pytest.raises(AttributeError, match="tusk"):
        technique.tusk  # noqa: B018
