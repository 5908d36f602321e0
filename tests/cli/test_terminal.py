"""What a terminal of 80 and of 200 columns shows, and what a file or another program gets: run, ls, compare, plan,
advise and the help; and the live display of a training."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from forked import FORKS, greenvis

from greenvis.cli import live
from greenvis.cli import main as cli
from greenvis.cli.app import EXAMPLES
from greenvis.cli.output import WIDE
from greenvis.tasks.base import Measure

RECIPE = """\
name: tiny
data: {name: digits, train: 120, test: 40}
model: {ref: plain/mlp, img_size: 8, hidden: [8]}
train: {epochs: 2, batch_size: 20, threads: 1}
arms: {plain: {}, longer: {train: {epochs: 3}}}
meter: {codecarbon: false, country: FRA}
"""
PLANS = """\
train: {batch_size: 10, epochs: 1, eval_every: 0, threads: 1}
arms: {all: {}, head: {techniques: [linear_probe]}}
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTHS = (80, 200)
PIPED = 0  # columns of what is no terminal
REPORTS = [
    path
    for path in sorted((Path(__file__).parents[2] / "reports").glob("*/results.json"))
    if '"baseline"' in path.read_text()
]
FIRST_S = 3.0  # of CPU, until `greenvis run` says something that helps


def _inside(words: list[str], cwd: str, columns: int, name: str) -> None:
    """Run greenvis with a terminal as its output and its errors."""
    terminal = os.open(name, os.O_RDWR)
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40"}
    for number in (1, 2):
        os.dup2(terminal, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    import brief

    brief.measurements()
    sys.exit(cli.main(words))


def _terminal(*words: str, cwd: Path, columns: int) -> str:
    """Return what a terminal of so many columns got, or, of none, another program."""
    if columns == PIPED:
        done = greenvis(*words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stderr + done.stdout
    ours, theirs = pty.openpty()
    process = FORKS.Process(target=_inside, args=([*words], str(cwd), columns, os.ttyname(theirs)))
    process.start()
    got = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 0.2)
        if ready:
            got += os.read(ours, 65536)
        elif not process.is_alive():
            break
    os.close(ours)
    os.close(theirs)
    assert process.exitcode == 0, got.decode()
    return got.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def piped(folder: Path) -> dict[str, Any]:
    """The recipe run without a terminal."""
    done = greenvis("run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"out": done.stdout, "err": done.stderr}


def test_without_a_terminal_a_run_says_in_lines_how_it_goes(piped: dict[str, Any]) -> None:
    first, *lines = piped["err"].splitlines()
    assert first == ("tiny: 2 arms (plain, longer) × 1 seed on digits; records in runs/tiny")
    assert lines[0] == "run 1 of 2: tiny/plain seed 0: training"
    over = (
        r"run 1 of 2: tiny/plain seed 0: accuracy \d.* %, .*J with start-up and measuring, .* s"
        "(, about .* left)?"
    )
    assert re.fullmatch(over, lines[1])
    assert lines[2] == "run 2 of 2: tiny/longer seed 0: training"
    assert not ESCAPE.search(piped["err"] + piped["out"])
    assert all(len(line) <= 200 for line in piped["out"].splitlines())
    again = [line for line in lines if "run " not in line]
    assert again == []


@pytest.mark.one_in(2)
@pytest.mark.parametrize("columns", WIDTHS)
def test_on_a_terminal_a_run_is_shown_live(
    columns: int, folder: Path, piped: dict[str, Any]
) -> None:
    text = _terminal(
        "run", "tiny.yaml", "--fresh", "--out", f"reports/{columns}", cwd=folder, columns=columns
    )
    plain = ESCAPE.sub("", text)
    assert re.search(r"run 1 of 2: tiny/plain seed 0: accuracy .* %, .*J with .*, .* s", plain)
    assert "seed 0: training" not in plain
    assert "report: " in plain
    drawn = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("─")]
    assert all(len(line) <= columns for line in drawn)


@pytest.mark.parametrize("columns", [*WIDTHS, PIPED])
@pytest.mark.parametrize("command", ["ls", "compare tiny/plain tiny/longer", "plan tiny.yaml"])
def test_tables_fit_their_terminal(
    command: str, columns: int, folder: Path, piped: dict[str, Any]
) -> None:
    text = _terminal(*command.split(), cwd=folder, columns=columns)
    lines = ESCAPE.sub("", text).splitlines()
    assert any("plain" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= (columns or WIDE)
    assert not any("…" in line for line in lines)  # nothing is cut off
    assert columns or text == ESCAPE.sub("", text)
    if command == "ls":
        assert "Energy, CO₂e and time are of whole records" in text


@pytest.mark.one_in(5)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.parent.name)
def test_what_a_run_prints_at_its_end_fits(path: Path, columns: int) -> None:
    """The table of each committed report, of `make demo` among them."""
    from rich.console import Console

    from greenvis.report import stored, table

    drawn = table(stored.read(path))
    console = Console(width=columns, color_system=None)
    assert console.measure(drawn).minimum <= columns  # else it is cut at the right
    with console.capture() as capture:
        console.print(drawn)
    shown = capture.get()
    assert "…" not in shown
    for arm in list(stored.read(path).arms)[:5]:
        assert arm[:10] in shown


def test_a_plan_says_what_it_took_itself(folder: Path, piped: dict[str, Any]) -> None:
    done = greenvis("plan", "tiny.yaml", "--set", "train.epochs=4", cwd=folder)
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"planning itself took .*J, .* s", last)


