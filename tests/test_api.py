"""The public API: its names, one query with the user's model and pool, runs, and the errors of invalid arguments."""

import ast
import importlib
import inspect
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fishermask
from fishermask import InputError, select
from fishermask.config import ExperimentConfig, parse
from fishermask.experiment import loop
from fishermask.experiment.inputs import prepare_inputs
from fishermask.planning import workload
from fishermask.pool import pool as pool_module
from fishermask.pool.shard import Shard
from fishermask.pool.shards import LocalShards
from fishermask.tensors.gradient_plan import plan_gradients

ROOT = Path(__file__).parent.parent


def make_network(inputs=6, classes=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 5), nn.ReLU(), nn.Linear(5, classes)).to(dtype)


def make_features(count=60, inputs=6, dtype=torch.float32):
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# Names


def test_import_of_the_package_imports_no_heavy_library():
    code = "import sys, fishermask; print(fishermask.__version__, *sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = {name.split(".")[0] for name in output.split()}
    assert not modules & {"torch", "numpy", "pandas", "pyarrow", "ray", "matplotlib", "scipy", "pydantic", "rich"}


def test_public_names_are_the_same_for_users_type_checkers_and_dir():
    module = ast.parse(Path(fishermask.__file__).read_text())
    block = next(node for node in module.body if isinstance(node, ast.If))
    modules_for_type_checkers = {alias.name: imported.module for imported in block.body for alias in imported.names}
    assert modules_for_type_checkers == fishermask._MODULES
    assert sorted(modules_for_type_checkers) == sorted(fishermask.__all__)
    assert {*fishermask.__all__} <= {*dir(fishermask)}
    with pytest.raises(AttributeError, match="no attribute 'selection'"):
        fishermask.selection  # noqa: B018


def test_public_functions_are_not_hidden_by_private_modules():
    from fishermask.sweeps import runner, tune_runner  # noqa: F401

    assert callable(fishermask.sweep)
    assert callable(fishermask.strategies)
    assert callable(fishermask.select)


@pytest.mark.parametrize("name", fishermask.__all__)
def test_each_public_name_has_a_docstring_that_lists_its_arguments_or_attributes(name):
    value = getattr(fishermask, name)
    text = inspect.getdoc(value)
    assert text.splitlines()[0].endswith(".")
    if inspect.isfunction(value):
        listed = list(inspect.signature(value).parameters)
        assert "InputError:" in text
    else:
        fields = getattr(value, "__dataclass_fields__", None) or getattr(value, "model_fields", {})
        listed = list(fields)
    for argument in listed:
        assert f"\n    {argument}: " in text, argument
    for method, function in inspect.getmembers(value, inspect.isfunction):
        if not method.startswith("_") and function.__module__.startswith("fishermask"):
            assert inspect.getdoc(function), method


def test_strategies_are_listed_with_descriptions_and_default_params():
    listed = fishermask.strategies()
    assert {"fisher_mask", "bait", "badge", "coreset", "margin", "entropy", "random"} <= set(listed)
    assert listed["bait"].params["damping"] == 1.0
    assert all(info.description.endswith(".") for info in listed.values())
    assert listed["bait"].param_descriptions["damping"].startswith("Factor of the identity matrix")


# The selection


@pytest.mark.parametrize("name", ["fisher_mask", "bait", "badge", "random"])
def test_batch_equals_the_batch_from_the_definition(name):
    model, pool, labeled, seed = (
        make_network(dtype=torch.float64),
        make_features(40, dtype=torch.float64),
        [3, 11, 20],
        7,
    )
    scores = oracle.Scores(model, pool)
    params = {}
    if name == "random":
        candidates = torch.tensor([i for i in range(40) if i not in labeled])
        draws = oracle.stream(seed, "strategy random")
        expected = candidates[torch.randperm(37, generator=draws)[:6]].tolist()
    elif name == "badge":
        hidden = torch.cat([model[:2](pool), torch.ones(40, 1)], 1).detach()
        expected = oracle.badge_batch(scores.p, hidden, labeled, 6, oracle.stream(seed, "strategy badge"), 2048)
    else:
        body = []
        if name == "fisher_mask":
            params = {"num_body_parameters": 20, "fisher_samples": 25}
            sample = torch.randperm(40, generator=oracle.stream(seed, "fisher sample"))[:25].tolist()
            body = oracle.masked_body(scores, 20, "global", sample, None)
        else:
            params = {"oversample": 1.0}
        information = oracle.information(scores, body + scores.last_layer, "sqrt", None)
        expected = oracle.trace_batch(information, labeled, 6)
    selection = select(model, pool, labeled, 6, name, params=params, seed=seed)
    assert selection.positions.tolist() == expected
    assert selection.positions.dtype == torch.int64
    if name in ("fisher_mask", "bait"):
        assert selection.objective_before - selection.gains.sum() == pytest.approx(selection.objective_after)
        assert (selection.gains > 0).all()


