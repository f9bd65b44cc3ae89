"""Every parameter of every query strategy, against batches that ``oracle`` predicts without our code.

A parameter that is ignored would go unnoticed where two of its values give the same batch, so the values are chosen
such that all batches differ.
"""

import copy
import functools

import oracle
import pytest
import torch
import torchvision
from torch import nn

from fishermask import query_strategies
from fishermask.config import StrategyConfig
from fishermask.errors import InputError
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.shards import LocalShards
from fishermask.query_strategies import fisher_mask
from fishermask.tensors.distances import BadgeScorer
from fishermask.tensors.images import Statistics

SIZE, LABELED, BUDGET = 40, [3, 4, 11, 20], 6
STRATEGY_SEED, SAMPLE_SEED = 5, 6


@functools.cache
def network() -> nn.Module:
    """Return a convolution, a linear layer and a last layer with 30, 52 and 20 parameters, in float64."""
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 3, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 4)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)  # predictions that differ from image to image
    return model


@functools.cache
def images() -> torch.Tensor:
    """Return noise of varying brightness and contrast, uint8 [n, 1, 8, 8]."""
    generator = torch.Generator().manual_seed(8)
    center, contrast = (torch.rand(SIZE, 1, 1, 1, generator=generator) for _ in range(2))
    noise = torch.rand(SIZE, 1, 8, 8, generator=generator) - 0.5
    return (255 * (center + contrast * noise)).clamp(0, 255).to(torch.uint8)


def inputs() -> torch.Tensor:
    return (images().double() / 255 - 0.5) / 0.25


@functools.cache
def scores() -> oracle.Scores:
    return oracle.Scores(network(), inputs())


def pool(strategy_seed=STRATEGY_SEED, sample_seed=SAMPLE_SEED, labeled=LABELED, engine=None) -> Pool:
    return Pool(
        LocalShards(images(), Statistics((0.5,), (0.25,)), 2),
        SIZE,
        torch.tensor(labeled),
        torch.zeros(len(labeled), dtype=torch.long),
        network(),
        torch.Generator().manual_seed(strategy_seed),
        torch.Generator().manual_seed(sample_seed),
        engine=engine,
    )


def select_batch(name, params, **pool_settings) -> list[int]:
    strategy = query_strategies.load(StrategyConfig(name=name, params=params))
    return strategy.query(pool(**pool_settings), BUDGET).tolist()


BASE = {"fraction": 0.3, "fisher_samples": 12, "damping": 0.03}


def expected_mask(params, strategy_seed=STRATEGY_SEED, sample_seed=SAMPLE_SEED) -> list[int]:
    """Return the masked positions outside the last layer, as documented for ``params``."""
    count = params.get("fisher_samples", 1024)
    sample = torch.randperm(SIZE, generator=torch.Generator().manual_seed(sample_seed)).tolist()[:count]
    if params.get("fisher_sample") == "first":
        sample = list(range(min(count, SIZE)))
    draws = torch.Generator().manual_seed(strategy_seed)
    size = oracle.body_size(scores(), params["fraction"], params.get("num_body_parameters") or 1024)
    return oracle.masked_body(scores(), size, params.get("mask", "global"), sample, draws)


OBJECTIVE = ("damping", "initial_information", "batch_weighting", "target", "oversample")


def expected(params, body, labeled=LABELED) -> list[int]:
    """Return the batch, as documented for ``params`` and the masked positions ``body``."""
    columns = scores().last_layer + body
    weighting = params.get("class_weighting", "sqrt")
    each = oracle.information(scores(), columns, weighting, params.get("top_classes"))
    settings = {key: value for key, value in params.items() if key in OBJECTIVE}
    return oracle.trace_batch(each, labeled, BUDGET, **settings)