@pytest.mark.slow
def test_advice_says_its_cost_before_it_is_spent(folder: Path) -> None:
    """The second time all is on record: the trials are not run again for a wider terminal."""
    (folder / "plans.yaml").write_text(PLANS)
    words = "advise plain/mlp --data digits --plans plans.yaml --option hidden=[8] --img-size 8"
    over = ["--set", "data.train=160", "--set", "data.test=40", "--set", "data.classes=[0,1]"]
    costs = ["about .*J, if each costs what all does", *["all tried before, nothing to spend"] * 2]
    for columns, cost in zip((*WIDTHS, PIPED), costs, strict=True):
        text = _terminal(*words.split(), *over, cwd=folder, columns=columns)
        lines = [line.rstrip() for line in ESCAPE.sub("", text).splitlines()]
        begun = next(i for i, line in enumerate(lines) if "plans to try" in line)
        assert re.fullmatch(f"2 plans to try on 10, 20, 40 images: {cost}", lines[begun])
        assert not any("all: " in line for line in lines[:begun])  # no trial before
        table = lines[next(i for i, line in enumerate(lines) if "predicted" in line) :]
        assert max(
            map(len, table[: next(i for i, x in enumerate(table) if "from trials" in x)])
        ) <= (columns or WIDE)
        assert lines[-1].startswith("greenvis run ")


