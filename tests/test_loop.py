"""The active-learning loop, in process, on the bundled data."""

import io
import json
from pathlib import Path

import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fishermask.config import BudgetConfig, ExperimentConfig, parse
from fishermask.errors import InputError
from fishermask.experiment import journal as journal_module
from fishermask.experiment.inputs import prepare_inputs
from fishermask.experiment.loop import run
from fishermask.pool.shards import LocalShards
from fishermask.results.files import JournalFile
from fishermask.tensors.images import channel_statistics


def make_inputs(strategy="margin", **settings):
    base = {
        "imbalance": {"kind": "step", "ratio": 10, "per_class": 60},
        "model": {"name": "mlp", "params": {"width": 16, "depth": 1}},
        "budget": {"initial": 10, "query": 7, "total": 30},
        "training": {"max_epochs": 5},
        "strategy": strategy,
    }
    return prepare_inputs(parse(ExperimentConfig, base | settings))


def compute_rounds(inputs, history=()):
    records = [r.as_dict() for r in run(inputs, LocalShards, history)]
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


@pytest.fixture(scope="module")
def margin_run():
    return compute_rounds(make_inputs())


def test_rounds_spend_the_budget_exactly_and_the_last_batch_is_the_remainder(margin_run):
    assert [r["labels"] for r in margin_run] == [10, 17, 24, 30]
    assert [len(r["batch"]) for r in margin_run] == [7, 7, 6, 0]
    queried = [name for r in margin_run for name in r["batch"]]
    assert len(set(queried)) == 20
    inputs = make_inputs()
    assert not set(queried) & {inputs.data.train.ids[i] for i in inputs.initial.tolist()}
    assert set(queried) <= set(inputs.data.train.ids)


@pytest.mark.parametrize(
    ("initial", "query", "total", "num_rounds"), [(10, 7, 30, 4), (10, 10, 30, 3), (10, 50, 30, 2), (10, 5, 10, 1)]
)
def test_num_rounds_follows_from_the_budget(initial, query, total, num_rounds):
    assert BudgetConfig(initial=initial, query=query, total=total).num_rounds == num_rounds


def test_resume_from_history_gives_identical_rounds(margin_run):
    for num_rounds in (1, 3):
        assert compute_rounds(make_inputs(), margin_run[:num_rounds]) == margin_run[num_rounds:]
    assert compute_rounds(make_inputs(), margin_run) == []


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("strategy", ["bait", "badge"])
def test_interrupted_query_resumes_after_the_picks_of_its_journal(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "WRITE_SECONDS", 0.0)
    inputs, stages, journal = (
        make_inputs(strategy, budget={"initial": 10, "query": 30, "total": 70}),
        [],
        JournalFile(tmp_path / "j"),
    )
    uninterrupted = compute_rounds(inputs)

    def stop(stage, done, total):
        stages.append((stage, done))
        if (stage, done) == ("pick", 20) and len(rounds) == 1:
            raise Interrupted

    rounds = []
    with pytest.raises(Interrupted):
        for result in run(inputs, LocalShards, (), stop, journal):
            rounds.append(result.as_dict())
    query = json.loads(journal.path.read_text().splitlines()[-1])["query"]
    assert [name for name, _ in journal.read(query)] == uninterrupted[1]["batch"][:20]
    stages.clear()
    resumed = [r.as_dict() for r in run(inputs, LocalShards, rounds, lambda *stage: stages.append(stage[:2]), journal)]
    assert [done for stage, done in stages if stage == "pick"] == list(range(21, 31))
    assert [r["batch"] for r in rounds + resumed] == [r["batch"] for r in uninterrupted]
    assert [r["accuracy"] for r in rounds + resumed] == [r["accuracy"] for r in uninterrupted]


