"""Sweep files: the runs that they describe, and the messages about invalid files."""

from dataclasses import replace
from pathlib import Path

import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from running import QUIET, run_in_process

from fishermask import cli, environment, query_strategies
from fishermask.config import ExperimentConfig, StrategyConfig, parse
from fishermask.errors import InputError
from fishermask.experiment import identity
from fishermask.experiment.identity import identify
from fishermask.experiment.inputs import load_pool, prepare_inputs
from fishermask.experiment.run_plan import plan_run
from fishermask.planning.estimates import Estimate
from fishermask.planning.placement import this_machine
from fishermask.results.files import locked
from fishermask.sweeps import runner, sweep_file
from fishermask.sweeps.folder_check import check_folder

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))


def make_sweep(tmp_path, overrides=(), **content) -> sweep_file.Sweep:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"name": "s", "output": str(tmp_path / "out")} | content))
    return sweep_file.expand(sweep_file.load(file, overrides))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_sweep_loads_and_expands(file):
    sweep = sweep_file.expand(sweep_file.load(file))
    assert sweep.config.name == file.stem
    assert len(sweep.runs) >= 36
    assert sweep.config.description


def test_the_shipped_demo_can_be_prepared():
    prepare_inputs(sweep_file.expand(sweep_file.load(ROOT / "sweeps/demo.yaml")).runs[0].config)


def test_grid_expands_to_every_combination_with_the_seed_slowest_and_the_strategy_fastest(tmp_path):
    sweep = make_sweep(tmp_path, grid={"seed": [0, 1], "strategy": ["margin", "random"], "budget.query": [5, 6]})
    assert [(r.config.seed, r.config.budget.query, r.config.strategy.name) for r in sweep.runs] == [
        (seed, query, name) for seed in (0, 1) for query in (5, 6) for name in ("margin", "random")
    ]
    assert sweep.runs[0].name == "margin-query=5-seed=0"
    assert len({run.folder.path for run in sweep.runs}) == 8


def test_overrides_set_the_base_or_replace_what_the_grid_varies(tmp_path):
    grid = {"seed": [0, 1], "strategy": ["margin", "random"]}
    settings = ["seed=[3,4,5]", "strategy=bait", "training.max_epochs=7", "strategy.params.damping=2", "name=other"]
    sweep = make_sweep(tmp_path, settings[:3] + settings[4:], grid=grid)
    assert [run.config.seed for run in sweep.runs] == [3, 4, 5]
    assert {run.config.strategy.name for run in sweep.runs} == {"bait"}
    assert {run.config.training.max_epochs for run in sweep.runs} == {7}
    assert sweep.folder == tmp_path / "out/other"
    varied = make_sweep(tmp_path, ["grid.budget.query=[1,2]"], grid={"seed": [0]})
    assert [run.config.budget.query for run in varied.runs] == [1, 2]
    inner = make_sweep(tmp_path, ["strategy.params.damping=2"], base={"strategy": "bait"})
    assert inner.runs[0].config.strategy.params == {"damping": 2}


def test_run_names_of_two_variants_of_a_strategy_have_their_parameters(tmp_path):
    variants = [{"name": "fisher_mask", "params": {"fraction": f}} for f in (0.02, 0.04)]
    names = [run.name for run in make_sweep(tmp_path, grid={"strategy": [*variants, "random"]}).runs]
    assert names == ["fisher_mask(fraction=0.02)", "fisher_mask(fraction=0.04)", "random"]


@pytest.mark.parametrize("value", [0, -1, 10_001, 1.0, True, "many", None])
def test_invalid_number_of_shards_is_refused_in_one_line(value):
    with pytest.raises(InputError) as exception_info:
        parse(ExperimentConfig, {"resources": {"shards": value}})
    expected = f"resources.shards: should be auto or a whole number from 1 to 10,000, got {value!r}"
    assert str(exception_info.value) == expected