def test_the_first_line_comes_before_torch_does(folder: Path) -> None:
    """In CPU seconds: how long that takes by the clock is the machine's affair."""
    code = (
        "import sys, time\nfrom greenvis.cli import output, runs\n"
        "def said(text):\n"
        "    print(text, time.process_time(), 'torch' in sys.modules)\n    sys.exit()\n"
        "runs.teller = lambda as_json: said\n"
        "from greenvis.cli.main import main\nmain(['run', 'tiny.yaml', '--fresh'])\n"
    )
    (folder / "first.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "first.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    *_, seconds, torch = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < FIRST_S


class _Tracker:
    """Stands for what meters a run: the display reads joules and seconds from it."""

    on_log: Any = None
    joules = 5.0

    def energy(self) -> Any:
        return SimpleNamespace(value=self.joules)

    def observed(self) -> dict[str, float]:
        return {"wall_s": 2.0}


def _job(name: str, epochs: int) -> Any:
    train = SimpleNamespace(epochs=epochs)
    arm = SimpleNamespace(stages=(), train=train, stream=None, active=None)
    return SimpleNamespace(name=name, seed=0, arm=arm)


def test_what_is_shown_follows_what_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    said: list[str] = []
    jobs = [_job("r/done", 2), _job("r/a", 4), _job("r/b", 4)]
    shown = live.Progress(said.append)
    shown.planned(jobs)
    shown.skipped(jobs[0], "")
    shown.began(jobs[1], "")
    tracker = _Tracker()
    shown.metered(tracker, Measure("accuracy"))
    assert shown.state() == ["epoch 1 of 4", "starting"]
    now[0] = 110.0
    tracker.on_log({"epoch": 1, "loss": 0.5})
    tracker.on_log({"epoch": 1, "accuracy": 0.75})
    shown.read()
    # one epoch of the eight that are left took ten seconds
    assert shown.state() == [
        "epoch 2 of 4", "loss 0.500", "accuracy 75.0 %", "5.0 J so far", "about 1 min 10 s left",
    ]  # fmt: skip
    now[0] = 145.0
    tracker.on_log({"epoch": 2, "loss": 0.4})  # the last line is more than EVERY_S ago
    shown.ended(jobs[1], tracker, {"accuracy": 0.8})
    assert said[:2] == [
        "run 1 of 3: r/done seed 0: done before, kept",
        "run 2 of 3: r/a seed 0: training",
    ]
    assert said[2].startswith(
        "run 2 of 3: r/a seed 0: epoch 3 of 4, loss 0.400, accuracy 75.0 %, 5.0 J so far"
    )
    assert (
        said[3]
        == "run 2 of 3: r/a seed 0: accuracy 80.0 %, 5.0 J with start-up and measuring, 2.00 s, about 45 s left"
    )
    shown.began(jobs[2], "")
    shown.metered(tracker, Measure("accuracy"))
    shown.read()
    assert "all runs 10 J" in shown.state()


def test_a_resumed_run_goes_on_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    shown = live.Progress(lambda text: None)
    shown.planned([_job("r/a", 100)])
    shown.began(_job("r/a", 100), "")
    tracker = _Tracker()
    shown.metered(tracker, Measure("accuracy"))
    for epoch in (80, 81):
        now[0] += 5.0
        tracker.on_log({"epoch": epoch, "loss": 0.5})
    # two epochs took ten seconds, and nineteen are left
    assert shown.state() == ["epoch 82 of 100", "loss 0.500", "starting", "about 1 min 35 s left"]


def test_the_display_fits_eighty_columns() -> None:
    from rich.console import Console

    jobs = [_job("a-recipe-with-a-long-name/and-an-arm-with-a-longer-one", 100)]
    shown = live.Live()
    shown.planned(jobs)
    shown.began(jobs[0], "")
    shown.metered(_Tracker(), Measure("accuracy"))
    shown.read()
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(shown.shown())
    lines = capture.get().splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("run 1 of 1: a-recipe-with")


def test_every_verb_has_an_example_and_every_option_a_description() -> None:
    root: Any = typer.main.get_command(cli.app)

    def commands(command: Any, path: str) -> Any:
        if "add_completion" in path:
            return
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from commands(child, f"{path} {name}".strip())

    for path, command in commands(root, ""):
        if not path:
            continue
        assert EXAMPLES[path].startswith(f"greenvis {path}") or path == "data", path
        for param in command.params:
            assert getattr(param, "help", None), f"greenvis {path}: {param.name}"


def test_the_help_shows_each_verb_with_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    top = [example for path, example in EXAMPLES.items() if " " not in path]
    assert [e for e in top if f"$ {e}" not in said] == []
    assert cli.main(["data", "--help"]) == 0
    assert "$ greenvis data show digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["explain", "LoRA"], "did you mean 'lora'?"),
        (["explain", "Token-Merge"], "did you mean 'token_merge'?"),
        (["flops", "timm/resnet5O"], "did you mean 'resnet50'?"),
        (["report", ".", "--grid", "UK"], "did you mean 'GBR'"),
        (["report", ".", "--grid", "GER"], "did you mean 'DEU'"),
        (["report", ".", "--grid", "SE"], "did you mean 'SWE'"),
    ],
)
def test_names_people_write_lead_to_the_right_ones(
    words: list[str], hint: str, folder: Path, piped: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert cli.main(words) == 2
    assert hint in capsys.readouterr().err


def test_a_class_that_is_written_otherwise_is_named() -> None:
    import greenvis as gv

    with pytest.raises(AttributeError, match="did you mean 'Lora'"):
        _ = gv.LoRA


def test_ids_that_ls_shows_are_accepted_everywhere(
    folder: Path, piped: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from greenvis.cli import output

    monkeypatch.chdir(folder)
    record = next((folder / "runs/tiny/plain").rglob("*.jsonl"))
    end = record.name.partition(".rank")[0][-12:]
    assert cli.main(["ls", end]) == 0
    assert "tiny/plain" in capsys.readouterr().out
    assert output.base("timm/resnet18", "runs") == "timm/resnet18"
    assert output.base("run:tiny/plain", "runs") == "run:tiny/plain"


def test_what_a_user_prints_reads_well(tmp_path: Path) -> None:
    import torch

    import greenvis as gv

    live_model = gv.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)), [])
    assert str(live_model).startswith("Sequential with no technique\n  trains 6 of 6")
    with gv.track("t", dir=tmp_path, quiet=True) as run:
        assert re.fullmatch(r"(\S+ \S?J \(.* – .*, \w+\)|unknown \(.*\))", str(run.energy()))