def test_batch_equals_round_0_of_a_run_on_uint8_images():
    settings = {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "training": {"max_epochs": 2},
        "budget": {"initial": 20, "query": 12, "total": 32},
        "strategy": "badge",
        "seed": 5,
    }
    inputs = prepare_inputs(parse(ExperimentConfig, settings))
    models = []

    class Shards(LocalShards):
        def call(self, method, *args):
            models.extend(args[:1] if method is Shard.set_model else [])
            return super().call(method, *args)

    round_0 = next(loop.run(inputs, lambda images, statistics: Shards(images, statistics)))
    train = inputs.data.train
    batch = train.ids.positions(round_0.batch).tolist()
    images, (mean, std) = train.images[:], inputs.statistics
    selection = select(
        models[0],
        images,
        inputs.initial,
        12,
        "badge",
        transform=lambda batch: (batch.float().div_(255) - mean[0]) / std[0],
        seed=5,
    )
    assert selection.positions.tolist() == batch


class Squares(Dataset):
    """Items (x, y), with x an array."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        np.random.rand(), torch.rand(1), random.random()  # noqa: NPY002  as many data sets do
        return self.samples[index].numpy(), index % 3


def test_tensors_arrays_files_and_data_sets_give_the_same_batch(tmp_path):
    model, pool = make_network(), make_features()
    np.save(tmp_path / "pool.npy", pool.numpy())
    memory_mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    mask = np.zeros(60, dtype=bool)
    mask[[3, 11]] = True
    expected = select(model, pool, [3, 11], 5, "bait").positions.tolist()
    for same in (
        pool.numpy(),
        memory_mapped,
        TensorDataset(pool),
        Squares(pool),
        list(pool),
        pool.t().contiguous().t(),
    ):
        assert select(model, same, mask, 5, "bait").positions.tolist() == expected
    rounded = (10 * pool).round()
    expected = select(model, rounded / 10, [3, 11], 5, "bait").positions.tolist()
    for dtype in (torch.int64, torch.int16, torch.float64):
        batch = select(model, rounded.to(dtype), torch.tensor([3, 11]), 5, "bait", transform=lambda b: b.float() / 10)
        assert batch.positions.tolist() == expected


@pytest.mark.parametrize("name", ["margin", "least_confidence"])
def test_predictions_that_round_to_1_are_ordered_by_their_other_probabilities(name):
    model = nn.Linear(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[1.0], [0.0]]), torch.zeros(2)
    pool = torch.tensor([60.0, 30, 50, 5, 40, 20, 70, 30])[:, None]  # differences between the logits
    assert (model(pool).softmax(-1).amax(-1) == 1).sum() == 7
    assert select(model, pool, [], 8, name).positions.tolist() == [3, 5, 1, 7, 4, 2, 0, 6]


@pytest.mark.parametrize("name", ["fisher_mask", "badge", "margin"])
def test_shards_and_memory_do_not_change_the_batch(name):
    model, pool = make_network(), make_features(5000)
    batch_1, batch_3 = (select(model, pool, [3, 11], 5, name, shards=count) for count in (1, 3))
    small_batch = select(model, Squares(pool), [3, 11], 5, name, shards=2, memory=0.1)
    assert batch_1.positions.tolist() == batch_3.positions.tolist() == small_batch.positions.tolist()


def test_select_does_not_change_model_pool_and_global_states():
    model, pool = make_network(), make_features()
    model.insert(0, nn.ReLU(inplace=True))  # writes to its input
    model.insert(3, nn.Dropout())
    model[1].weight.requires_grad_(False)
    model.train()
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    threads, copy = torch.get_num_threads(), pool.clone()
    torch.set_num_threads(2)
    try:
        selection = select(model, Squares(pool), [3], 4, "badge", transform=lambda batch: batch.mul_(2))
        assert selection.positions.tolist() == select(model, 2 * pool, [3], 4, "badge").positions.tolist()
        select(model, pool, [3], 4, "badge", transform=lambda batch: batch.mul_(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(pool, copy)
    assert [module.training for module in model] == [True, True, True, False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")], ids=["no_grad", "inference", "meta"]
)
def test_modes_of_the_caller_do_not_change_the_batch(context):
    model, pool = make_network(), make_features()
    with torch.inference_mode():
        inference_model, inference_pool = make_network(), make_features()
    expected = select(model, pool, [3, 11], 4, "bait", seed=1).positions.tolist()
    with context():
        assert select(model, pool, [3, 11], 4, "bait", seed=1).positions.tolist() == expected
    assert select(inference_model, inference_pool, [3, 11], 4, "bait", seed=1).positions.tolist() == expected


def test_strategy_cannot_change_the_arguments_or_the_candidates():
    labeled, labels = torch.tensor([3, 11]), np.array([2, 0])

    def writing(pool, budget):
        batch = pool.candidates[:budget].clone()
        for attribute in (pool.labeled, pool.labels, pool.candidates):
            attribute.fill_(7)
        return batch

    assert select(make_network(), make_features(), labeled, 2, writing, labels=labels).positions.tolist() == [0, 1]
    assert (labeled.tolist(), labels.tolist()) == ([3, 11], [2, 0])


def test_numpy_numbers_are_accepted():
    model, pool = make_network(), make_features()
    params = {"num_body_parameters": np.int64(10), "damping": np.float32(1)}
    batch = select(model, pool, [3], np.int64(4), params=params, memory=np.float32(1), seed=np.int32(0))
    expected = select(model, pool, [3], 4, params={"num_body_parameters": 10, "damping": 1.0})
    assert batch.positions.tolist() == expected.positions.tolist()


def test_strategy_function_gets_the_pool_and_its_labels():
    def smallest_index(pool, budget, params):
        assert pool.labeled.tolist() == [3, 11]
        assert pool.labels.tolist() == [2, 0]
        assert pool.probabilities().shape == (58, 3)
        return pool.candidates[params["skip"] :][:budget].numpy()

    selection = select(make_network(), make_features(), [3, 11], 2, smallest_index, params={"skip": 3}, labels=[2, 0])
    assert selection.positions.tolist() == [4, 5]
    assert selection.strategy == "smallest_index"
    assert selection.gains is None
    assert list(select(make_network(), make_features(), [], 2, lambda pool, budget: range(5, 7))) == [5, 6]
    assert select(make_network(), make_features(), [], 3, lambda pool, budget: [2, 1, 0]).positions.tolist() == [
        2,
        1,
        0,
    ]


def test_selection_has_a_text_and_a_table():
    selection = select(make_network(), make_features(), [3, 11], 12, "bait")
    text = repr(selection)
    assert text.startswith("Selection(12 positions by bait, objective ")
    assert ", ...])" in text
    frame = selection.to_frame()
    assert frame["position"].tolist() == selection.positions.tolist()
    assert frame["gain"].tolist() == selection.gains.tolist()
    assert "<table" in selection._repr_html_()
    assert {"embed", "pick"} <= set(selection.seconds)
    assert len(selection) == 12
    assert list(selection) == selection.positions.tolist()
    assert list(select(make_network(), make_features(), [3], 2, "random").to_frame().columns) == ["position"]


def test_progress_is_reported_to_a_function_or_a_bar(capsys):
    calls = []
    select(make_network(), make_features(), [3], 4, "bait", progress=lambda *call: calls.append(call))
    assert ("pick", 4, 4) in calls
    select(make_network(), make_features(), [3], 4, "bait", progress=True)  # too fast for a bar
    assert capsys.readouterr().out == ""


# Errors


class Irregular(Squares):
    def __getitem__(self, index):
        return torch.zeros(6 if index < 30 else 7), 0


class Augmented(Squares):
    def __getitem__(self, index):
        return self.samples[index] + torch.rand(1)


class SometimesAugmented(Squares):
    """Changes one read in two of each item other than the first."""

    def __getitem__(self, index):
        return self.samples[index] + (index > 0 and random.random() < 0.5)


def flip_sometimes(batch):
    return batch.flip(1) if random.random() < 0.5 else batch


class Failing(Squares):
    def __getitem__(self, index):
        raise OSError("disk")


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(6)


def with_nan(position):
    pool = make_features()
    pool[position, 2] = torch.nan
    return pool


IMAGES = torch.zeros(60, 1, 4, 4, dtype=torch.uint8)
FROZEN = make_network().requires_grad_(False)
OVERFLOWING = make_network()
OVERFLOWING[2].weight.data.fill_(1e38)


class Outputs(nn.Module):
    """Returns its logits in a structure that ``wrap`` makes."""

    def __init__(self, wrap):
        super().__init__()
        self.network, self.wrap = make_network(), wrap

    def forward(self, inputs):
        return self.wrap(self.network(inputs))


NO_CLASSES = nn.Sequential(nn.Linear(6, 3), nn.Flatten(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.functional.relu}, "model: is .*; expected a torch.nn.Module"),
        ({"model": nn.ReLU()}, "model: ReLU has no parameters"),
        ({"model": make_network().to("meta")}, "model: has parameters on meta; move it to one device"),
        ({"model": make_network(7)}, "model: fails for inputs of shape .7, 6. .RuntimeError"),
        ({"model": NO_CLASSES}, "model: Sequential must return logits"),
        (
            {"model": OVERFLOWING, "pool": 10 * make_features()},
            "model: .*not finite.*; check its parameters and inputs",
        ),
        (
            {"model": Outputs(lambda logits: logits * torch.inf if len(logits) > 20 else logits)},
            "model: the model predicts probabilities that are not finite; check its parameters and inputs",
        ),
        (
            {"model": Outputs(lambda logits: {"logits": logits, "loss": 0})},
            "model: .*returned dict with the keys logits, loss; wrap it in a module whose forward returns the logits",
        ),
        ({"model": Outputs(lambda logits: (logits,))}, "model: .*returned tuple; wrap it in a module"),
        ({"model": FROZEN, "strategy": "bait"}, "model: all parameters of Sequential are frozen"),
        ({"pool": IMAGES}, "pool: torch.uint8 samples need a transform .*lambda batch: batch.float.. / 255"),
        ({"pool": make_features().long()}, "pool: torch.int64 samples need a transform"),
        ({"pool": make_features().numpy().astype(object)}, "pool: has dtype object; expected numbers"),
        ({"pool": make_features()[:, 0]}, r"pool: has shape \(60,\); expected \[n, ...\]"),
        ({"pool": make_features()[:0]}, "pool: holds 0 samples"),
        ({"pool": make_features().numpy()[::-1]}, "pool: is a reversed view"),
        ({"pool": make_features().numpy().astype(">f4")}, "pool: has another byte order; give array.astype"),
        ({"pool": np.ma.masked_array(make_features().numpy())}, "pool: is a masked array; replace the masked values"),
        ({"pool": 5}, "pool: is int 5; give a tensor, an array or a map-style data set"),
        ({"pool": DataLoader(TensorDataset(make_features()))}, "pool: is a DataLoader.* give its data set"),
        ({"pool": Stream()}, "pool: is an iterable-style data set"),
        ({"pool": ["text", "more"]}, "pool: item 0 holds str 'text'; give the data set a transform"),
        ({"pool": Irregular(make_features())}, "pool: item (?:39|49) is .*shape .7,., and item 0 is .*shape .6,."),
        (
            {"pool": Augmented(make_features())},
            "pool: item 0 differs when it is read again; leave random augmentation out",
        ),
        ({"pool": SometimesAugmented(make_features())}, r"pool: item \d+ differs when it is read again"),
        ({"transform": flip_sometimes}, "transform: gives other inputs when it is called again"),
        (
            {"model": nn.Linear(6, 1)},
            r"model: Linear returns 1 logit; .* needs 2, such as stack\(\[-z / 2, z / 2\], 1\)",
        ),
        ({"pool": Failing(make_features())}, "pool: item 0 cannot be read .OSError: disk"),
        ({"pool": with_nan(0)}, "pool: the input made from sample 0 holds NaN"),
        ({"pool": with_nan(41)}, "pool: the input made from sample 41 holds NaN"),
        ({"labeled": [3, 60]}, "labeled: holds position 60; the positions of the pool are 0 to 59"),
        ({"labeled": [3, -1]}, "labeled: holds position -1"),
        ({"labeled": [3, 5, 3]}, "labeled: holds position 3 more than once"),
        ({"labeled": [True, False]}, r"labeled: the mask has shape \(2,\); expected \(60,\)"),
        ({"labeled": [0.5]}, r"labeled: is torch.float32 of shape \(1,\); expected positions"),
        ({"labeled": 3}, "labeled: is not a list of positions"),
        ({"labeled": None}, r"labeled: is None; expected positions \[l\] or a boolean mask \[n\], \[\] for no label"),
        ({"labeled": {3: 1}}, "labeled: is {3: 1}; expected positions"),
        ({"labeled": ""}, "labeled: is ''; expected positions"),
        ({"labeled": [True, 3]}, "labeled: .*positions and booleans are mixed"),
        ({"labeled": [[]]}, r"labeled: is torch.float32 of shape \(1, 0\); expected positions"),
        ({"labeled": np.zeros((0, 5))}, r"labeled: is torch.float64 of shape \(0, 5\); expected positions"),
        ({"labeled": torch.tensor([3, 11]).to_sparse()}, "labeled: is not a list of positions .*sparse"),
        ({"labeled": range(60)}, "labeled: holds all positions of the pool; no unlabeled sample is left"),
        ({"labeled": [], "strategy": "coreset"}, "labeled: coreset measures distances to labeled images"),
        ({"labels": [1]}, r"labels: is torch.int64 of shape \(1,\); expected 2 integers"),
        ({"labels": [0, 3]}, "labels: holds class 3; the classes of the model are 0 to 2"),
        ({"labels": [0, -1]}, "labels: holds class -1; expected classes from 0"),
        ({"budget": 59}, "budget: is 59; expected 1 to 58, the number of unlabeled samples"),
        ({"budget": 0}, "budget: is 0; expected 1 to 58"),
        ({"budget": 2.0}, "budget: is 2.0; expected an integer"),
        ({"shards": 61}, "shards: is 61; expected 1 to 60"),
        ({"seed": -1}, "seed: is -1; expected 0 to"),
        ({"strategy": "marign"}, "strategy: unknown strategy 'marign'; there are badge, bait"),
        ({"strategy": 5}, "strategy: is 5; expected a name, or a function"),
        ({"strategy": lambda pool: []}, r"strategy: <lambda> takes \(pool\); expected"),
        (
            {"model": nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))},
            "model: Sequential returns probabilities; return logits",
        ),
        ({"strategy": lambda pool, budget: [0, 0]}, "strategy: the strategy returned 2 positions, 1 distinct"),
        ({"strategy": lambda pool, budget: {0, 1}}, "strategy: .* expected a list, a range, an array or a tensor"),
        ({"strategy": max}, "strategy: max has no signature; expected a function"),
        ({"strategy": lambda pool, budget: sys.exit(3)}, "strategy: <lambda> exits the process; raise an exception"),
        ({"params": {"x": 1}}, "params.x: margin has no parameters; remove it"),
        ({"strategy": "bait", "params": {"damping": -1.0}}, "params.damping: .* greater than 0"),
        ({"params": 5}, "params: is 5; expected a dictionary"),
        ({"memory": 1e-5, "strategy": "bait"}, "memory: .*needs .* available"),
        ({"memory": "1"}, "memory: is '1'; expected a number of GB"),
        ({"memory": True}, "memory: is True; expected a number of GB"),
        ({"engine": 5}, "engine: expected keys and values, got 5"),
        ({"engine": "x"}, "engine: expected keys and values, got 'x'"),
        ({"engine": {"storage": "int8"}}, "engine.storage: .*'int8'"),
        ({"progress": "bar"}, "progress: is 'bar'; expected True, False or a function"),
        ({"transform": 5}, "transform: is 5; expected a function"),
        ({"transform": lambda batch: None}, "transform: returned NoneType None; expected a floating-point tensor"),
        ({"transform": lambda batch: batch.sum()}, "transform: returned .*; expected a floating-point tensor"),
        ({"transform": lambda batch: batch[:1]}, r"transform: made inputs of shape \(1, 6\) from 7 samples"),
        ({"transform": lambda batch: batch - batch.mean(0)}, "transform: the input of a sample depends on its batch"),
        ({"transform": lambda batch: batch + torch.rand(1)}, "transform: gives other inputs when it is called again"),
        ({"transform": lambda batch: batch.matmul(1)}, r"transform: fails for a batch of shape \(7, 6\)"),
    ],
)
def test_bad_argument_is_one_line_that_names_it(arguments, message):
    arguments = {
        "model": make_network(),
        "pool": make_features(),
        "labeled": [3, 11],
        "budget": 2,
        "strategy": "margin",
    } | arguments
    with pytest.raises(InputError, match=f"^(?:{message})") as exception_info:
        select(**arguments)
    assert "\n" not in str(exception_info.value)


class SelfReference(nn.Module):
    """Its forward calls a lambda over the model itself, which copies of the model share with the original."""

    def __init__(self, covers_head):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        body = lambda x: torch.relu(self.b(torch.relu(self.a(x))))  # noqa: E731
        self.compute = (lambda x: self.head(body(x))) if covers_head else body
        self.covers_head = covers_head

    def forward(self, x):
        return self.compute(x) if self.covers_head else self.head(self.compute(x))


def make_hooked():
    network = make_network()
    network[2].register_forward_pre_hook(lambda _module, args: (args[0] + network[0].weight.mean(),))
    return network


@pytest.mark.parametrize("strategy", ["fisher_mask", "bait"])
@pytest.mark.parametrize(
    "make",
    [lambda: SelfReference(False), lambda: SelfReference(True), make_hooked],
    ids=["lambda for the body", "lambda for all layers", "hook"],
)
def test_model_with_a_function_over_itself_is_refused_and_not_changed(make, strategy):
    model = make()
    before = [(parameter.detach().clone(), parameter._version) for parameter in model.parameters()]
    with pytest.raises(InputError, match="^model: .* holds a function that refers to the model itself"):
        select(model, make_features(), [3, 11], 2, strategy)
    for parameter, (value, version) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert (parameter.grad, parameter._version) == (None, version)


@pytest.mark.parametrize("strategy", ["fisher_mask", "bait", "badge"])
def test_gradients_are_verified_once(strategy, monkeypatch):
    calls = []

    def count(*args):
        calls.append(args)
        return plan_gradients(*args)

    for module in (importlib.import_module(f"fishermask.query_strategies.{strategy}"), workload, pool_module):
        monkeypatch.setattr(module, "plan_gradients", count)
    selection = select(make_network(), make_features(), [3, 11], 2, strategy)
    assert len(calls) == 1
    assert list(selection.seconds)[:3] == ["check inputs", "check gradients", "measure memory"]


def test_error_in_a_users_strategy_is_raised_unchanged():
    def failing(pool, budget):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        select(make_network(), make_features(), [3], 2, failing)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "a", "base": {"sede": 1}}, "sede: unknown key"),
        ({"base": {}}, "config.name: missing"),
        ({"name": "a", "grid": {"seed": []}}, "grid.seed: no values; give at least one"),
        (5, "config: is 5; expected a Config, a dictionary or the path of a sweep file"),
        ("missing.yaml", "missing.yaml: cannot be read"),
    ],
)
def test_bad_config_is_refused_before_anything_runs(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function in (fishermask.run, fishermask.sweep):
        with pytest.raises(InputError, match=message):
            function(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, "config.name: expected letters, digits .*, got 'a/b'"),
        ({"name": "a", "grid": {"seed": 3}}, "config.grid.seed: .*valid list, got 3"),
        ({"name": "a", "gird": {}}, "config.gird: unknown key; there are name, description, base, grid, output"),
    ],
)
def test_config_with_a_bad_value_is_one_line_that_names_it(settings, message):
    with pytest.raises(InputError, match=f"^{message}") as exception_info:
        fishermask.Config(**settings)
    assert "\n" not in str(exception_info.value)


def test_config_has_a_readable_signature():
    signature = inspect.signature(fishermask.Config)
    assert list(signature.parameters) == ["name", "description", "base", "grid", "output"]
    assert "Annotated" not in str(signature)
    config = fishermask.Config(name="a", grid={"seed": [1, 2]})
    assert (config.base, config.grid, config.output) == ({}, {"seed": [1, 2]}, "results")


def test_bad_options_of_a_run_are_refused():
    for option in ({"progress": "x"}, {"continue_anyway": 1}):
        with pytest.raises(InputError, match="expected True or False"):
            fishermask.run({"name": "a"}, **option)


def test_results_of_a_folder_without_results_are_refused(tmp_path):
    for value in (5, None):
        with pytest.raises(InputError, match=f"folder: is {value}; expected the path"):
            fishermask.read_results(value)
    with pytest.raises(InputError, match="holds no results"):
        fishermask.read_results(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        fishermask.read_results(tmp_path / "missing")
