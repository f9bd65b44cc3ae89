"""The greedy loop over shards: its batches, and their independence of the division of the pool."""

import copy

import cases
import pytest
import reference
import torch
from queries import choose
from torch import nn

from fishermask import query_strategies
from fishermask.config import ExperimentConfig, parse
from fishermask.experiment.loop import validate_batch
from fishermask.experiment.streams import stream
from fishermask.pool.blocks import BLOCK, shard_slices
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.ray_shards import RayShards
from fishermask.pool.selection import TraceOptions, best_candidate, minimize_trace
from fishermask.pool.shard import ScoredCandidate, Shard
from fishermask.pool.shards import LocalShards
from fishermask.tensors.distances import BadgeScorer
from fishermask.tensors.gradient_plan import GradientPlan, plan_gradients
from fishermask.tensors.images import Statistics, normalize
from fishermask.tensors.mask import fisher_diagonal, global_mask, last_layer_mask
from fishermask.tensors.precision import Precision

GRAY = Statistics((0.5,), (0.25,))


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def pool_of(images, model, labeled, shards=1):
    labels = torch.zeros(len(labeled), dtype=torch.long)
    local = LocalShards(images, GRAY, shards)
    return Pool(local, len(images), torch.tensor(labeled), labels, model, stream(0, "a"), stream(0, "b"))


def case(body_size):
    """Return a small network, 24 images, a mask, and the dense rows of the embeddings, [n, C, k]."""
    model, images = cases.model("small_cnn"), pixels(24)
    inputs = normalize(images, GRAY, torch.float64)
    plan = plan_gradients(model, inputs[:2])
    diagonal = fisher_diagonal(model, inputs, plan)
    mask = global_mask(diagonal, plan, body_size) if body_size else last_layer_mask(plan)
    columns, start = [reference.head_entries(model, plan.head)], 0
    for name, parameter in model.named_parameters():
        columns.append(mask.entries.get(name, torch.tensor([], dtype=torch.long)) + start)
        start += parameter.numel()
    return model, images, mask, reference.information_rows(model, inputs)[:, :, torch.cat(columns)]


@pytest.mark.parametrize(
    "options",
    [
        TraceOptions(damping=0.5),
        TraceOptions(damping=0.5, initial_information=False),
        TraceOptions(damping=0.5, batch_weighting="per_sample"),
        TraceOptions(damping=0.5, target="identity"),
        TraceOptions(damping=0.5, class_weighting="none"),
        TraceOptions(damping=0.5, oversample=2.0),
    ],
    ids=lambda options: str({k: v for k, v in vars(options).items() if v != getattr(TraceOptions(), k)}),
)
@pytest.mark.parametrize("body_size", [0, 25])
def test_batch_gains_and_objective_equal_dense_greedy(body_size, options):
    labeled, budget = [3, 4, 11, 20], 6
    model, images, mask, rows = case(body_size)
    pool = pool_of(images, model, labeled, shards=2)
    batch = minimize_trace(pool, mask, budget, options)

    if options.class_weighting == "none":
        with torch.no_grad():
            rows = rows / model(normalize(images, GRAY, torch.float64)).softmax(-1).sqrt()[:, :, None]
    every = torch.einsum("nck,ncl->nkl", rows, rows)
    # M = lambda I + n_L / (n_L + b) times the mean information of labeled images; candidates are scaled by
    # sqrt(w / (n_L + b)).
    total, eye = len(labeled) + budget, torch.eye(rows.shape[2], dtype=torch.float64)
    matrix = options.damping * eye
    if options.initial_information:
        matrix = matrix + len(labeled) / total * every[labeled].mean(0)
    target = every.mean(0) if options.target == "pool" else eye
    weight = budget if options.batch_weighting == "bait" else 1
    candidates = [i for i in range(len(images)) if i not in labeled]
    scale, count = (weight / total) ** 0.5, int(options.oversample * budget)
    expected = reference.greedy(rows, candidates, matrix, target, count, scale)
    gains, before = {}, reference.trace(matrix, target)
    for position in expected:
        value = reference.trace(matrix, target)
        matrix = matrix + scale**2 * every[position]
        gains[position] = value - reference.trace(matrix, target)
    while len(expected) > budget:
        values = [reference.trace(matrix - scale**2 * every[i], target) for i in expected]
        worst = expected.pop(min(range(len(values)), key=lambda i: values[i]))
        matrix = matrix - scale**2 * every[worst]
    assert batch.tolist() == expected
    assert pool.objective == pytest.approx((before, reference.trace(matrix, target)), rel=1e-6)
    assert pool.notes["objective"] == pool.objective[1]
    assert pool.gains.tolist() == pytest.approx([gains[position] for position in expected], rel=1e-6)


