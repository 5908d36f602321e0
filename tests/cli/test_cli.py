"""The command line as a user and a program meet it: text, JSON, exit codes, errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from forked import greenvis

from greenvis.cli import benchmarks
from greenvis.cli import main as cli
from greenvis.cli.app import GROUPS
from greenvis.experiment.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
OPTIONS = json.loads((ROOT / "tests/fixtures/cli_options.json").read_text())
TINY = """\
name: tiny
data: {name: digits, train: 60, test: 40}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 1}
train: {epochs: 1, batch_size: 20, threads: 1}
arms: {plain: {}, longer: {train: {epochs: 2}}}
meter: {codecarbon: false, country: FRA}
"""


def _json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert cli.main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ran")
    (folder / "tiny.yaml").write_text(TINY)
    done = greenvis("run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "index.html" in done.stdout
    assert "plain" in done.stdout
    return folder


def test_run_writes_records_and_a_report(ran: Path) -> None:
    results = json.loads((ran / "reports/tiny/results.json").read_text())
    assert (results["name"], results["baseline"], sorted(results["arms"])) == (
        "tiny",
        "plain",
        ["longer", "plain"],
    )
    arm = results["arms"]["longer"]
    for key in ("train_energy_j", "carbon_g"):
        assert arm[key]["low"] < arm[key]["value"] < arm[key]["high"]
    for key in (
        "macs",
        "train_flops",
        "params",
        "trainable_params",
        "delta_bytes",
        "latency_ms",
        "images_per_s",
        "peak_memory_mb",
        "wall_s",
    ):
        assert arm[key], key
    assert arm["accuracy"]["n"] == 1
    assert arm["vs_baseline"]
    assert results["command"]
    assert "embed_dim: 8" in json.dumps(results["recipe"])
    assert {p.name for p in (ran / "reports/tiny").iterdir()} >= {
        "index.html",
        "report.md",
        "results.json",
        "figures",
    }


def test_a_report_of_copied_records_is_the_same(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ran / "runs", tmp_path / "elsewhere")
    _json(
        capsys,
        "report",
        str(tmp_path / "elsewhere"),
        "--out",
        str(tmp_path / "out"),
        "--baseline",
        "plain",
    )
    assert (tmp_path / "out/results.json").read_bytes() == (
        ran / "reports/tiny/results.json"
    ).read_bytes()


def test_another_grid_changes_grams_and_nothing_else(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = _json(capsys, "report", str(ran / "runs"), "--out", str(tmp_path / "a"))["results"]
    there = _json(
        capsys, "report", str(ran / "runs"), "--out", str(tmp_path / "b"), "--grid", "SWE"
    )["results"]
    for arm in here["arms"]:
        assert here["arms"][arm]["train_energy_j"] == there["arms"][arm]["train_energy_j"]
        assert (
            here["arms"][arm]["carbon_g"]["value"] > 1.2 * there["arms"][arm]["carbon_g"]["value"]
        )


def test_runs_can_be_listed_compared_and_gated(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _json(capsys, "ls", str(ran / "runs"))
    assert sorted(r["arm"] for r in rows) == ["longer", "plain"]
    plain, longer = (
        str(next((ran / f"runs/tiny/{arm}").rglob("*.jsonl"))) for arm in ("plain", "longer")
    )
    assert _json(capsys, "compare", plain, longer)
    assert _json(capsys, "diff", plain, plain)["ok"] is True
    assert _json(capsys, "diff", plain, longer, "--max-energy", "+100000%")["ok"] is True
    assert _json(capsys, "diff", plain, longer, "--max-energy=-99.9%", code=1)["ok"] is False


def test_track_meters_a_command_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    script = tmp_path / "burn.py"
    script.write_text(
        "import sys, time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: "
        "pass\nsys.exit(3)\n"
    )
    command = [
        sys.executable,
        "-m",
        "greenvis",
        "track",
        "--json",
        "--dir",
        str(tmp_path / "runs"),
        "--",
        sys.executable,
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    said = json.loads(done.stdout)
    assert said["exit"] == 3
    assert said["energy_j"] > 0.5 * 2.9 * 0.9
    assert list((tmp_path / "runs").rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "unknown command 'rum'; did you mean 'run'?"),
        (["run", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["explain", "lorra"], "did you mean 'lora'?"),
        (["flops", "timm/resnet500"], "did you mean"),
        (["flops", "timm/resnet18", "--option", "x"], "KEY=VALUE"),
        (["report", "nowhere"], "nowhere"),
        (["track", "--"], "takes a command"),
        (["bench", "metre"], "did you mean 'meter'?"),
        (["bench", "--all"], "name the benchmark to run"),
        (["ls", "--srt", "arm"], "ls has no option --srt; did you mean '--sort'?"),
        (["ls", "--sort"], "'--sort' requires an argument"),
        (["ls", "--sort", "--where", "x"], "--sort lacks its value (see greenvis ls --help)"),
        (["ls", "tests", "--sort", "typo", "--where", "nothing"], "cannot sort by 'typo'"),
        (
            ["ls", "tests", "--group", "amr", "--where", "nothing"],
            "cannot group by 'amr'; did you mean 'arm'?",
        ),
        (["explain"], "Missing argument 'technique' (see greenvis explain --help)"),
        (["flops", "timm/resnet18", "extra"], "(extra) (see greenvis flops --help)"),
        (["flops", "timm/resnet18", "--img-size", "0"], "Invalid value for '--img-size'"),
        (["flops", "timm/resnet18", "--option", "img_size=wide"], "img_size is 'wide'"),
        (
            ["flops", "plain/mlp", "--img-size", "28", "--in-chnas", "1"],
            "did you mean '--in-chans'?",
        ),
        (
            ["rank", "run:a/b", "run:a/c", "--data", "digits", "--option", "pretrained=true"],
            "would change none of these bases",
        ),
    ],
)
def test_bad_input_exits_2_with_one_helpful_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1


def test_with_json_an_error_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" in _json(capsys, "explain", "lorra", code=2)["error"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "model",
    [
        "timm/test_resnet",
        "torchvision/squeezenet1_1",
        "hf/mobilenet_v1",
        "timm/test_vit",
        "plain/mlp",
    ],
)
def test_the_size_asked_for_is_the_size_counted(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    macs = {}
    for size in (64, 128):
        (rows, counted) = (
            _json(capsys, verb, model, "--img-size", str(size)) for verb in ("inspect", "flops")
        )
        shape = next(row["found"] for row in rows if row["part"] == "input")
        assert shape.endswith(f"×{size}×{size}")
        assert (
            _json(capsys, "flops", model, "--option", f"img_size={size}")["macs"] == counted["macs"]
        )
        macs[size] = counted["macs"]
    assert 3.5 < macs[128] / macs[64] < 5  # four times the pixels


def test_a_value_may_begin_with_a_dash(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = str(ran / "runs")
    down = _json(capsys, "ls", runs, "--sort", "-energy")
    assert [r["run"] for r in down] == [
        r["run"] for r in _json(capsys, "ls", runs, "--sort=-energy_j")
    ]
    assert [r["run"] for r in down] == [
        r["run"] for r in _json(capsys, "ls", runs, "--sort", "energy")
    ][::-1]
    plain, longer = f"{runs}/tiny/plain", f"{runs}/tiny/longer"
    assert _json(capsys, "diff", plain, longer, "--max-energy", "-99.9%", code=1)["ok"] is False
    groups = _json(capsys, "ls", runs, "--group", "arm", "--sort", "-accuracy")
    assert [g["score"] for g in groups] == sorted((g["score"] for g in groups), reverse=True)
    script = "import sys; sys.exit(sys.argv[1:] != ['--sort', '-energy'])"
    track = [
        "track",
        "--dir",
        str(ran / "tracked"),
        "--",
        sys.executable,
        "-c",
        script,
        "--sort",
        "-energy",
    ]
    assert cli.main(track) == 0  # a command's own words stay as they are


def test_a_run_is_named_as_ls_shows_it(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran)
    ids = {row["arm"]: row["run"] for row in _json(capsys, "ls")}
    assert cli.main(["ls"]) == 0
    shown = capsys.readouterr().out
    assert all(run[-12:] in shown for run in ids.values())
    plain, end = ids["plain"], ids["longer"][-12:]
    rows = _json(capsys, "compare", plain, end)
    assert {row["arm"] for row in rows} == {"plain → longer"}
    assert rows == _json(capsys, "compare", "tiny/plain", "run:tiny/longer")
    assert rows == _json(capsys, "compare", plain, end, "--runs", str(ran / "runs"))
    assert _json(capsys, "diff", plain, end, "--max-energy", "+100000%")["ok"] is True
    out = tmp_path / "report"
    assert set(_json(capsys, "report", plain, end, "--out", str(out))["results"]["arms"]) == {
        "plain",
        "longer",
    }
    assert _json(capsys, "card", plain)["run"] == plain
    exported = _json(capsys, "export", end, "--to", "safetensors", "--out", str(tmp_path / "model"))
    assert exported["max_difference"] == 0
    few = tmp_path / "few.yaml"
    few.write_text("arms: {linear: {techniques: [linear_probe]}}\ntrain: {epochs: 1}\n")
    options = [
        "--protocol",
        str(few),
        "--set",
        "meter.codecarbon=false",
        "--out",
        str(tmp_path / "probe"),
    ]
    assert list(_json(capsys, "probe", end, *options)["results"]["arms"]) == ["linear"]
    assert (
        "no record or folder" in _json(capsys, "compare", "nothing-of-this", plain, code=2)["error"]
    )
    assert "is one end of" in _json(capsys, "compare", plain[:8], plain, code=2)["error"]


def test_an_id_is_known_by_what_a_renamed_record_says(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old,) = (ran / "runs/tiny/plain").rglob("*.jsonl")
    (tmp_path / "renamed.jsonl").write_bytes(old.read_bytes())
    run = _json(capsys, "ls", str(tmp_path))[0]["run"]
    assert _json(capsys, "compare", run, run, "--runs", str(tmp_path))
    assert "left no model" in _json(capsys, "card", run, "--runs", str(tmp_path), code=2)["error"]


def test_other_settings_overwrite_neither_run_nor_report(ran: Path, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = greenvis(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for place in ("runs", "reports"):
        shutil.copytree(ran / place, tmp_path / place)
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace("arms: {plain: {}, longer: {train: {epochs: 2}}}", "arms: {plain: {}}")
    )
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    said("plan", "tiny.yaml", "--set", "train.lr=0.01,0.02")
    page = said("run", "tiny.yaml", "--set", "train.epochs=3")
    assert "reports/tiny.epochs-3/index.html" in page
    page = said("run", "tiny.yaml", "--set", "train.lr=0.01,0.02")
    assert "reports/tiny.lr-0.01-0.02/index.html" in page
    assert {p: p.read_bytes() for p in before} == before
    assert "epochs: 3" in json.dumps(
        json.loads((tmp_path / "reports/tiny.epochs-3/results.json").read_text())["recipe"]
    )


def test_techniques_explain_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    names = [row["name"] for row in _json(capsys, "techniques")]
    assert {"lora", "distill"} <= set(names)
    told = _json(capsys, "explain", "distill")
    assert "temperature" in told["schema"]["properties"]
    assert cli.main(["explain", "distill"]) == 0
    assert "Hinton" in capsys.readouterr().out
    assert "train" in _json(capsys, "schema")["properties"]


def test_flops_and_inspect_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    out = _json(capsys, "flops", "torchvision/resnet18", "--img-size", "64")
    assert out["flops"] == 2 * out["macs"]
    assert {"macs", "flops", "train_flops", "unhandled", "counters"} <= set(out)
    lora = _json(
        capsys, "flops", "timm/deit_tiny_patch16_224", "--techniques", '[{"lora": {"rank": 4}}]'
    )
    plain = _json(capsys, "flops", "timm/deit_tiny_patch16_224")
    assert lora["macs"] > plain["macs"]
    assert lora["train_flops"] < plain["train_flops"]
    assert _json(capsys, "inspect", "timm/deit_tiny_patch16_224")
    assert cli.main(["inspect", "timm/resnet18"]) == 0


def test_doctor_says_where_each_figure_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _json(capsys, "doctor")
    assert any("cpu" in str(row["what"]).lower() for row in rows)
    assert all(row["source"] and row["why"] for row in rows)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert "exit codes: 0 done, 1 failed, 2 bad input" in said
    for verb in (
        "init",
        "data",
        "run",
        "report",
        "techniques",
        "explain",
        "schema",
        "flops",
        "doctor",
        "track",
        "ls",
        "compare",
        "diff",
        "bench",
    ):
        assert f"\n  {verb} " in said
    for group in GROUPS:
        assert f"\n{group}:\n" in said


def test_the_help_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys; from greenvis.cli.main import main; main(['--help'])\n"
        "print({'rich', 'pydantic', 'torch', 'greenvis.report'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "set()\n")


def _taken(command: Any) -> dict[str, Any]:
    """What a command takes, as the file of `tests/fixtures` writes it."""
    ctx = typer.Context(command)
    params = [p for p in command.get_params(ctx) if p.name != "help"]
    options = [p for p in params if p.param_type_name == "option"]
    return {
        "options": {name for p in options for name in p.opts} | {"-h", "--help"},
        "arguments": [(p.nargs == -1, p.required) for p in params if p not in options],
        "defaults": {p.opts[0]: p.default for p in options if p.default},
    }


@pytest.mark.parametrize("verb", OPTIONS)
def test_every_verb_takes_what_it_took(verb: str) -> None:
    """The file lists what the command line took before it was built on typer."""
    before = OPTIONS[verb]
    if verb == "bench":  # its options are now those of each benchmark
        coverage = _taken(benchmarks._command("coverage"))
        assert set(before["options"]) <= coverage["options"]
        return
    now = _taken(typer.main.get_command(cli.app).commands[verb])
    assert now["options"] == set(before["options"])
    many = {"+": (True, True), "*": (True, False), "...": (True, False), "?": (False, False)}
    assert now["arguments"] == [many.get(n, (False, True)) for _, n in before["arguments"]]
    assert now["defaults"] == {k: v for k, v in before["defaults"].items() if v}


def test_no_verb_is_lost() -> None:
    added = {"data", "estimate", "init", "label-next", "labels", "tune"}
    assert set(typer.main.get_command(cli.app).commands) == {*OPTIONS, *added}


def test_a_benchmark_is_named_before_or_after_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "meter" in _json(capsys, "bench")
    for words in (["listing", "--rounds", "3"], ["--rounds", "3", "listing"]):
        assert cli.main(["bench", *words]) == 2
        assert "listing has no option --rounds" in capsys.readouterr().err
    assert cli.main(["bench", "rank", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--recipe" in shown
    assert "--out" in shown


def test_a_shell_completes_verbs_options_techniques_and_benchmarks() -> None:
    for line, answers in {
        "greenvis expl": {"explain"},
        "greenvis ls --wh": {"--where"},
        "greenvis explain lora_": {"lora_stream"},
        "greenvis bench met": {"meter"},
    }.items():
        asked = {
            "_GREENVIS_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(line.count(" ")),
        }
        command = [sys.executable, "-m", "greenvis"]
        done = subprocess.run(
            command, env=os.environ | asked, capture_output=True, text=True, check=False
        )
        assert set(done.stdout.split()) == answers, done.stderr


@pytest.mark.parametrize("option", ["--out", "--baseline", "--title"])
def test_no_option_takes_another_for_its_value(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{option} lacks its value" in _json(capsys, "report", "runs", option, code=2)["error"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_every_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.arms
    head = path.read_text().split("name:")[0]
    assert f"greenvis run {path.relative_to(ROOT)}" in head


@pytest.mark.slow
def test_flops_of_a_model_whose_work_depends_on_the_image(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exits = '[{"early_exit": {"at": [0.5], "threshold": 0.11}}]'
    model = ["timm/test_vit", "--option", "num_classes=10", "--option", "img_size=32"]
    out = _json(capsys, "flops", *model, "--techniques", exits, "--data", "digits")
    assert out["distribution"]["images"] == 64
    assert out["distribution"]["min"] <= out["distribution"]["mean"] <= out["distribution"]["max"]
    assert any(
        "--data" in note for note in _json(capsys, "flops", *model, "--techniques", exits)["notes"]
    )
    assert "distribution" not in _json(capsys, "flops", *model)
