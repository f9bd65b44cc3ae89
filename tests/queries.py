"""A query of a strategy on the pool of the ``trained`` fixture."""

from fishermask import query_strategies
from fishermask.config import ExperimentConfig, parse
from fishermask.experiment.loop import validate_batch
from fishermask.experiment.streams import stream
from fishermask.pool.pool import Pool


def choose(name, shards, setup, model, budget=15, engine=None, notes=lambda notes: None, progress=None, close=True):
    """Return the batch as a list of positions; call ``notes`` with the notes of the pool."""
    params = {"fraction": 0.03, "fisher_samples": 256} if name == "fisher_mask" else {}
    train = setup.data.train
    pool = Pool(
        shards,
        len(train.labels),
        setup.initial,
        train.labels[setup.initial],
        model.cpu(),
        stream(0, "strategy"),
        stream(0, "sample"),
        progress or (lambda *_: None),
        engine,
    )
    config = parse(ExperimentConfig, {"strategy": {"name": name, "params": params}}).strategy
    batch = query_strategies.load(config).query(pool, budget)
    if close:
        shards.close()
    notes(pool.notes)
    return validate_batch(batch, pool.candidates, budget).tolist()