BASE = {"strategy": "random"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bas": {}}, "bas: unknown key; there are name, description, base, grid, output"),
        ({"base": {"seeds": 1}}, "seeds: unknown key; there are data, imbalance, model"),
        ({"base": {"budget": {"querry": 1}}}, "budget.querry: unknown key; there are initial, query, total"),
        ({"base": {"budget": {"query": "many"}}}, "budget.query: .*valid integer.*, got 'many'"),
        ({"base": {"budget": {"query": 0}}}, "budget.query: .*greater than or equal to 1, got 0"),
        ({"base": {"budget": {"initial": 9, "total": 5}}}, "budget: total 5 is below initial 9; raise total"),
        ({"base": {"imbalance": {"kind": "stop"}}}, "imbalance.kind: expected one of none, balanced, .*'stop'$"),
        ({"base": {"imbalance": {"kind": "step"}}}, "imbalance.ratio: missing"),
        ({"base": {"imbalance": {"kind": "step", "ratio": 0.5}}}, "imbalance.ratio: .*got 0.5"),
        ({"base": {"imbalance": {"kind": "step", "ratio": 2, "rar": 1}}}, "imbalance.rar: unknown key; .* rare"),
        ({"base": {"training": {"target_accuracy": 2}}}, "training.target_accuracy: .*less than or equal to 1, got 2"),
        ({"base": {"model": 5}}, "model: .*got 5"),
        ({"grid": {"seed": []}}, "grid.seed: no values"),
        ({"grid": {"seed": 3}}, "/s.yaml: grid.seed: .*valid list"),
        ({"grid": {"sed": [1]}}, "sed: unknown key"),
        ({"grid": {"seed.x": [1]}}, "seed: .*valid integer, got {'x': 1}"),
        ({"grid": {"seed": [1, 1]}}, "random-seed=1 occurs twice in the grid"),
        ({"name": "a/b"}, "name: expected letters, digits"),
        ({"base": {"seed": 1}, "grid": {"seed.x": [1]}}, "seed.x: seed is 1, which has no keys"),
    ],
)  # fmt: skip
def test_invalid_sweep_file_is_refused_in_one_line_with_field_value_and_remedy(tmp_path, content, message):
    content = content | {"base": BASE | content.get("base", {})}
    with pytest.raises(InputError, match=message) as exception_info:
        make_sweep(tmp_path, **content)
    assert "\n" not in str(exception_info.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fisher"}, "strategy.name: unknown strategy 'fisher'; there are badge, bait, coreset, entropy"),
        ({"strategy": {"name": "bait", "params": {"lambda": 1}}}, "strategy.params.lambda: unknown key; .* damping"),
        ({"strategy": {"name": "margin", "params": {"x": 1}}}, "params.x: margin has no parameters; remove it"),
        ({"strategy": {"name": "fisher_mask", "params": {"fraction": 0.01}}},
         "strategy.params.fraction: 0.01 of 33,194 .* the smallest fraction that works is 0.01959"),
        ({"model": "vgg"}, "model.name: unknown model 'vgg'"),
        ({"data": {"name": "celeba"}}, "data.name: unknown data set 'celeba'"),
        ({"budget": {"total": 20000}}, "budget.total: 20000 exceeds the pool of 10000 images"),
        ({"budget": {"initial": 5, "query": 6000}, "imbalance": {"kind": "balanced", "per_class": 500}},
         "budget.query: 6000 exceeds the pool of 5000"),
        ({"imbalance": {"kind": "counts", "counts": {0: 5, 1: 5000}}}, "class 1: 5000 images requested, 1000"),
    ],
)  # fmt: skip
def test_settings_that_do_not_match_the_data_are_refused_before_training(settings, message):
    with pytest.raises(InputError, match=message):
        prepare_inputs(parse(ExperimentConfig, {"strategy": "random"} | settings))


def test_preset_sets_parameters_that_are_not_given():
    def params(**settings):
        return query_strategies.load(StrategyConfig(name="fisher_mask", params=settings)).params

    preset = params(preset="fishermask-released", fraction=0.02)
    assert (preset.class_weighting, preset.fisher_sample, preset.fraction) == ("none", "first", 0.02)
    assert params(preset="fishermask-released", class_weighting="sqrt").class_weighting == "sqrt"
    assert params().class_weighting == "sqrt"
    with pytest.raises(InputError, match="strategy.params.preset: .*'fishermask-released'.*, got 'released'"):
        params(preset="released")


