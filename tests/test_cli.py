"""The command line: output, exit statuses, one-line errors, and interruptions."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import fishermask as fishermask_api
from fishermask import __version__, cli, query_strategies
from fishermask.config import ExperimentConfig
from fishermask.sweeps import sweep_file

ROOT = Path(__file__).parent.parent
TINY = {
    "name": "tiny",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": "mlp",
        "budget": {"initial": 10, "query": 10, "total": 30},
        "training": {"max_epochs": 3},
    },
    "grid": {"strategy": ["random", "margin"], "seed": [0]},
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def fishermask(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "fishermask.cli", *arguments], capture_output=True, text=True, timeout=120, **settings
    )


def test_run_prints_progress_summary_and_paths(sweep, capsys):
    assert cli.main(["run", "tiny.yaml", "strategy=margin"]) == 0
    out = capsys.readouterr().out
    assert "[1/1 runs, 3/3 rounds, ETA 0:00] margin-seed=0: labels 30" in out
    assert "strategy = margin" in out
    folder = next((sweep / "results").iterdir())
    assert f"tensorboard --logdir results/{folder.name}" in out
    assert {"results.parquet", "results.csv", "curves.png", "summary.md", "config.yaml", "pools", "runs"} == {
        path.name for path in folder.iterdir() if path.name != ".lock"
    }
    before = (folder / "runs/margin-seed=0/rounds.jsonl").stat().st_mtime_ns
    assert cli.main(["run", "tiny.yaml", "strategy=margin"]) == 0
    assert (folder / "runs/margin-seed=0/rounds.jsonl").stat().st_mtime_ns == before


def test_sweep_works_without_ray_settings_in_the_environment(sweep):
    home = sweep / "home"
    home.mkdir()
    shell = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    result = fishermask("sweep", "tiny.yaml", env=shell | {"HOME": str(home)})
    assert result.returncode == 0, result.stderr
    assert "tiny: 2 runs, 0 finished, 6 rounds to go" in result.stdout
    assert "[2/2 runs, 6/6 rounds, ETA 0:00]" in result.stdout
    assert "curves:      results/tiny/curves.png" in result.stdout
    assert result.stderr == ""
    assert not (home / ".ray").exists()  # by default, Ray writes a token to it
    second_result = fishermask("sweep", "tiny.yaml")
    assert "2 runs, 2 finished, 0 rounds to go" in second_result.stdout
    assert second_result.returncode == 0


def test_a_dry_run_lists_the_runs_and_writes_nothing(sweep, capsys):
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "seed=[0,1]"]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 0 finished, 12 rounds to go" in out
    assert "missing   margin-seed=1" in out
    assert [path.name for path in sweep.iterdir()] == ["tiny.yaml"]


def test_a_dry_run_downloads_nothing(sweep, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the dry run opens a connection")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    data = ["data={name: MNIST, root: folder, download: true}", "imbalance=none"]
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", *data]) == 0
    out = capsys.readouterr().out
    assert "data.download: MNIST is not in folder; a sweep downloads it, and then checks the runs\n" in out
    assert "tiny: 2 runs, 0 finished, 6 rounds to go" in out
    assert [path.name for path in sweep.iterdir()] == ["tiny.yaml"]


FACTORY = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))
"""


def test_a_model_file_is_found_beside_the_sweep_file_and_on_the_command_line_in_the_working_folder(sweep, capsys):
    (sweep / "inner").mkdir()
    (sweep / "inner/mymodels.py").write_text(FACTORY)
    settings = {
        "name": "tiny",
        "base": TINY["base"] | {"model": "./mymodels.py:make"},
        "grid": {"strategy": ["margin"]},
    }
    (sweep / "inner/sweep.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["sweep", "inner/sweep.yaml", "--dry-run"]) == 0
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "model=./inner/mymodels.py:make"]) == 0
    capsys.readouterr()
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "model=./mymodels.py:make"]) == 2
    error = f"model.name: {sweep}/mymodels.py cannot be read (No such file or directory)"
    assert capsys.readouterr().err == f"fishermask: {error}\n"


def test_run_prints_the_values_as_in_a_sweep_file(sweep, capsys):
    (sweep / "good.py").write_text("def query(pool, budget):\n    return pool.candidates[:budget]\n")
    values = ["strategy={name: ./good.py}", "grid.imbalance=[{kind: balanced, per_class: 20}]", "budget.total=10"]
    assert cli.main(["run", "tiny.yaml", *values]) == 0
    out = capsys.readouterr().out
    assert "\nstrategy = good\n" in out
    assert "\nimbalance = {kind: balanced, per_class: 20}\n" in out
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "strategy=random", "budget.total=10"]) == 0
    assert "tiny: 1 run, 0 finished, 1 round to go" in capsys.readouterr().out