def test_pruning_from_float32_scores_equals_float64(trained):
    """With a small damping, pruning prefers directions with little information, where rounding errors are large."""
    setup, model = trained
    model = copy.deepcopy(model)
    with torch.no_grad():
        list(model.children())[-1].weight.mul_(4)  # predictions nearly certain
    count, results = 1500, []
    mask, labeled = (
        last_layer_mask(plan_gradients(model, setup.example_images(2))),
        setup.initial[setup.initial < count],
    )
    for scores in (torch.float32, torch.float64):
        shards, streams = (
            LocalShards(setup.data.train.images[:count], setup.statistics),
            (stream(0, "a"), stream(0, "b")),
        )
        engine, labels = Engine(Precision(scores=scores)), setup.data.train.labels[labeled]
        pool = Pool(shards, count, labeled, labels, model, *streams, engine=engine)
        batch = minimize_trace(pool, mask, 40, TraceOptions(damping=1e-3, oversample=2.0))
        results.append((set(batch.tolist()), pool.notes["objective"]))
        shards.close()
    (batch, value), (exact_batch, exact) = results
    assert len(batch & exact_batch) >= 39
    assert value == pytest.approx(exact, rel=1e-3)


def test_too_small_damping_raises_and_names_the_setting():
    model, images, mask, _ = case(25)
    with pytest.raises(FloatingPointError, match="strategy.params.damping: too small"):
        minimize_trace(pool_of(images, model, [3, 4]), mask, 2, TraceOptions(damping=1e-300))


def query(name, model, images, labeled, budget, shards=2):
    return choose_from(LocalShards(images, GRAY, shards), len(images), name, model, labeled, budget)


def choose_from(shards, size, name, model, labeled, budget):
    labels = torch.zeros(len(labeled), dtype=torch.long)
    pool = Pool(shards, size, torch.tensor(labeled), labels, model, stream(0, "a"), stream(0, "b"))
    config = parse(ExperimentConfig, {"strategy": name}).strategy
    return query_strategies.load(config).query(pool, budget).tolist()


def test_coreset_picks_the_image_furthest_from_all_centers():
    model, images, _, _ = case(0)
    labeled, chosen = [3, 11], []
    with torch.no_grad():
        hidden = model[:-1](normalize(images, GRAY, torch.float64))
    distances = torch.cdist(hidden, hidden, compute_mode="donot_use_mm_for_euclid_dist")
    for _ in range(8):
        centers = labeled + chosen
        remaining = [i for i in range(len(images)) if i not in centers]
        chosen.append(max(remaining, key=lambda i: (float(distances[i, centers].min()), -i)))
    assert query("coreset", model, images, labeled, 8) == chosen