def begin(sweep, finished=False):
    """Write the files of a sweep whose runs have one round, or all of their rounds."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    stored = sweep.config.model_dump(mode="json", exclude={"output"})
    (sweep.folder / "config.yaml").write_text(yaml.safe_dump(stored))
    for run in sweep.runs:
        run.folder.create(run.config, identify(run.config), "p.csv")
        for index in range(run.config.budget.num_rounds if finished else 1):
            run.folder.append({"round": index, "labels": 1, **ROUND})


ROUND = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "epochs", "train_accuracy"), 0.5)
ROUND |= {"recall": {}, "batch": [], "batch_classes": {}, "seconds": {}, "ended_by": "cap"}


def test_folder_of_the_same_sweep_with_more_seeds_or_other_shards_is_accepted(tmp_path):
    begin(make_sweep(tmp_path, base=BASE, grid={"seed": [0, 1]}))
    assert check_folder(make_sweep(tmp_path, base=BASE, grid={"seed": [0, 1, 2]})) == []
    assert check_folder(make_sweep(tmp_path, base=BASE | {"resources": {"shards": 3}}, grid={"seed": [0]})) == []


def test_folder_of_another_sweep_is_refused(tmp_path):
    begin(make_sweep(tmp_path, base=BASE, grid={"seed": [0, 1]}))
    other_sweep = make_sweep(tmp_path, base=BASE | {"training": {"max_epochs": 5}}, grid={"seed": [7]})
    expected = "training.max_epochs is 100 in the folder, 5 here; choose another name=NAME, or add --continue-anyway"
    with pytest.raises(InputError, match=expected):
        check_folder(other_sweep)
    assert check_folder(other_sweep, continue_anyway=True) == [
        "continuing under another identity: training.max_epochs is 100 in the folder, 5 here"
    ]
    with pytest.raises(InputError, match="holds another sweep's results, which vary seed; choose another"):
        check_folder(make_sweep(tmp_path, grid={"budget.query": [1]}), continue_anyway=True)


@pytest.mark.parametrize("finished", [False, True])
def test_run_of_another_source_is_not_continued_without_the_option(tmp_path, monkeypatch, finished):
    sweep = make_sweep(tmp_path, base=BASE, grid={"seed": [0, 1]})
    with monkeypatch.context() as older_version:
        older_version.setattr(identity, "loaded_version", lambda: "0.1.0 (abc)")
        begin(sweep, finished)
    difference = f"fishermask 0.1.0 (abc) in the folder, {environment.loaded_version()} here"
    if finished:
        assert check_folder(sweep) == [f"2 finished runs differ: {difference}"]
        return
    with pytest.raises(InputError) as exception_info:
        check_folder(sweep)
    assert f"random-seed=0: {difference}; choose another name=NAME, or add --continue-anyway" in str(
        exception_info.value
    )
    assert check_folder(sweep, True) == [f"continuing under another identity: random-seed=0: {difference}"]
    for run in sweep.runs:
        run.folder.create(run.config, identify(run.config), "p.csv")
    assert check_folder(sweep) == []  # the rounds have the current identity now


def test_changed_default_of_a_strategy_parameter_is_noticed(tmp_path):
    """The sweep file is the same, but the default in the strategy's file has changed."""
    sweep = make_sweep(tmp_path, base={"strategy": "bait"}, grid={"seed": [0]})
    begin(sweep, finished=True)
    folder = sweep.runs[0].folder
    recorded_identity = identify(sweep.runs[0].config)
    recorded_identity["settings"]["strategy"]["params"]["damping"] = 7.0
    folder.create(sweep.runs[0].config, recorded_identity, "p.csv")
    with pytest.raises(InputError, match="bait-seed=0: strategy.params.damping is 7.0 in the folder, 1.0 here"):
        check_folder(sweep)


@pytest.mark.parametrize(("split", "images"), [("train", "training"), ("test", "test")])
def test_unfinished_run_is_not_continued_with_other_images(tmp_path, split, images):
    data = pictures.config(pictures.write(tmp_path / "pool.parquet"))
    base = BASE | {"data": data.model_dump(), "budget": {"initial": 10, "query": 10, "total": 30}}
    sweep = make_sweep(tmp_path, base=base, grid={"seed": [0]})
    begin(sweep)
    assert check_folder(sweep) == []
    file = Path(getattr(data, split))
    table = pq.read_table(file)
    bytes_of_images = [image["bytes"] for image in table["image"].to_pylist()]
    # Replace all pixels; ids and labels are kept.
    changed = [
        {"bytes": content, "path": image["path"]}
        for image, content in zip(table["image"].to_pylist(), reversed(bytes_of_images), strict=True)
    ]
    pq.write_table(table.set_column(0, "image", pa.array(changed, pictures.KIND)), file)
    load_pool.cache_clear()  # as in another process
    difference = f"the {images} images or their labels differ from those of the earlier rounds"
    with pytest.raises(InputError, match=f"random-seed=0: {difference}; choose another name=NAME, or add"):
        check_folder(sweep)
    assert check_folder(sweep, True) == [f"continuing under another identity: random-seed=0: {difference}"]