def test_text_between_colons_is_printed_as_it_is(sweep, capsys):
    """Rich replaces the name of an emoji between colons by the emoji."""
    (sweep / "s.py").write_text("def three(pool, budget):\n    return pool.candidates[:budget]\n")
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "strategy=./s.py:three"]) == 0
    assert "\ns:three: about " in capsys.readouterr().out
    base = TINY["base"] | {"strategy": "./s.py:three", "budget": {"initial": 10, "query": 10, "total": 20}}
    fishermask_api.run({"name": "tiny", "base": base})
    assert "\ns:three: about " in capsys.readouterr().out


def test_an_estimate_of_memory_and_time_is_shown_before_anything_starts(sweep, capsys):
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "strategy=[bait,margin,random]"]) == 0
    bait, margin, uniform = (x for x in capsys.readouterr().out.splitlines() if re.match("(bait|margin|random): ", x))
    beyond = "beyond Python's 0.5 GB"
    for line in (bait, margin):
        assert re.search(
            rf": about [\d.e-]+ s per query, peak memory \d+ MB \(.*, libraries \d+\) {beyond}, 1 shard$", line
        )
    assert uniform.startswith("random: no computation per query, peak memory ")


def test_a_query_that_cannot_fit_is_refused_before_anything_is_trained(sweep, capsys):
    for memory, problem, alternative in [
        ("0.01", "a process takes 500 MB before it computes, and only 10 MB are available", "use nodes .*"),
        ("0.51", r"a process needs \d+ MB \(.*\) to .*, and only 10 MB are available besides Python .*", "choose .*"),
    ]:
        assert cli.main(["sweep", "tiny.yaml", "strategy=bait", f"resources.memory={memory}"]) == 2
        remedy = rf"raise resources.memory from {memory} to ([\d.]+), or {alternative}"
        match = re.fullmatch(rf"fishermask: resources.memory: {problem}; {remedy}\n", capsys.readouterr().err)
        value = float(match[1])
        command = ["sweep", "tiny.yaml", "strategy=bait", "--dry-run"]
        assert cli.main([*command, f"resources.memory={value}"]) == 0
        assert cli.main([*command, f"resources.memory={value - 0.01:.2f}"]) == 2
        capsys.readouterr()
    assert [path.name for path in sweep.iterdir()] == ["tiny.yaml"]


def test_report_writes_the_files_again(sweep, capsys):
    cli.main(["run", "tiny.yaml"])
    folder = next((sweep / "results").iterdir())
    (folder / "curves.png").unlink()
    assert cli.main(["report", str(folder), "--metric", "accuracy"]) == 0
    assert (folder / "curves.png").exists()
    assert "summary.md" in capsys.readouterr().out


