"""What `test_outside.py` asks of a process in which the outside package is installed: the answers by
name in answers.json, what raised says it; then a recipe is run.

python outside_checks.py RECIPE FOLDER-OF-RECORDS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenvis as gv
from greenvis import testing
from greenvis.cli import main as cli
from greenvis.data.dataset import DOOR as DATASETS
from greenvis.meters import pricing, record
from greenvis.meters.doctor import doctor
from greenvis.report.sections import DOOR as SECTIONS
from greenvis.tasks import registry as tasks
from greenvis.techniques import registry


def section() -> None:
    testing.check_section(SECTIONS.find("waste"))


def technique() -> list[Any]:
    assert gv.Gain is registry.find("gain")  # type: ignore[attr-defined]
    return [[r.outcome, r.reason] for r in testing.check_technique(gv.Gain)]  # type: ignore[attr-defined]


def data_set() -> list[Any]:
    return [DATASETS.names(), testing.check_dataset(DATASETS.find("stripes"))]


def metered() -> list[Any]:
    with gv.track("plug", dir=sys.argv[2]) as run:
        time.sleep(0.3)
    read = record.read(run.path)
    parts = [dict(r._asdict()) for r in pricing.phases(read)[""].values()]
    return [run.header["components"], parts, read.totals[""]]


def meter_source() -> list[Any]:
    from greenvis_outside.meter import ConstantPlug  # type: ignore[import-not-found]

    row = next(r for r in doctor() if r["what"] == "meter source constant_plug")
    return [testing.check_meter_source(ConstantPlug), row["source"], row["why"]]


def task() -> list[Any]:
    import torch

    focal: Any = tasks.find("focal")
    testing.check_task(focal)
    z, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    live = gv.wrap(net, gv.Lwf(), task=focal(gamma=1.0))
    return [focal(gamma=1.0).losses(z, y).tolist(), live.task.name]


def answer(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    unplugged = {f"{check.__name__}, unplugged": answer(check) for check in (metered, meter_source)}
    os.environ["CONSTANT_PLUG_W"] = "60"
    plugged = (section, technique, data_set, metered, meter_source, task)
    answers = unplugged | {check.__name__: answer(check) for check in plugged}
    Path("answers.json").write_text(json.dumps(answers))
    sys.exit(cli.main(["run", sys.argv[1]]))


if __name__ == "__main__":
    main()