MASKS = {
    "base": {},
    "smaller fraction": {"fraction": 0.25},
    "larger fraction": {"fraction": 0.6},
    "rounded up": {"fraction": 34.6 / 102},
    "nine parameters": {"fraction": None, "num_body_parameters": 9},
    "default number, more than there are": {"fraction": None},
    "layerwise": {"mask": "layerwise"},
    "relative, the largest": {"mask": "relative"},
    "relative, all above the threshold": {"mask": "relative", "fraction": 0.6},
    "random": {"mask": "random"},
    "last layer": {"mask": "last_layer"},
    "few samples": {"fisher_samples": 2},
    "more samples than images": {"fisher_samples": 1024},
    "first samples": {"fisher_sample": "first"},
}
OBJECTIVES = {
    "small damping": {"damping": 0.001},
    "large damping": {"damping": 3.0},
    "no initial information": {"initial_information": False},
    "no class weights": {"class_weighting": "none"},
    "two classes": {"top_classes": 2},
    "three classes": {"top_classes": 3},
    "weight of one image": {"batch_weighting": "per_sample"},
    "all directions": {"target": "identity"},
    "one more, by rounding up": {"damping": 0.001, "oversample": 6.1 / 6},
    "two more, by rounding up": {"damping": 0.001, "oversample": 7.1 / 6},
    "twice as many": {"damping": 0.001, "oversample": 2.0},
}


def masked_positions(mask) -> list[int]:
    """Return the masked positions outside the last layer as indices into all parameters."""
    positions, start = [], 0
    for name, parameter in network().named_parameters():
        positions += [start + i for i in mask.entries.get(name, torch.tensor([])).tolist()]
        start += parameter.numel()
    return positions


@pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)
def test_fisher_mask_gives_the_mask_and_batch_of_the_oracle(change):
    body = expected_mask(BASE | change)
    params = query_strategies.load(StrategyConfig(name="fisher_mask", params=BASE | change)).params
    assert masked_positions(fisher_mask.choose_mask(pool(), params)) == body
    assert select_batch("fisher_mask", BASE | change) == expected(BASE | change, body)


@pytest.mark.parametrize("params", [{"num_body_parameters": 0}, {"mask": "last_layer"}], ids=str)
def test_a_mask_of_the_last_layer_needs_no_fraction(params):
    chosen = query_strategies.load(StrategyConfig(name="fisher_mask", params=params)).params
    assert masked_positions(fisher_mask.choose_mask(pool(), chosen)) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fraction": 0.3, "num_body_parameters": 5}, "both set the size of the mask"),
        ({"num_body_parameters": None}, "set num_body_parameters or fraction"),
        ({"num_body_parameters": -1}, "strategy.params.num_body_parameters"),
    ],
)
def test_the_size_of_the_mask_is_set_exactly_once(params, message):
    with pytest.raises(InputError, match=message):
        query_strategies.load(StrategyConfig(name="fisher_mask", params=params))


@pytest.mark.parametrize("params", [{}, {"fraction": 0.5}, {"mask": "last_layer"}], ids=str)
def test_parameters_with_their_defaults_written_out_are_accepted(params):
    loaded = query_strategies.load(StrategyConfig(name="fisher_mask", params=params)).params
    assert query_strategies.load(StrategyConfig(name="fisher_mask", params=loaded.model_dump())).params == loaded


@pytest.mark.parametrize("kind", ["global", "layerwise", "relative", "random"])
@pytest.mark.parametrize("size", [{}, {"num_body_parameters": 12}, {"fraction": 0.5}, {"fraction": 1.0}], ids=str)
def test_frozen_parameters_are_never_masked_and_do_not_count(kind, size):
    frozen = pool()
    frozen.model = copy.deepcopy(network())
    frozen.model[0].requires_grad_(False)  # 30 of 102 parameters; 52 of the trained ones are outside the last layer
    chosen = query_strategies.load(StrategyConfig(name="fisher_mask", params={"mask": kind, **size})).params
    mask = fisher_mask.choose_mask(frozen, chosen)
    assert set(mask.entries) <= {"3.weight", "3.bias"}
    expected_size = {"{}": 52, "{'num_body_parameters': 12}": 12, "{'fraction': 0.5}": 16, "{'fraction': 1.0}": 52}
    assert mask.body_size == expected_size[str(size)] or (kind == "relative" and 0 < mask.body_size <= 52)


