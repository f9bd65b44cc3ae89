"""Sweep files: what they mean, and what is said of those that are wrong."""

from pathlib import Path

import pytest
import yaml

from fishermask import query_strategies
from fishermask.config import ExperimentConfig, StrategyConfig, parse
from fishermask.errors import InputError
from fishermask.experiment.inputs import prepare_inputs
from fishermask.sweeps import sweep_file

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))


def sweep_of(tmp_path, overrides=(), **content) -> sweep_file.Sweep:
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


def test_a_grid_means_every_combination_with_the_seed_slowest_and_the_strategy_fastest(tmp_path):
    sweep = sweep_of(tmp_path, grid={"seed": [0, 1], "strategy": ["margin", "random"], "budget.query": [5, 6]})
    assert [(r.config.seed, r.config.budget.query, r.config.strategy.name) for r in sweep.runs] == [
        (seed, query, name) for seed in (0, 1) for query in (5, 6) for name in ("margin", "random")
    ]
    assert sweep.runs[0].name == "margin-query=5-seed=0"
    assert len({run.folder.path for run in sweep.runs}) == 8


def test_overrides_set_the_base_or_replace_what_the_grid_varies(tmp_path):
    grid = {"seed": [0, 1], "strategy": ["margin", "random"]}
    settings = ["seed=[3,4,5]", "strategy=bait", "training.max_epochs=7", "strategy.params.damping=2", "name=other"]
    sweep = sweep_of(tmp_path, settings[:3] + settings[4:], grid=grid)
    assert [run.config.seed for run in sweep.runs] == [3, 4, 5]
    assert {run.config.strategy.name for run in sweep.runs} == {"bait"}
    assert {run.config.training.max_epochs for run in sweep.runs} == {7}
    assert sweep.folder == tmp_path / "out/other"
    more = sweep_of(tmp_path, ["grid.budget.query=[1,2]"], grid={"seed": [0]})
    assert [run.config.budget.query for run in more.runs] == [1, 2]
    inner = sweep_of(tmp_path, ["strategy.params.damping=2"], base={"strategy": "bait"})
    assert inner.runs[0].config.strategy.params == {"damping": 2}


def test_two_variants_of_a_strategy_are_told_apart_by_their_parameters(tmp_path):
    variants = [{"name": "fisher_mask", "params": {"fraction": f}} for f in (0.02, 0.04)]
    names = [run.name for run in sweep_of(tmp_path, grid={"strategy": [*variants, "random"]}).runs]
    assert names == ["fisher_mask(fraction=0.02)", "fisher_mask(fraction=0.04)", "random"]


def test_a_fingerprint_is_of_what_the_result_depends_on():
    base = parse(ExperimentConfig, {})

    def same(**settings):
        return parse(ExperimentConfig, settings).fingerprint() == base.fingerprint()

    assert same(resources={"shards": 5, "workers": "ray", "cpus_per_shard": 2})
    assert same(resources={"shards": "auto", "restarts": 0})
    assert same(strategy={"name": "fisher_mask", "label": "ours"})
    assert not same(resources={"gpus": 1})
    assert not same(seed=1)
    assert not same(budget={"query": 3})