@pytest.mark.parametrize("name", query_strategies.available())
def test_a_pool_of_float_features_needs_no_image_shape(name):
    """Contiguous and strided float vectors, and integers that the preprocessing function converts."""
    features = torch.randint(0, 50, (60, 6), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = []
    strategy = {"name": name, "params": {"fraction": 0.9, "fisher_samples": 32} if name == "fisher_mask" else {}}
    for pool_samples in (features.float(), features.float().t().contiguous().t(), features):
        shards = LocalShards(pool_samples, lambda samples, dtype: samples.contiguous().to(dtype), 2)
        batches.append(choose_from(shards, 60, strategy, model, [3, 11], 5))
        shards.close()
    assert batches[0] == batches[1] == batches[2]


@pytest.mark.parametrize(("name", "records"), [("badge", True), ("coreset", True), ("margin", False)])
def test_strategies_by_distance_record_a_gain_for_each_pick_and_no_objective(name, records):
    model, images, _, _ = case(0)
    pool = pool_of(images, model, [3, 11])
    query_strategies.load(parse(ExperimentConfig, {"strategy": name}).strategy).query(pool, 4)
    assert pool.objective is None
    assert (pool.gains is not None) == records
    if name == "coreset":
        assert pool.gains.tolist() == sorted(pool.gains.tolist(), reverse=True)


def test_badge_draws_in_proportion_to_the_squared_distance_of_dense_gradient_embeddings():
    model, images, _, _ = case(0)
    labeled, chosen = [3, 11], []
    inputs = normalize(images, GRAY, torch.float64)
    with torch.no_grad():
        hidden = torch.cat([model[:-1](inputs), torch.ones(len(images), 1, dtype=torch.float64)], dim=1)
        p = model(inputs).softmax(-1)
    residual = p - torch.nn.functional.one_hot(p.argmax(-1), p.shape[1])
    gradients = (residual[:, :, None] * hidden[:, None, :]).flatten(1)
    seed = int(torch.randint(2**31, (1,), generator=stream(0, "a")))
    for step in range(8):
        if step:
            nearest = torch.cdist(gradients, gradients[chosen], compute_mode="donot_use_mm_for_euclid_dist").amin(1)
            noise = torch.Generator().manual_seed(BadgeScorer(seed).noise_seed(step, 0))
            gumbel = -(-torch.rand(len(images), generator=noise, dtype=torch.float64).log()).log()
            score = nearest.square().log() + gumbel
        else:
            score = gradients.square().sum(1)
        remaining = [i for i in range(len(images)) if i not in labeled + chosen]
        chosen.append(max(remaining, key=lambda i, score=score: float(score[i])))
    assert query("badge", model, images, labeled, 8) == chosen


def test_badge_gains_draw_in_proportion_to_the_squared_distance():
    """Over many seeds, the frequency of each image is its share of the squared distances."""
    distances = torch.tensor([1.0, 2.0, 5.0, 0.0, 2.0], dtype=torch.float64)
    drawn = torch.bincount(
        torch.tensor([int(BadgeScorer(seed).gains(distances.clone(), 1, 0).argmax()) for seed in range(4000)]),
        minlength=5,
    )
    torch.testing.assert_close(drawn / 4000, distances.float() / 10, rtol=0, atol=0.03)


def test_pool_of_equal_images_gives_distinct_positions():
    model, images = cases.model("small_cnn"), pixels(1).expand(12, 1, 8, 8).contiguous()
    for name in query_strategies.available():
        params = {"fraction": 0.5} if name == "fisher_mask" else {}
        batch = query({"name": name, "params": params}, model, images, [0, 5], 10)
        assert sorted(batch) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_class_with_zero_probability_is_supported():
    """Its rows are zero, without a division by zero."""
    model, images = cases.model("mlp"), pixels(30)
    with torch.no_grad():
        model[-1].bias[2] = -2000.0
    for name in ("fisher_mask", "bait", "badge", "entropy"):
        params = {"fraction": 0.3} if name == "fisher_mask" else {}
        assert len(query({"name": name, "params": params}, model, images, [0], 5)) == 5


def test_narrow_parts_give_the_same_batch(monkeypatch):
    """Large masks store blocks in narrow parts."""
    model, images = cases.model("small_cnn"), pixels(900)
    plan = plan_gradients(model, normalize(images[:2], GRAY, torch.float64))
    mask = global_mask(fisher_diagonal(model, normalize(images[:20], GRAY, torch.float64), plan), plan, 25)
    expected = minimize_trace(pool_of(images, model, [3, 600], shards=1), mask, 8, TraceOptions(damping=0.5))
    monkeypatch.setattr("fishermask.pool.blocks.WIDE_BODY", 24)
    pool = pool_of(images, model, [3, 600], shards=1)
    assert minimize_trace(pool, mask, 8, TraceOptions(damping=0.5)).tolist() == expected.tolist()


def test_ties_go_to_the_lowest_position():
    """The pool contains two images, repeated over several blocks and shards."""
    pair = pixels(2)
    images = pair[torch.arange(2 * BLOCK + 6) % 2]
    model = cases.model("mlp")
    batch = minimize_trace(
        pool_of(images, model, [0, 1], shards=2), last_layer_mask(GradientPlan("5", (), ())), 6, TraceOptions()
    ).tolist()
    for kind in (0, 1):
        equal_images = [position for position in batch if position % 2 == kind]
        assert equal_images == list(range(2 + kind, 2 + kind + 2 * len(equal_images), 2))


def test_shard_slices_cover_the_pool_once_in_whole_blocks():
    for size in (1, 5, BLOCK, BLOCK + 1, 10 * BLOCK + 3):
        for count in (1, 2, 3, 7):
            slices = shard_slices(size, count)
            assert len(slices) == count
            assert [i for start, end in slices for i in range(start, end)] == list(range(size))
            assert all(start % BLOCK == 0 or start == end for start, end in slices)


def test_best_candidate_has_the_largest_gain_and_the_lowest_position():
    offers = [ScoredCandidate(1.0, 9, None), None, ScoredCandidate(2.0, 7, None), ScoredCandidate(2.0, 5, None)]
    assert best_candidate(offers).position == 5


def test_overflowing_model_raises():
    model = cases.model("mlp")
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 2).mul_(1e200).mul_(1e200)
    with pytest.raises(FloatingPointError, match="not finite"):
        minimize_trace(
            pool_of(pixels(10), model, [0]), last_layer_mask(GradientPlan("5", (), ())), 2, TraceOptions(damping=1.0)
        )