def test_the_default_mask_of_resnet18_fits_in_memory():
    """A mask of 1 % of its parameters would need 654 GB."""
    model = torchvision.models.resnet18(num_classes=10).eval()
    strategy = query_strategies.load(StrategyConfig(name="fisher_mask"))
    work = strategy.check(model, torch.rand(2, 3, 32, 32))
    assert work.body_size == 1024
    columns = 9 * 513 + work.body_size  # the last layer without one class, and the body
    assert 3 * 8 * columns**2 < 1e9  # bytes of three matrices


@pytest.mark.parametrize("change", OBJECTIVES.values(), ids=OBJECTIVES)
def test_fisher_mask_gives_the_batch_of_the_oracle_for_each_objective(change):
    assert select_batch("fisher_mask", BASE | change) == expected(BASE | change, expected_mask(BASE))


def test_masks_and_batches_of_the_cases_differ():
    """Otherwise the tests above would not detect a parameter that is ignored."""
    masks = {name: tuple(expected_mask(BASE | change)) for name, change in MASKS.items()}
    assert len(set(masks.values())) == len(MASKS)
    changes = MASKS | OBJECTIVES
    batches = {name: tuple(expected(BASE | change, expected_mask(BASE | change))) for name, change in changes.items()}
    assert len(set(batches.values())) == len(batches)


@pytest.mark.parametrize(
    "params",
    [
        BASE | {"preset": "fishermask-released"},
        BASE | {"preset": "fishermask-released", "class_weighting": "sqrt"},
        BASE | {"preset": "fishermask-released", "fisher_sample": "random"},
    ],
    ids=["preset", "weights given", "sample given"],
)
def test_preset_gives_the_batch_of_its_options(params):
    released = {"class_weighting": "none", "fisher_sample": "first"} | params
    assert select_batch("fisher_mask", params) == expected(released, expected_mask(released))
    assert select_batch("fisher_mask", params) != select_batch("fisher_mask", BASE)


def test_fisher_sample_and_random_mask_use_their_streams():
    for seed in (6, 7, 8):
        params = query_strategies.load(StrategyConfig(name="fisher_mask", params=BASE | {"fisher_samples": 2})).params
        mask = fisher_mask.choose_mask(pool(sample_seed=seed), params)
        assert masked_positions(mask) == expected_mask(params.model_dump(), sample_seed=seed)
    for seed in (5, 9, 10):
        params = query_strategies.load(StrategyConfig(name="fisher_mask", params=BASE | {"mask": "random"})).params
        mask = fisher_mask.choose_mask(pool(strategy_seed=seed, sample_seed=seed + 50), params)
        assert masked_positions(mask) == expected_mask(params.model_dump(), strategy_seed=seed)
    two_samples = BASE | {"fisher_samples": 2}
    assert len({tuple(expected_mask(two_samples, sample_seed=seed)) for seed in (6, 7, 8)}) == 3
    assert len({tuple(expected_mask(BASE | {"mask": "random"}, strategy_seed=seed)) for seed in (5, 9, 10)}) == 3


BAIT = {
    "default": {},
    "small damping": {"damping": 0.001},
    "large damping": {"damping": 10.0},
    "one more, by rounding up": {"damping": 0.001, "oversample": 6.1 / 6},
    "twice as many": {"damping": 0.001, "oversample": 2.0},
    "two classes": {"top_classes": 2},
    "three classes": {"top_classes": 3},
}


@pytest.mark.parametrize("params", BAIT.values(), ids=BAIT)
def test_bait_gives_the_batch_of_the_oracle(params):
    assert select_batch("bait", params) == expected(params, [])


def test_batches_of_the_bait_cases_differ():
    assert len({tuple(expected(params, [])) for params in BAIT.values()}) == len(BAIT)


@pytest.mark.parametrize("name", ["bait", "fisher_mask"])
def test_objective_includes_all_labeled_images(name):
    params, body = ({}, []) if name == "bait" else (BASE, expected_mask(BASE))
    for labeled in ([7], [0, 1, 2, 5, 6, 8, 9, 30, 31]):
        assert select_batch(name, params, labeled=labeled) == expected(params, body, labeled)


