"""Every technique greenvis registers, on every task: trains, or refuses with the reason."""

from __future__ import annotations

from typing import ClassVar

import pytest
from torch import nn

from greenvis.core.technique import Installed, Stage, Technique
from greenvis.tasks import registry as tasks
from greenvis.techniques import registry
from greenvis.testing.task_matrix import TaskHost, check_tasks, task_hosts

HOSTS = {host.task: host for host in task_hosts()}
FAST = ("multilabel", "segmentation", "bags", "generation")  # of one example each
# technique: tasks on which an example of it trains
SURE = {
    "lora": {
        "classification",
        "multilabel",
        "regression",
        "segmentation",
        "bags",
        "image_text",
        "vqa",
    },
    "distill": {"classification", "segmentation", "bags"},
    "cross_modal": {"image_text"},
    "image_tokens": {"vqa"},
    "kv_cache": {"vqa"},
    "label_maps": {"segmentation"},
    "pass_pretrain": {"classification", "segmentation"},
    "pixel_attention": {"segmentation"},
    "lwf": {"classification", "segmentation"},
    "token_merge": {"classification", "multilabel", "regression", "bags"},
    "sam": set(HOSTS),
    "early_exit": {"classification"},
    "replay": {"classification"},
}


def _faults(name: str, hosts: list[TaskHost], examples: int | None) -> list[str]:
    technique = registry.find(name)
    results = check_tasks(technique, hosts, technique.examples[:examples])
    works = {r.task for r in results if r.outcome == "works"}
    missing = (SURE.get(name, set()) & {h.task for h in hosts}) - works
    return [
        *(str(r) for r in results if r.outcome == "fails"),
        *(str(r) for r in results if r.outcome == "refuses" and len(r.reason) < 20),
        *(f"{name} trains on no host of {task}" for task in missing),
    ]


def test_there_is_a_host_of_every_task() -> None:
    assert set(HOSTS) >= set(tasks.DOOR.own)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", registry.DOOR.own)
def test_it_trains_on_a_task_or_refuses(name: str) -> None:
    assert _faults(name, [HOSTS[task] for task in FAST], 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.DOOR.own)
def test_every_example_trains_on_every_task_or_refuses(name: str) -> None:
    assert _faults(name, [*HOSTS.values()], None) == []


class _Reads(Technique):
    """Reads images as one tensor, and does not say so."""

    name: ClassVar[str] = "reads"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> Installed:
        class Live(Installed):
            def terms(self, x, y, logits):
                return {"reads": x.mean() * logits.sum()}

        return Live()


def test_what_does_not_say_what_it_is_right_for_fails() -> None:
    results = check_tasks(_Reads, [HOSTS["multilabel"], HOSTS["bags"]])
    assert [r.outcome for r in results] == ["works", "fails"]
    assert "Example" in results[1].reason
