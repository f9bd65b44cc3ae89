"""The rounds of the loop equal the predictions of ``oracle``: labels, random streams, and the effect of each setting.

A query strategy records the trained model, the labeled set and the random streams of each round.
"""

import copy
import dataclasses
import io
import itertools
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_network
import torch
from PIL import Image

from fishermask import query_strategies
from fishermask.config import ExperimentConfig, parse
from fishermask.errors import InputError
from fishermask.experiment.inputs import RunInputs, prepare_inputs
from fishermask.experiment.loop import run
from fishermask.planning.estimates import Estimate
from fishermask.planning.query_plan import QueryPlan
from fishermask.pool.shards import LocalShards
from fishermask.tensors.distances import KCenterScorer
from fishermask.tensors.mask import last_layer_mask

CLASSES, TRAIN, TEST = 3, 40, 20
"""Number of classes, and of training and test images per class."""


def pictures(per_class: int, channels: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Return uint8 noise [n, channels, 8, 8] that is brighter in columns that depend on the class, and the labels."""
    labels = [i % CLASSES for i in range(per_class * CLASSES)]
    images = np.random.default_rng(seed).integers(0, 156, (len(labels), channels, 8, 8), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label % channels, :, 2 * label : 2 * label + 4] += 60
    return torch.from_numpy(images), labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Channels -> Parquet files of the two splits, whose ids follow the order of ``pictures``."""
    folder, data = tmp_path_factory.mktemp("pictures"), {}
    for channels in (1, 3):
        data[channels] = {"name": "parquet"}
        for split, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
            structs, (images, labels) = [], pictures(count, channels, seed)
            for i, image in enumerate(images):
                pixels = image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy()
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                structs.append({"bytes": buffer.getvalue(), "path": f"{i:04}"})
            path = folder / f"{split}{channels}.parquet"
            pq.write_table(pa.table({"image": structs, "label": labels}), path)
            data[channels][split] = str(path)
    return data


TRAINING = {"learning_rate": 0.01, "batch_size": 16, "target_accuracy": 1.0, "max_epochs": 3, "clip": 0.1}
BUDGET = {"initial": 20, "query": 8, "total": 42}


def make_inputs(
    files, channels=3, *, training=None, data=None, strategy="random", dropout=0.0, **settings
) -> RunInputs:
    base: dict[str, Any] = {
        "data": files[channels] | (data or {}),
        "imbalance": "balanced",
        "model": {"name": "tiny_network:build", "params": {"channels": channels, "dropout": dropout}},
        "training": TRAINING | (training or {}),
        "budget": BUDGET,
        "strategy": strategy,
    }
    return prepare_inputs(parse(ExperimentConfig, base | settings))


class Observer:
    """A query strategy that queries at random and records its inputs in each round."""

    def __init__(self) -> None:
        self.observations: list[dict[str, Any]] = []

    def query(self, pool, budget):
        order = torch.randperm(len(pool.candidates), generator=pool.generator)
        observation = {
            "model": copy.deepcopy(pool.model),
            "labeled": pool.labeled.tolist(),
            "labels": pool.labels.tolist(),
        }
        shard = pool.shards.shards[0]
        observation |= {"sample": pool.sample(5).tolist(), "engine": pool.engine}
        observation |= {
            "statistics": shard.preprocess,
            "shard model": shard.model,
            "candidates": pool.candidates.tolist(),
        }
        layout = pool.plan_gradients()
        pool.store_embeddings(last_layer_mask(layout))
        shard.start_selection(KCenterScorer(torch.empty(37, 0)), pool.candidates, 0, pool.scores_type)
        observation |= {"hidden": shard.embeddings[0].hidden, "scores": shard.scores[0]}
        pool.free_embeddings()
        self.observations.append(observation)
        return pool.candidates[order[:budget]]


def observe_run(setup: RunInputs, **options) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the results of all rounds, and the observations of the rounds with a query."""
    observer = Observer()
    results = [r.as_dict() for r in run(dataclasses.replace(setup, strategy=observer), LocalShards, **options)]
    return results, observer.observations


def predict_rounds(
    channels=3, *, training=None, rule=None, seed=0, augment, strategy="random", dropout=0.0
) -> list[dict[str, Any]]:
    """Return the rounds that the oracle predicts from the documentation."""
    images, labels = pictures(TRAIN, channels, 0)
    test_images, test_labels = pictures(TEST, channels, 1)
    rows = oracle.kept_images(labels, rule or {"kind": "balanced"}, seed)
    images, labels, names = images[rows], torch.tensor(labels)[rows], [f"{row:04}" for row in rows]
    statistics = oracle.pool_statistics(images)
    permutation = torch.randperm(len(images), generator=oracle.stream(seed, "initial")).tolist()
    labeled, rounds = sorted(permutation[: BUDGET["initial"]]), []
    while True:
        index = len(rounds)
        torch.manual_seed(oracle.stream_seed(seed, "model", index))
        model = tiny_network.build(CLASSES, channels, dropout)
        torch.manual_seed(oracle.stream_seed(seed, "dropout", index))
        settings = TRAINING | (training or {})
        epochs, accuracy, ended_by = oracle.train(
            model, images[labeled], labels[labeled], statistics, seed, index, augment, **settings
        )
        model.eval()
        with torch.no_grad():
            predictions = model(oracle.standardized(test_images, statistics)).argmax(1).tolist()
        candidates = [i for i in range(len(images)) if i not in labeled]
        size = min(BUDGET["query"], BUDGET["total"] - len(labeled))
        order = torch.randperm(len(candidates), generator=oracle.stream(seed, f"strategy {strategy}", index)).tolist()
        sample = torch.randperm(len(images), generator=oracle.stream(seed, "fisher sample", index))[:5].sort().values
        rounds.append(
            {
                "model": model,
                "labeled": list(labeled),
                "labels": labels[labeled].tolist(),
                "recall": oracle.recalls(predictions, test_labels, CLASSES),
                "accuracy": sum(p == t for p, t in zip(predictions, test_labels, strict=True)) / len(test_labels),
                "epochs": (epochs, accuracy, ended_by),
                "batch": [candidates[i] for i in order[:size]],
                "sample": sample.tolist(),
                "ids": [names[candidates[i]] for i in order[:size]],
            }
        )
        if not size:
            return rounds
        labeled += rounds[-1]["batch"]


def assert_equals_prediction(setup: RunInputs, expected: list[dict[str, Any]]) -> None:
    """Assert that the rounds of a run and their models equal ``expected``."""
    results, observations = observe_run(setup)
    assert [r["batch"] for r in results] == [e["ids"] for e in expected]
    for result, prediction in zip(results, expected, strict=True):
        assert (result["epochs"], result["ended_by"]) == prediction["epochs"][::2]
        assert result["train_accuracy"] == pytest.approx(prediction["epochs"][1])
        assert result["accuracy"] == pytest.approx(prediction["accuracy"])
        assert list(result["recall"].values()) == pytest.approx(prediction["recall"])
        assert result["balanced_accuracy"] == pytest.approx(np.mean(prediction["recall"]))
    for observation, prediction in zip(observations, expected, strict=False):
        assert (observation["labeled"], observation["labels"]) == (prediction["labeled"], prediction["labels"])
        assert observation["sample"] == prediction["sample"]
        states = observation["model"].state_dict(), prediction["model"].state_dict()
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
        assert set(observation["labeled"]).isdisjoint(observation["candidates"])


CASES = {
    "base": {},
    "another seed": {"seed": 1},
    "another strategy": {"strategy": "margin"},
    "learning rate": {"training": {"learning_rate": 0.002}},
    "batch size": {"training": {"batch_size": 7}},
    "target accuracy": {"training": {"target_accuracy": 0.5}},
    "epochs": {"training": {"max_epochs": 1}},
    "narrow clip": {"training": {"clip": 0.01}},
    "no clip": {"training": {"clip": None}},
    "dropout": {"dropout": 0.5},
    "few images of a class": {"rule": {"kind": "step", "ratio": 4}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_run_equals_the_prediction_of_the_oracle(files, case):
    settings = {key: value for key, value in case.items() if key != "rule"}
    if "rule" in case:
        settings["imbalance"] = case["rule"]
    expected = predict_rounds(**case, augment=True)
    state = torch.get_rng_state()
    assert_equals_prediction(make_inputs(files, **settings), expected)
    assert torch.equal(torch.get_rng_state(), state)  # the run neither draws from it nor seeds it


def test_each_setting_changes_the_trained_model():
    """Without this test, the test above would pass if a setting were ignored."""
    models = [
        predict_rounds(**case, augment=True)[0]["model"] for name, case in CASES.items() if name != "another strategy"
    ]
    heads = [model[-1].weight for model in models]
    for first, second in itertools.combinations(heads, 2):
        assert (first - second).abs().max() > 1e-2 * second.abs().max()


@pytest.mark.parametrize(("channels", "augment"), [(3, None), (3, False), (1, None), (1, True)])
def test_augmentation_applies_to_color_images_unless_the_setting_says_otherwise(files, channels, augment):
    expected = predict_rounds(channels, augment=channels == 3 if augment is None else augment)
    assert_equals_prediction(make_inputs(files, channels, data={"augment": augment}), expected)
    opposite = predict_rounds(channels, augment=not (channels == 3 if augment is None else augment))
    assert (opposite[0]["model"][-1].weight - expected[0]["model"][-1].weight).abs().max() > 0.01


def test_rounds_and_seeds_have_separate_streams_and_strategies_share_all_streams_but_one(files):
    """Compare observations only, independently of the oracle."""
    runs = {
        (name, seed): observe_run(make_inputs(files, strategy=name, seed=seed))
        for name, seed in (("random", 0), ("margin", 0), ("random", 1))
    }
    (results, observations), (margin_results, margin_observations), (_, seed_1_observations) = runs.values()
    assert [r["labels"] for r in results] == [20, 28, 36, 42]

    def weights(observation):
        return torch.cat([p.flatten() for p in observation["model"].parameters()])

    # Both strategies train round 0 on the same labels, from the same weights, in the same order.
    assert torch.equal(weights(observations[0]), weights(margin_observations[0]))
    assert observations[0]["labeled"] == margin_observations[0]["labeled"] != seed_1_observations[0]["labeled"]
    assert [o["sample"] for o in observations] == [o["sample"] for o in margin_observations]
    assert results[0]["batch"] != margin_results[0]["batch"]
    samples = [tuple(o["sample"]) for o in (*observations, *seed_1_observations)]
    assert len(set(samples)) == len(samples)


def test_each_round_has_different_initial_weights(files):
    """With a learning rate of almost 0, the weights keep their initial values."""
    _, observations = observe_run(make_inputs(files, training={"learning_rate": 1e-12, "max_epochs": 1}))
    weights = [observation["model"][0].weight for observation in observations]
    for index, weight in enumerate(weights):
        torch.manual_seed(oracle.stream_seed(0, "model", index))
        torch.testing.assert_close(weight, tiny_network.build(CLASSES)[0].weight)
    assert not any(torch.equal(*pair) for pair in itertools.combinations(weights, 2))


STRATEGIES = [
    *(name for name in query_strategies.available() if name != "fisher_mask"),
    {"name": "fisher_mask", "params": {"fraction": 0.7, "fisher_samples": 9}},
    {"name": "fisher_mask", "params": {"fraction": 0.7, "mask": "random", "oversample": 1.5}},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_resumed_run_gives_identical_rounds(files, strategy):
    def rounds(history):
        setup = make_inputs(files, strategy=strategy, dropout=0.2, training={"max_epochs": 2})
        return [r.as_dict() | {"seconds": None} for r in run(setup, LocalShards, history)]

    uninterrupted = rounds(())
    assert len(uninterrupted) == 4
    for finished in (1, 3):
        assert rounds(uninterrupted[:finished]) == uninterrupted[finished:]


RULES = [
    {"kind": "balanced", "per_class": 12},
    {"kind": "step", "ratio": 4, "per_class": 32},
    {"kind": "step", "ratio": 4, "rare": 2},
    {"kind": "step", "ratio": 4, "rare_classes": [1]},
    {"kind": "long_tail", "ratio": 9, "per_class": 36},
    {"kind": "long_tail", "ratio": 4, "order": [1, 2, 0]},
    {"kind": "counts", "counts": {0: 20, 1: 5, 2: 35}},
    {"kind": "counts", "counts": {0: 20, 1: 5, 2: 35}, "permute": True},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_seed_determines_the_images_of_an_imbalance_and_the_initial_set(files, rule):
    pools, initial = [], []
    for seed in range(4):
        setup = make_inputs(files, imbalance=rule, seed=seed, budget={"initial": 9, "query": 1, "total": 10})
        _, labels = pictures(TRAIN, 3, 0)
        rows = oracle.kept_images(labels, rule, seed)
        assert [int(name) for name in setup.data.train.ids] == rows
        assert setup.data.train.labels.tolist() == [labels[row] for row in rows]
        permutation = torch.randperm(len(rows), generator=oracle.stream(seed, "initial")).tolist()
        assert setup.initial.tolist() == sorted(permutation[:9])
        assert len(setup.data.test.labels) == CLASSES * TEST
        pools.append(tuple(rows))
        initial.append(tuple(rows[i] for i in setup.initial))
    assert len(set(pools)) == len(set(initial)) == 4
    if not {"rare_classes", "order", "counts"} & rule.keys() and rule["kind"] != "balanced" or rule.get("permute"):
        sizes = {tuple(sum(row % CLASSES == c for row in rows) for c in range(CLASSES)) for rows in pools}
        assert len(sizes) > 1  # the rare classes are drawn too


def test_channel_statistics_are_published_or_computed_from_the_pool(files):
    rule = {"kind": "step", "ratio": 4}
    _, labels = pictures(TRAIN, 3, 0)
    images = pictures(TRAIN, 3, 0)[0][oracle.kept_images(labels, rule, 0)]
    mean, std = oracle.pool_statistics(images)
    for name in ("auto", "pool"):
        setup = make_inputs(files, data={"statistics": name}, imbalance=rule)
        assert setup.statistics.mean == pytest.approx(mean)
        assert setup.statistics.std == pytest.approx(std)
        assert observe_run(setup)[1][0]["statistics"] == setup.statistics
    with pytest.raises(InputError, match="data.statistics: no published statistics are known for parquet; use pool"):
        make_inputs(files, data={"statistics": "published"})

    def bundled(name):
        settings = {"data": {"statistics": name}, "strategy": "random", "imbalance": {"kind": "balanced"}}
        return prepare_inputs(parse(ExperimentConfig, settings))

    assert bundled("auto").statistics == bundled("published").statistics == ((0.2860,), (0.3530,))
    setup = bundled("pool")
    mean, std = oracle.pool_statistics(setup.data.train.images[:])
    assert setup.statistics.mean == pytest.approx(mean)
    assert setup.statistics.std == pytest.approx(std)
    assert setup.statistics != bundled("auto").statistics


ENGINE = [
    {"storage": "bfloat16"},
    {"storage": "float16"},
    {"scores": "float64"},
    {"gradients": "bfloat16"},
    {"channels_last": True},
    {"drift": 0.25},
    {},
]


@pytest.mark.parametrize("engine", ENGINE, ids=str)
def test_engine_settings_reach_the_shards(files, engine):
    observation = observe_run(make_inputs(files, engine=engine))[1][0]
    assert observation["hidden"].dtype == getattr(torch, engine.get("storage", "float32"))
    assert observation["scores"].dtype == getattr(torch, engine.get("scores", "float32"))
    numbers = observation["hidden"].float()
    has_few_bits = torch.equal(numbers, numbers.bfloat16().float())
    assert has_few_bits == ("bfloat16" in (engine.get("storage"), engine.get("gradients")))
    weight = observation["shard model"][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == engine.get("channels_last", False)
    assert observation["engine"].drift == engine.get("drift", 1e-3)


def test_plan_determines_the_number_of_images_per_gradient_chunk(files):
    plan = QueryPlan(1, 32, 5, 1.0, Estimate({}, "embed the pool"))
    engine = observe_run(make_inputs(files), plan=plan)[1][0]["engine"]
    assert (engine.chunk, engine.diagonal_batch) == (32, 5)


def test_shards_differentiate_in_evaluation_mode(files):
    observation = observe_run(make_inputs(files))[1][0]
    assert not any(module.training for module in observation["shard model"].modules())
    images, statistics = pictures(TRAIN, 3, 0)[0], oracle.pool_statistics(pictures(TRAIN, 3, 0)[0])
    with torch.no_grad():
        hidden = observation["model"].eval()[:-1](oracle.standardized(images, statistics))
    torch.testing.assert_close(observation["hidden"][:-1, : len(images)].mT, hidden, rtol=1e-4, atol=1e-5)


def test_training_defaults_are_those_of_the_paper():
    """Adam with 1e-3, batches of 64, gradients clamped to +-0.1, until a training accuracy of 0.99."""
    training = parse(ExperimentConfig, {}).training.model_dump()
    paper = {"learning_rate": 1e-3, "batch_size": 64, "target_accuracy": 0.99, "clip": 0.1}
    assert {key: training[key] for key in paper} == paper