def test_pruning_recomputes_the_objective_when_its_error_exceeds_drift():
    params = BASE | {"damping": 0.001, "oversample": 2.0}
    counts = []
    for drift in (0.0, 1e9):
        query_pool = pool(engine=Engine(drift=drift))
        batch = (
            query_strategies.load(StrategyConfig(name="fisher_mask", params=params)).query(query_pool, BUDGET).tolist()
        )
        assert batch == expected(params, expected_mask(params))
        counts.append(query_pool.notes.get("objective recomputations", 0))
    assert counts == [BUDGET - 1, 0]  # six images are pruned; the objective after the last is always exact


def test_every_strategy_parameter_has_a_case():
    """A new parameter needs a case here."""
    varied = {key for change in [BASE, *MASKS.values(), *OBJECTIVES.values()] for key in change}
    assert varied | {"preset"} == set(fisher_mask.Params.model_fields)
    assert {key for change in BAIT.values() for key in change} == set(query_strategies.describe("bait")[1].model_fields)
    without = set(query_strategies.available()) - {"bait", "fisher_mask"}
    assert {name for name in without if query_strategies.describe(name)[1].model_fields} == set()


def hidden() -> torch.Tensor:
    """Return the inputs of the last layer with a one for the bias, [n, 5]."""
    with torch.no_grad():
        return torch.cat([network()[:-1](inputs()), torch.ones(SIZE, 1, dtype=torch.float64)], dim=1)


def test_badge_noise_depends_on_stream_step_and_block(monkeypatch):
    monkeypatch.setattr("fishermask.pool.shard.BLOCK", 16)  # the pool has three blocks, in two shards
    batches = []
    for seed in (1, 2, 3):
        draws = torch.Generator().manual_seed(seed)
        batches.append(oracle.badge_batch(scores().p, hidden(), LABELED, BUDGET, draws, block=16))
        assert select_batch("badge", {}, strategy_seed=seed) == batches[-1]
    assert len(set(map(tuple, batches))) == 3


def test_badge_noise_of_different_seeds_steps_and_blocks_is_uncorrelated():
    draws = {}
    for seed, step, first in [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 2048), (1, 3, 2048)]:
        equal = torch.ones(2000, dtype=torch.float64)
        draws[seed, step, first] = BadgeScorer(seed).gains(equal, step, first)
    correlation = torch.corrcoef(torch.stack(list(draws.values())))
    assert (correlation - torch.eye(5, dtype=torch.float64)).abs().max() < 0.1  # 0.022 is one standard deviation


def test_coreset_starts_from_all_labeled_images():
    for labeled in ([7], LABELED):
        centers, chosen = list(labeled), []
        for _ in range(BUDGET):
            nearest = torch.stack([(hidden() - hidden()[i]).square().sum(1) for i in centers]).amin(0)
            chosen.append(int(nearest.argmax()))
            centers.append(chosen[-1])
        assert select_batch("coreset", {}, labeled=labeled) == chosen


def test_random_takes_the_first_candidates_of_a_permutation():
    candidates = [i for i in range(SIZE) if i not in LABELED]
    for seed in (1, 2):
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
        assert select_batch("random", {}, strategy_seed=seed) == [candidates[i] for i in order[:BUDGET]]


@pytest.mark.parametrize("name", ["entropy", "least_confidence", "margin"])
def test_uncertainty_strategies_return_images_in_order(name):
    certainty = []
    for p in scores().p.tolist():
        first, second, *_ = sorted(p, reverse=True)
        entropy = -sum(value * torch.tensor(value).log().item() for value in p)
        certainty.append({"entropy": -entropy, "least_confidence": first, "margin": first - second}[name])
    candidates = [i for i in range(SIZE) if i not in LABELED]
    assert select_batch(name, {}) == sorted(candidates, key=lambda i: certainty[i])[:BUDGET]