def test_trial_refuses_data_that_differ_from_those_of_the_driver():
    plan = plan_run(parse(ExperimentConfig, {"strategy": "random", "model": "mlp"}), this_machine())
    with pytest.raises(InputError, match="^data.test: the decoded images or their labels on .* differ from those on"):
        replace(plan, hashes=plan.hashes | {"test": "another"}).load_inputs()


def test_rounds_without_a_recorded_identity_are_not_continued(tmp_path):
    sweep = make_sweep(tmp_path, base=BASE, grid={"seed": [0]})
    begin(sweep)
    (sweep.runs[0].folder.path / "provenance.json").unlink()
    with pytest.raises(InputError, match="random-seed=0: fishermask of an unknown version in the folder, "):
        check_folder(sweep)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [(["output=s3://bucket/results"], "output"), (["data.train=https://host/a.parquet"], "data.train")],
)
def test_url_instead_of_a_path_is_refused(tmp_path, overrides, setting):
    with pytest.raises(InputError, match=f"{setting}: is a URL, .*://...; only local paths are supported"):
        make_sweep(tmp_path, overrides, base=BASE)


def test_each_pool_is_drawn_once_for_all_runs_from_check_to_last_round(tmp_path):
    base = {"imbalance": {"kind": "balanced", "per_class": 20}, "budget": {"initial": 5, "query": 5, "total": 10}}
    base |= {"model": {"name": "mlp", "params": {"width": 4}}, "training": {"max_epochs": 1}}
    grid = {"strategy": ["random", "margin"], "training.learning_rate": [0.1, 0.01], "seed": [11, 12]}
    sweep = make_sweep(tmp_path, base=base, grid=grid)
    before = load_pool.cache_info().misses
    assert run_in_process(sweep).failed == {}
    assert load_pool.cache_info().misses - before == 2
    assert len(list((sweep.folder / "pools").iterdir())) == 2


