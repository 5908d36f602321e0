"""What a model is called with: one tensor, or several by name; packed bags."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from greenvis.core.example import Example, call

BAGS = [3, 1, 4, 2, 5]


def _bags() -> Example:
    index = torch.arange(len(BAGS)).repeat_interleave(torch.tensor(BAGS))
    return Example((torch.arange(15.0).view(15, 1),), {"bag": index})


def test_a_tensor_is_called_as_it_is_and_an_example_by_its_arguments() -> None:
    def model(images: Tensor, *, tokens: Any = None, flag: bool = False) -> Any:
        return images.sum(), tokens, flag

    x = torch.ones(2, 3)
    assert call(model, x) == (6.0, None, False)
    tokens = torch.arange(2)
    assert call(model, Example((x,), {"tokens": tokens, "flag": True})) == (6.0, tokens, True)


def test_rows_of_all_tensors_go_together_and_what_is_shared_stays() -> None:
    pair = Example((torch.arange(4.0),), {"tokens": torch.arange(8).view(4, 2), "flag": True})
    assert len(pair) == 4
    for rows in ([2, 0], torch.tensor([2, 0])):
        part = pair[rows]
        assert part.args[0].tolist() == [2, 0]
        assert part.kwargs["tokens"].tolist() == [[4, 5], [0, 1]]
        assert part.kwargs["flag"] is True
    assert len(pair[1:]) == 3
    half = pair.to(torch.float16)
    assert half.args[0].dtype == torch.float16
    assert half.kwargs["tokens"].dtype == torch.int64


def test_bags_are_taken_with_all_their_rows_and_numbered_again() -> None:
    bags = _bags()
    assert len(bags) == 5
    part = bags[[3, 0]]
    assert part.args[0].flatten().tolist() == [8, 9, 0, 1, 2]
    assert part.kwargs["bag"].tolist() == [0, 0, 1, 1, 1]
    assert len(bags[1:4]) == 3
    assert len(bags[torch.tensor([False] * 5)]) == 0


class _Samples(Dataset[Any]):
    def __init__(self, bags: bool) -> None:
        self.bags = bags

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Any:
        if self.bags:
            rows = _bags()[[i]]
            return rows, i
        return Example((torch.full((2,), float(i)),), {"tokens": torch.tensor([i, i, i])}), i


def test_a_plain_loader_and_accelerate_make_batches_of_them() -> None:
    loader = Accelerator(cpu=True).prepare(DataLoader(_Samples(False), batch_size=2))
    (x, y), *_, (last, _) = loader
    assert x.args[0].shape == (2, 2)
    assert x.kwargs["tokens"].shape == (2, 3)
    assert y.tolist() == [0, 1]
    assert len(last) == 1
    packed, y = next(iter(DataLoader(_Samples(True), batch_size=3)))
    assert packed.kwargs["bag"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert packed.args[0].flatten().tolist() == list(range(8))
    assert send_to_device(packed, torch.device("cpu")).kwargs["bag"].equal(packed.kwargs["bag"])