def test_journal_of_another_model_is_not_used(tmp_path, monkeypatch):
    """A data file is replaced by another file with the same ids before the end of round 0."""
    monkeypatch.setattr(journal_module, "WRITE_SECONDS", 0.0)
    journal, bait_inputs = JournalFile(tmp_path / "j"), make_inputs("bait", training={"max_epochs": 4})
    next(run(bait_inputs, LocalShards, journal=journal))
    journal.append("0-0123456789ab", [["nowhere.png", True]])
    first = next(run(make_inputs("bait"), LocalShards, journal=journal))
    assert first.batch == compute_rounds(make_inputs("bait"))[0]["batch"]


def test_history_of_other_images_is_refused(margin_run):
    for batch in (["nowhere.png"], margin_run[0]["batch"][:1] * 2):
        with pytest.raises(InputError, match="not in the pool, or twice"):
            compute_rounds(make_inputs(), [margin_run[0] | {"batch": batch}])


def test_equal_seeds_give_equal_rounds_and_other_seeds_differ(margin_run):
    assert compute_rounds(make_inputs()) == margin_run
    assert compute_rounds(make_inputs(seed=1))[0]["accuracy"] != margin_run[0]["accuracy"]


def test_strategies_of_a_seed_share_the_initial_labels_and_the_first_model(margin_run):
    random_run = compute_rounds(make_inputs("random"))
    shared_keys = {"labels", "accuracy", "balanced_accuracy", "macro_f1", "recall", "epochs", "train_accuracy"}
    assert {key: random_run[0][key] for key in shared_keys} == {key: margin_run[0][key] for key in shared_keys}
    assert random_run[0]["batch"] != margin_run[0]["batch"]


def test_batch_classes_count_the_batch_by_class(margin_run):
    inputs = make_inputs()
    label = dict(zip(inputs.data.train.ids, inputs.data.train.labels.tolist(), strict=True))
    for r in margin_run:
        classes = [inputs.data.classes[label[name]] for name in r["batch"]]
        assert r["batch_classes"] == {name: classes.count(name) for name in inputs.data.classes}


def test_pool_statistics_are_computed_from_the_images_of_the_pool():
    inputs = make_inputs(data={"statistics": "pool"})
    assert inputs.statistics == channel_statistics(inputs.data.train.images)
    assert inputs.statistics != make_inputs().statistics


def test_model_can_be_any_module_that_returns_logits(tmp_path):
    """The settings name a torchvision model with attention and with parameters outside of layers."""
    generator, images = np.random.default_rng(0), []
    for i in range(40):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    file = str(tmp_path / "color.parquet")
    pq.write_table(pa.table({"image": images, "label": [i % 3 for i in range(40)]}), file)
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    inputs = make_inputs(
        {"name": "fisher_mask", "params": {"fraction": 0.2, "fisher_samples": 20}},
        model={"name": "torchvision.models:VisionTransformer", "params": sizes},
        data=pictures.config(Path(file)).model_dump(),
        imbalance={"kind": "balanced"},
        budget={"initial": 6, "query": 4, "total": 14},
    )
    assert [r["labels"] for r in compute_rounds(inputs)] == [6, 10, 14]


def test_test_set_without_the_classes_of_the_pool_is_refused_before_training(tmp_path):
    files = {}
    for split, label in (("train", 0), ("test", 2)):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        files[split] = str(tmp_path / f"{split}.parquet")
        pq.write_table(pa.table({"image": [image] * 4, "label": [label, label, label + 1, label + 1]}), files[split])
    counts = {"kind": "counts", "counts": {0: 2, 1: 2}}
    with pytest.raises(InputError, match="data.test: holds no image of the pool's classes"):
        make_inputs(data={"name": "parquet", **files}, imbalance=counts, budget={"initial": 1, "query": 1, "total": 2})


def test_budget_can_be_the_size_of_the_pool():
    rounds = compute_rounds(make_inputs(budget={"initial": 20, "query": 200, "total": 330}))
    assert [r["labels"] for r in rounds] == [20, 220, 330]