STEP = {
    "imbalance": {"kind": "step", "ratio": 4, "rare": 5},
    "budget": {"initial": 10, "query": 10, "total": 20},
    "model": {"name": "mlp", "params": {"width": 4}},
    "training": {"max_epochs": 1},
    "strategy": "random",
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_refused_continuation_with_another_pool_leaves_the_folder_as_it_was(tmp_path, capsys, num_rounds):
    sweep = make_sweep(tmp_path, base=STEP, grid={"seed": [0, 1]})
    run_in_process(sweep)
    last = sweep.runs[1].folder
    last.rounds.write_text("".join(last.rounds.read_text().splitlines(keepends=True)[:num_rounds]))
    last.journal.append("1", [["a", 1]])
    before = contents(sweep.folder)
    command = ["sweep", str(tmp_path / "s.yaml")]
    for option in ("--dry-run", "--continue-anyway"):
        changed = [*command, "imbalance.ratio=2", "seed=[1,0,2]", "--continue-anyway", option]
        assert cli.main(changed) == 2
        assert "data: the pool differs from pools/" in capsys.readouterr().err
        assert contents(sweep.folder) == before
    assert cli.main([*command, "--dry-run"]) == 0


def test_settings_of_the_folder_are_replaced_after_all_runs_are_accepted(tmp_path, monkeypatch):
    sweep = make_sweep(tmp_path, base=STEP, grid={"seed": [0]})
    runner.create_folders(sweep, [(run, []) for run in sweep.runs])
    before = (sweep.folder / "config.yaml").read_bytes()
    more = make_sweep(tmp_path, base=STEP, grid={"seed": [0, 1]})
    (sweep.folder / "runs/random-seed=1").write_text("a file in place of the run's folder")
    with pytest.raises(InputError, match="output: cannot write to "):
        runner.create_folders(more, [(run, []) for run in more.runs])
    assert (sweep.folder / "config.yaml").read_bytes() == before


def test_time_of_a_strategy_is_that_of_its_longest_query_and_the_total_counts_all_queries(tmp_path):
    sweep = make_sweep(tmp_path, base=STEP | {"strategy": "margin"}, grid={"seed": [0, 1]})
    first, second = runner.plan_sweep(sweep, this_machine(), QUIET, True).values()
    larger = Estimate({"embeddings": 1e9}, "embed the pool")
    plans = {
        "a": replace(first, query=replace(first.query, seconds=20.0, coordinator=larger)),
        "b": replace(second, query=replace(second.query, seconds=60.0)),
    }
    *_pools, line, total = runner.describe_plans(plans)
    assert line.startswith("margin: about 60 s per query, peak memory 1.00 GB")
    assert total == "all queries of all runs: about 80 s if no runs are concurrent"


def test_folder_in_use_is_refused_before_anything_is_checked_except_in_a_dry_run(tmp_path):
    sweep = make_sweep(tmp_path, base=BASE, grid={"seed": [0]})
    begin(sweep)
    with locked(sweep.folder):
        with pytest.raises(InputError, match="another process is writing to"):
            check_folder(sweep)
        assert check_folder(sweep, dry_run=True) == []
    assert check_folder(sweep) == []


def test_run_folder_name_depends_on_settings_only(tmp_path, monkeypatch):
    def name(**base):
        config = sweep_file.SweepConfig(name="s", base=BASE | base, output=str(tmp_path))
        return sweep_file.select_first_run(config).name

    before = name()
    assert name(training={"max_epochs": 100}, resources={"shards": 2}) == before  # 100 is the default
    assert name(training={"max_epochs": 5}) != before
    monkeypatch.setattr(identity, "loaded_version", lambda: "0.2.0 (abc)")
    assert name() == before


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ([{"name": "margin", "label": "random"}, "random"], "'random' is the name of another strategy than margin"),
        ([{"name": "margin", "label": "random"}], "'random' is the name of another strategy than margin"),
        ([{"name": "margin", "label": "ours"}, {"name": "bait", "label": "ours"}],
         "'ours' names two strategies, margin and bait"),
        ([{"name": "bait", "label": "ours", "params": {"damping": d}} for d in (1.0, 2.0)],
         r"'ours' names two strategies, bait\(damping=1.0\) and bait\(damping=2.0\)"),
        ([{"name": "margin", "label": "bait(damping=2.0)"}, {"name": "bait", "params": {"damping": 2.0}}],
         r"'bait\(damping=2.0\)' names two strategies"),
    ],
)  # fmt: skip
def test_labels_that_collide_are_refused(tmp_path, strategies, message):
    with pytest.raises(InputError, match=f"^strategy.label: {message}"):
        make_sweep(tmp_path, grid={"strategy": strategies})


def test_run_names_that_differ_only_in_case_are_refused(tmp_path):
    """Some file systems ignore case, and would give both runs one folder."""
    labels = [{"name": "bait", "label": label, "params": {"damping": d}} for label, d in (("Ours", 1.0), ("ours", 2.0))]
    with pytest.raises(InputError, match="grid: the run names Ours-seed=0 and ours-seed=0 differ only in upper and"):
        make_sweep(tmp_path, grid={"strategy": labels, "seed": [0]})


def test_settings_with_the_same_last_part_have_their_full_paths_in_run_names(tmp_path):
    grid = {"data.name": ["parquet", "cifar10"], "model.name": ["mlp"], "seed": [0]}
    names = [run.name for run in make_sweep(tmp_path, base=BASE, grid=grid).runs]
    assert names == [f"random-data.name={name}-model.name=mlp-seed=0" for name in ("parquet", "cifar10")]


def test_folder_without_a_sweep_is_refused(tmp_path):
    sweep = make_sweep(tmp_path, base=BASE)
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no sweep's results"):
        check_folder(sweep)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("name: s\nbase: {engine: {drift: 1e-4}, training: {learning_rate: 1E-3}}\n")
    config = sweep_file.load(file, ["resources.memory=5e-1", "engine.drift=2e-4"])
    run = sweep_file.expand(config).runs[0].config
    assert (run.engine.drift, run.training.learning_rate, run.resources.memory) == (2e-4, 1e-3, 0.5)