@pytest.mark.parametrize("value", [0, -1, 10_001, 1.0, True, "many", None])
def test_any_other_number_of_shards_is_one_line(value):
    with pytest.raises(InputError) as caught:
        parse(ExperimentConfig, {"resources": {"shards": value}})
    expected = f"resources.shards: should be auto or a whole number from 1 to 10,000, got {value!r}"
    assert str(caught.value) == expected


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
        ({"base": {"imbalance": {"kind": "stop"}}}, "imbalance.kind: expected one of none, balanced, step"),
        ({"base": {"imbalance": {"kind": "step"}}}, "imbalance.ratio: missing"),
        ({"base": {"imbalance": {"kind": "step", "ratio": 0.5}}}, "imbalance.ratio: .*got 0.5"),
        ({"base": {"imbalance": {"kind": "step", "ratio": 2, "rar": 1}}}, "imbalance.rar: unknown key; .* rare"),
        ({"base": {"training": {"target_accuracy": 2}}}, "training.target_accuracy: .*less than or equal to 1, got 2"),
        ({"base": {"model": 5}}, "model: .*got 5"),
        ({"grid": {"seed": []}}, "grid.seed: no values"),
        ({"grid": {"seed": 3}}, "grid.seed: .*valid list"),
        ({"grid": {"sed": [1]}}, "sed: unknown key"),
        ({"grid": {"seed.x": [1]}}, "seed: .*valid integer, got {'x': 1}"),
        ({"grid": {"seed": [1, 1]}}, "random-seed=1 is twice in the grid"),
        ({"name": "a/b"}, "name: expected letters, digits"),
        ({"base": {"seed": 1}, "grid": {"seed.x": [1]}}, "seed.x: seed is 1, which has no keys"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_file_is_one_line_with_field_value_and_remedy(tmp_path, content, message):
    content = content | {"base": BASE | content.get("base", {})}
    with pytest.raises(InputError, match=message) as caught:
        sweep_of(tmp_path, **content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fisher"}, "strategy.name: unknown strategy 'fisher'; there are badge, bait, coreset, entropy"),
        ({"strategy": {"name": "bait", "params": {"lambda": 1}}}, "strategy.params.lambda: unknown key; .* damping"),
        ({"strategy": {"name": "margin", "params": {"x": 1}}}, "strategy.params.x: unknown key"),
        ({"strategy": "fisher_mask"}, "strategy.params.fraction: 0.01 of 33,194 .* the smallest that works is 0.01959"),
        ({"model": "vgg"}, "model.name: unknown model 'vgg'"),
        ({"data": {"name": "celeba"}}, "data.name: unknown data set 'celeba'"),
        ({"budget": {"total": 20000}}, "budget.total: 20000 exceeds the pool of 10000 images"),
        ({"budget": {"initial": 5, "query": 6000}, "imbalance": {"kind": "balanced", "per_class": 500}},
         "budget.query: 6000 exceeds the pool of 5000"),
        ({"imbalance": {"kind": "counts", "counts": {0: 5, 1: 5000}}}, "class 1: 5000 images requested, 1000"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_the_data_are_one_line_before_anything_is_trained(settings, message):
    with pytest.raises(InputError, match=message):
        prepare_inputs(parse(ExperimentConfig, {"strategy": "random"} | settings))


def test_a_preset_sets_what_is_not_given():
    def params(**given):
        return query_strategies.load(StrategyConfig(name="fisher_mask", params=given)).params

    released = params(preset="fishermask-released", fraction=0.02)
    assert (released.class_weighting, released.fisher_sample, released.fraction) == ("none", "first", 0.02)
    assert params(preset="fishermask-released", class_weighting="sqrt").class_weighting == "sqrt"
    assert params().class_weighting == "sqrt"
    with pytest.raises(InputError, match="strategy.params.preset: .*'fishermask-released'.*, got 'released'"):
        params(preset="released")


def test_another_sweeps_folder_is_refused_and_a_grown_grid_is_welcome(tmp_path):
    def sweep(seeds, **base):
        return sweep_of(tmp_path, base=BASE | base, grid={"seed": seeds})

    first = sweep([0, 1])
    sweep_file.check_folder(first)
    for run in first.runs:
        run.folder.create(run.config, [])
    stored = first.config.model_dump(mode="json", exclude={"output"})
    (first.folder / "config.yaml").write_text(yaml.safe_dump(stored))
    sweep_file.check_folder(sweep([0, 1, 2]))
    sweep_file.check_folder(sweep([0], resources={"shards": 3}))
    with pytest.raises(InputError, match="training.max_epochs is 100 there, 5 here; choose another name=NAME"):
        sweep_file.check_folder(sweep([7], training={"max_epochs": 5}))
    with pytest.raises(InputError, match="varies seed; choose another"):
        sweep_file.check_folder(sweep_of(tmp_path, grid={"budget.query": [1]}))


def test_a_folder_that_is_no_sweeps_is_refused(tmp_path):
    sweep = sweep_of(tmp_path, base=BASE)
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is no sweep's results"):
        sweep_file.check_folder(sweep)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("name: s\nbase: {engine: {drift: 1e-4}, training: {learning_rate: 1E-3}}\n")
    config = sweep_file.load(file, ["resources.memory=5e-1", "engine.drift=2e-4"])
    run = sweep_file.expand(config).runs[0].config
    assert (run.engine.drift, run.training.learning_rate, run.resources.memory) == (2e-4, 1e-3, 0.5)