def test_strategies_are_listed_with_their_parameters(capsys):
    assert cli.main(["strategies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0] for line in lines if line[0] != " "]
    assert names == [*query_strategies.available(), "your own strategy"]
    assert {"random", "margin", "entropy", "least_confidence", "bait", "fisher_mask", "coreset", "badge"} <= set(names)
    damping = next(line for line in lines if line.startswith("    damping "))
    assert re.fullmatch(r"    damping \(float, default 1.0\): \w.*", damping)
    assert any(line.startswith("    mask (global | layerwise | ") for line in lines)


def test_models_and_datasets_are_listed(capsys):
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "\n    depth (int, default 2): Number of hidden layers.\n" in out
    assert "./FILE.py:factory" in out
    assert cli.main(["datasets"]) == 0
    out = capsys.readouterr().out
    for name in ("fashion_mnist_small", "CIFAR10", "parquet"):
        assert name in out


def test_all_settings_are_listed_with_their_defaults(capsys):
    def dotted(settings, prefix=""):
        for key, value in settings.items():
            yield from dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]

    assert cli.main(["settings"]) == 0
    out = capsys.readouterr().out
    listed_names = {line.split(" ")[0] for line in out.splitlines()}
    defaults = ExperimentConfig().model_dump(exclude={"imbalance"})
    assert set(dotted(defaults)) <= listed_names
    assert "\nbudget.initial (int, default 100): " in out
    assert "\n    imbalance.ratio (float, required): " in out
    assert "\n    imbalance.rare (int | null, default null): Number of rare classes; null for half" in out
    assert not re.search(r"\bNone\b", out)
    for name in ("model.name", "model.params", "strategy.name", "strategy.params", "seed"):
        assert re.search(rf"^{name} \(.*\): \w", out, re.MULTILINE), name


def test_init_writes_a_sweep_file_that_runs_and_never_overwrites_one(tmp_path, monkeypatch, capsys):
    """Run in an empty folder, as with an installed package."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    assert "fishermask sweep sweep.yaml" in capsys.readouterr().out
    assert cli.main(["sweep", "sweep.yaml", "--dry-run"]) == 0
    assert "sweep: 6 runs, 0 finished, 24 rounds to go" in capsys.readouterr().out
    content = Path("sweep.yaml").read_text()
    assert cli.main(["init"]) == 2
    error = "sweep.yaml: already exists; choose another name: fishermask init NAME"
    assert capsys.readouterr().err == f"fishermask: {error}\n"
    assert Path("sweep.yaml").read_text() == content
    assert cli.main(["init", "second.yaml"]) == 0
    assert Path("second.yaml").read_text() == content.replace("name: sweep ", "name: second ")
    assert cli.main(["init", "../third"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["second.yaml", "sweep.yaml"]


def test_training_reaches_its_target_with_the_settings_of_the_template(tmp_path):
    sweep = sweep_file.load(cli.TEMPLATE, ["strategy=random", "budget.total=20", f"output={tmp_path}"])
    assert set(fishermask_api.run(sweep, progress=False).rounds["ended_by"]) == {"target"}


def test_run_needs_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "strategy=margin", "budget.total=40", "training.max_epochs=1"]) == 0
    assert "[1/1 runs, 2/2 rounds" in capsys.readouterr().out
    assert len(list(tmp_path.glob("results/sweep-*/summary.md"))) == 1


def test_help_starts_with_commands_that_work_without_a_clone(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.index("fishermask init") < out.index("Options:")
    assert "demo" not in out


def test_help_and_version_are_printed(capsys):
    for arguments in (["--help"], ["run", "--help"], ["sweep", "-h"]):
        assert cli.main(arguments) == 0
    assert "seed=[0,1,2]" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fishermask {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
        (["run", "tiny.yaml", "budget.query"], "'budget.query': expected key=value"),
        (["run", "tiny.yaml", "budget.query=[1"], "budget.query: '[1' is not YAML"),
        (["run", "tiny.yaml", "budget.querry=1"], "budget.querry: unknown key; there are initial, query, total"),
        (["sweep", "tiny.yaml", "budget.total=999"], "budget.total: 999 exceeds the pool of 300 images; lower it"),
        (["run", "tiny.yaml", "strategy=best"], "strategy.name: unknown strategy 'best'; there are badge, bait,"),
        (
            ["run", "tiny.yaml", "strategy={name: fisher_mask, params: {fraction: 0.01}}"],
            "strategy.params.fraction: 0.01 of",
        ),
        (["run", "tiny.yaml", "model=vgg"], "model.name: unknown model 'vgg'; expected one of thin_resnet18"),
        (["run", "tiny.yaml", "data=coco"], "data: "),
        (["run", "tiny.yaml", "data.name=coco"], "data.name: unknown data set 'coco'; available: fashion_mnist_small"),
        (["run", "tiny.yaml", "imbalance={kind: counts, counts: {0: 3, 1: 4000}}"], "class 1: 4000 images requested"),
        (["sweep", "tiny.yaml", "resources.cpus=1000", "--dry-run"], "resources: a run needs 1000 CPUs"),
        (["run", "tiny.yaml", "resources.cpus=0.00001"], "resources.cpus: "),
        (["run", "tiny.yaml", "resources.gpus=1"], "resources.gpus: this machine has no GPU"),
        (["sweep", "tiny.yaml", "resources.shards=999"], "resources.shards: 999 exceeds the pool of 300 images"),
        (["run", "tiny.yaml", "output=/proc/fishermask"], "output: cannot write to /proc/fishermask"),
        (["sweep", "broken.yaml"], "broken.yaml: is not YAML"),
        (["sweep", "twice.yaml"], "twice.yaml: is not YAML (the key base appears twice"),
        (["sweep", "tiny.yaml", "strategy.params.x=1"], "strategy.params.x: the grid varies strategy"),
        (["sweep", "tiny.yaml", "grid.seed.x=[1]"], "grid.seed.x: seed is varied too"),
        (["sweep", "tiny.yaml", "training.learning_rate=.inf"], "training.learning_rate: should be a finite number"),
        (["run", "tiny.yaml", "strategy={name: margin, label: ..}"], "strategy.label: expected letters, digits"),
        (["run", "tiny.yaml", "output=tiny.yaml"], "output: cannot write to"),
        (["run", "tiny.yaml", "seed=true"], "seed: should be a valid integer, got True"),
        (["sweep", "list.yaml"], "list.yaml: expected the keys name, base and grid"),
        (["run", "tiny.yaml", "name=a/b"], "fishermask: name: expected letters, digits"),
        (["sweep", "tiny.yaml", "grid.seed=3"], "fishermask: grid.seed: should be a valid list, got 3"),
        (["sweep", "tiny.yaml", "grid.=[1]"], "fishermask: 'grid.': expected key=value"),
        (["sweep", "tiny.yaml", ".seed=1"], "fishermask: '.seed': expected key=value"),
        (["sweep", "tiny.yaml", "imbalance=natural"], "step, long_tail, counts, got 'natural'\n"),
        (
            ["sweep", "tiny.yaml", "imbalance.rare=1"],
            "imbalance.rare: unknown key; there are kind, per_class; imbalance='{kind: balanced}' replaces all keys",
        ),
        (
            ["sweep", "tiny.yaml", "strategy=[{name: bait, label: a b}, {name: margin, label: a_b}]"],
            "grid: a_b-seed=0 is the name of two runs; give labels that differ in letters or digits",
        ),
        (["sweep", "tiny.yaml", "grid.output=[1]", "strategy=[random]"], "output: unknown key"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["report", "."], "holds no results of a sweep"),
    ],
)  # fmt: skip
def test_bad_input_is_a_one_line_error_with_status_2_and_leaves_no_files(sweep, capsys, arguments, message):
    if "resources.gpus=1" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            arguments[-1], message = "resources.gpus=-1", "resources.gpus: "
    Path("broken.yaml").write_text("a: [")
    Path("list.yaml").write_text("[1, 2]")
    Path("twice.yaml").write_text("name: x\nbase: {}\nbase: {}\n")
    before = sorted(sweep.rglob("*"))
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("fishermask: ")
    assert err.count("\n") == 1
    assert sorted(sweep.rglob("*")) == before


def test_each_mistake_is_reported_on_its_own_line(sweep, capsys):
    assert cli.main(["run", "tiny.yaml", "seed=-1", "budget.query=0"]) == 2
    assert [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()] == ["budget.query", "seed"]


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "nothing answers at 127.0.0.1:1"), ("ray://127.0.0.1:1", "ray://127.0.0.1:1 is for Ray Client")],
)
def test_a_ray_address_that_cannot_be_joined_is_one_line(sweep, address, message):
    result = fishermask("sweep", "tiny.yaml", env=os.environ | {"RAY_ADDRESS": address})
    assert result.returncode == 2
    assert result.stderr.startswith(f"fishermask: RAY_ADDRESS: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("def query(:", "SyntaxError"), ("x = 1", "needs a function query"), ("import nowhere", "ModuleNotFoundError")],
)
def test_a_broken_strategy_file_is_one_line(sweep, capsys, monkeypatch, content, message):
    name = f"broken_{message.split()[0]}"  # a module is imported once
    (sweep / f"{name}.py").write_text(content)
    monkeypatch.setattr(query_strategies, "__path__", [*query_strategies.__path__, str(sweep)])
    assert cli.main(["run", "tiny.yaml", f"strategy={name}"]) == 2
    err = capsys.readouterr().err
    assert f"strategies/{name}.py: " in err
    assert message in err


def test_a_folder_with_other_files_is_refused_and_kept(sweep, capsys):
    folder = sweep / "results/tiny"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert cli.main(["sweep", "tiny.yaml"]) == 2
    assert "holds no sweep's results; choose another name=NAME" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_ctrl_c_keeps_finished_rounds_and_prints_their_folder(sweep, command):
    """Send SIGINT to the process group, as a terminal does, after the first round."""
    slow = ["budget={initial: 10, query: 1, total: 300}", "output=out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fishermask.cli", command, "tiny.yaml", *slow],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(sweep.glob("out/*/runs/*/rounds.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; 0 of" in err
    assert "Traceback" not in err
    lines = next(sweep.glob("out/*/runs/*/rounds.jsonl")).read_text().splitlines()
    assert lines
