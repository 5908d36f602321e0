"""Tasks: the contract, classification against formulas, and who may be wrapped for what."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.tasks import registry
from greenvis.tasks.base import Measure, Task
from greenvis.tasks.classification import Classification
from greenvis.testing import check_task

LOGITS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def test_own_tasks_keep_the_contract() -> None:
    assert "classification" in registry.names()
    for name in registry.DOOR.own:
        check_task(registry.find(name))


def test_cross_entropy_and_accuracy_are_the_formulas() -> None:
    task = Classification(label_smoothing=0.2)
    target = 0.8 * F.one_hot(LABELS, 3) + 0.2 / 3
    want = -(target * LOGITS.log_softmax(1)).sum(1)
    torch.testing.assert_close(task.losses(LOGITS, LABELS), want)
    torch.testing.assert_close(task.loss(LOGITS, LABELS), want.mean())
    metric = task.metrics(3)["accuracy"]
    for rows in (slice(0, 2), slice(2, 7)):
        metric.update(LOGITS[rows], LABELS[rows])
    right = int((LOGITS.argmax(1) == LABELS).sum())
    assert 0 < right < 7
    assert metric.compute().item() == right / 7  # to the bit, in double precision


@pytest.mark.parametrize(
    ("outputs", "labels", "classes", "says"),
    [
        (LOGITS, LABELS, 4, r"answers with \(7, 3\), but the data has 4 classes"),
        (LOGITS[..., None], LABELS, None, "num_classes"),
        (LOGITS, torch.rand(7), None, "are regression"),
        (LOGITS, (LOGITS > 0).float(), None, "are multilabel"),
        (LOGITS, LABELS.view(7, 1, 1), None, "do not go with"),
    ],
)
def test_what_does_not_go_together_is_refused(
    outputs: Tensor, labels: Any, classes: int | None, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        Classification().check(outputs, labels, classes)


def test_it_does_not_guess_among_outputs() -> None:
    task = Classification()
    assert task.outputs({"logits": LOGITS, "loss": None}) is LOGITS
    for raw in ({"colour": LOGITS, "shape": LOGITS}, (LOGITS, LOGITS), torch.rand(2, 3, 4, 4)):
        with pytest.raises(BadInput):
            task.outputs(raw)


def _net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


class Count(Task):
    """How many things an image shows, in things."""

    name: ClassVar[str] = "count"
    form: ClassVar[str] = "regression"
    primary: ClassVar[Measure] = Measure("mae", "things", higher_is_better=False)
    class_axis: ClassVar[int | None] = None

    def outputs(self, raw: Any) -> Tensor:
        if not isinstance(raw, Tensor):
            raise BadInput("count wants a tensor")
        return raw

    def losses(self, outputs: Tensor, labels: Any) -> Tensor:
        return (outputs[:, 0] - labels).square()

    def metrics(self, classes: int) -> dict[str, Any]:
        from torchmetrics import MeanAbsoluteError

        return {"mae": _First(MeanAbsoluteError())}

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        if outputs.dim() != 2 or (labels is not None and labels.shape != outputs.shape[:1]):
            raise BadInput("count wants one number per image")

    def example(self, size: int) -> Any:
        labels = torch.arange(float(size))
        return torch.zeros(size, 1), labels, labels[:, None].clone()


class _First:
    """A metric of the first output."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.compute = metric.compute

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.metric.update(outputs[:, 0], labels)


def test_a_task_where_lower_is_better_keeps_the_contract() -> None:
    check_task(Count)


class Wrong(Count):
    """Breaks what the check names."""

    name: ClassVar[str] = "wrong"
    primary: ClassVar[Measure] = Measure("mae", "things", higher_is_better=True)

    def outputs(self, raw: Any) -> Tensor:
        return raw if isinstance(raw, Tensor) else LOGITS

    def loss(self, outputs: Tensor, labels: Any) -> Tensor:
        return self.losses(outputs, labels).sum()

    def metrics(self, classes: int) -> dict[str, Any]:
        from torchmetrics import MeanAbsoluteError

        class Last(_First):
            def update(self, outputs: Tensor, labels: Tensor) -> None:
                self.metric.reset()
                super().update(outputs, labels)

        return {"mae": Last(MeanAbsoluteError())}


def test_the_contract_says_what_is_broken() -> None:
    with pytest.raises(GreenvisError) as raised:
        check_task(Wrong)
    for says in (
        "not the mean of the losses",
        "does not refuse dict",
        "of two batches",
        "though higher is better",
    ):
        assert says in str(raised.value)


def test_wrap_refuses_techniques_that_are_not_right_for_the_task() -> None:
    with pytest.raises(BadInput, match=r"'ncm' is right for 'classification', and this is regress"):
        gv.wrap(_net(), gv.Ncm(), task=Count())
    gv.wrap(_net(), gv.Bitfit(), task=Count()).undo()  # reads no answers: right for all
    live = gv.wrap(_net(), gv.Bitfit(), task="classification")
    x = torch.rand(4, 3, 2, 2)
    assert live.loss(x, LABELS[:4], live.model(x)) == 0
    with pytest.raises(BadInput, match="are regression"):  # whatever the techniques read
        live.loss(x, torch.rand(4), live.model(x))


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(BadInput, match="did you mean 'classification'"):
        gv.wrap(_net(), task="clasification")
    with pytest.raises(BadInput, match=r"write Classification\(\)"):
        gv.wrap(_net(), task=Classification)  # type: ignore[arg-type]
    model: Any = _net()
    model.config = type("Config", (), {"problem_type": "regression"})()
    with pytest.raises(BadInput, match="problem_type"):
        gv.wrap(model, task="classification")