@pytest.mark.parametrize("batch", [[1, 2], [1, 2, 2], [1, 2, 7]])
def test_too_few_repeated_or_labeled_positions_of_a_strategy_raise(batch):
    with pytest.raises(RuntimeError, match="expected 3 distinct candidates"):
        validate_batch(torch.tensor(batch), torch.tensor([1, 2, 3]), 3)


@pytest.mark.parametrize("batch", [[1, 2, 3], torch.tensor([1.2, 2.0, 3.0]), torch.tensor([[1, 2, 3]])])
def test_batch_that_is_not_a_1d_integer_tensor_raises(batch):
    with pytest.raises(RuntimeError, match="expected a list, a range, an array or a tensor .b. of integers"):
        validate_batch(batch, torch.tensor([1, 2, 3]), 3)


@pytest.mark.parametrize("name", query_strategies.available())
def test_batch_does_not_depend_on_the_number_of_shards(name, trained, monkeypatch):
    monkeypatch.setattr("fishermask.pool.shard.BLOCK", 512)  # nine blocks: no shard of seven is empty
    setup, model = trained
    images = setup.data.train.images
    batches = [choose(name, LocalShards(images, setup.statistics, count), setup, model) for count in (1, 2, 3, 7)]
    assert batches[1:] == batches[:1] * 3


@pytest.mark.parametrize("count", [1, 3])
def test_ray_shards_give_the_batches_of_local_shards(count, trained, ray_session):
    """Run every strategy on the same actors."""
    setup, model = trained
    images, statistics = setup.data.train.images, setup.statistics
    shards = RayShards(images, statistics, count, 1, 0)
    for name in query_strategies.available():
        expected = choose(name, LocalShards(images, statistics), setup, model)
        assert choose(name, shards, setup, model, close=False) == expected, name
    shards.close()


def test_number_of_threads_neither_affects_the_batch_nor_changes(trained):
    setup, model = trained
    before, batches = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        batches.append(choose("bait", LocalShards(setup.data.train.images, setup.statistics, 2), setup, model))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert batches[0] == batches[1]


def test_uncertainty_strategies_equal_their_definitions(trained):
    setup, model = trained
    images, n = setup.data.train.images, len(setup.data.train.labels)
    with torch.no_grad():
        p = model.eval()(normalize(images[:], setup.statistics)).softmax(-1).double()
    ranked = p.sort(descending=True).values
    scores = {
        "margin": ranked[:, 0] - ranked[:, 1],
        "least_confidence": ranked[:, 0],
        "entropy": (p * p.clamp_min(1e-300).log()).sum(-1),
    }
    candidates = sorted(set(range(n)) - set(setup.initial.tolist()))
    for name, score in scores.items():
        expected = sorted(candidates, key=lambda i, score=score: float(score[i]))[:15]
        assert set(choose(name, LocalShards(images, setup.statistics), setup, model)) == set(expected)


def test_probabilities_do_not_depend_on_the_strides_of_images(trained):
    """A single channel may have any stride, and convolutions round differently for some strides."""
    setup, model = trained
    images = setup.data.train.images[:600]
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    results = []
    for pool_images in (images, strided):
        shards = LocalShards(pool_images, setup.statistics)
        shards.call(Shard.set_model, model, Precision())
        results.append(shards.call(Shard.probabilities, 0, 1)[0])
        shards.close()
    assert torch.equal(*results)


def test_shards_embed_in_eval_mode(trained):
    """A model in training mode is copied, and its own mode does not change."""
    setup, _ = trained
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 26 * 26, 10)).train()
    shards = LocalShards(setup.data.train.images[:20], setup.statistics)
    shards.call(Shard.set_model, model, Precision())
    shards.call(Shard.store_embeddings, 0, 1, last_layer_mask(GradientPlan("3", (), ())), "sqrt", None, 128)
    assert not shards.shards[0].model.training
    assert model.training
    shards.close()
