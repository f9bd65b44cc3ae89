"""BADGE and k-center through the greedy loop, against scikit-activeml in the same run.

    pip install 'fishermask[benchmarks]'
    python benchmarks/distances.py

20,000 candidates, 100 classes, 768 features. scikit-activeml forms the n x (C E) gradient embedding and is timed on a
part of the candidates, which its time and memory grow with in proportion; both choose 10.
"""

import argparse
import time
import tracemalloc

import numpy as np
import torch
from greedy import random_embedding
from table import machine, show

from fishermask.pool.selection import best_offer
from fishermask.pool.shard import cut
from fishermask.pool.shards import LocalShards
from fishermask.tensors.distances import BadgeScorer, KCenterScorer
from fishermask.tensors.embedding import Embedding, take
from fishermask.tensors.images import Statistics

PICKS = 10


def ours(embedding, scorer, update, threads):
    """Seconds for ``PICKS`` picks and bytes of state, on ``threads`` shards in process."""
    n = embedding.probabilities.shape[1]
    shards = LocalShards(torch.from_numpy(np.zeros((n, 1, 1, 1), np.uint8)), Statistics((0.5,), (0.5,)), threads)
    for shard, (start, end) in zip(shards.shards, cut(n, threads), strict=True):
        shard.parts = [slice(block.start, block.stop) for block in shard.blocks]
        whole = take(embedding, slice(start, end))
        shard.embeddings = [Embedding(*(f.contiguous() for f in take(whole, part))) for part in shard.parts]
    started = time.perf_counter()
    offers = shards.call("start_selection", scorer, torch.arange(n))
    for pick in range(PICKS):
        best = best_offer(offers)
        offers = shards.call("advance", update(best, pick), best.position)
    seconds = time.perf_counter() - started
    fields = sum(field.numel() * field.element_size() for field in embedding[:3])
    return seconds, fields + n * 4


def theirs(select):
    """Seconds and peak bytes of numpy's allocations."""
    tracemalloc.start()
    started = time.perf_counter()
    select()
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=1000, help="candidates given to scikit-activeml (%(default)s)")
    arguments = parser.parse_args()
    from skactiveml.classifier import SklearnClassifier
    from skactiveml.pool import Badge, CoreSet
    from sklearn.base import BaseEstimator, ClassifierMixin

    n, num_classes, width, threads = 20_000, 100, 768, torch.get_num_threads()
    embedding = random_embedding(n, num_classes, width, 0)
    part = arguments.part
    features = embedding.hidden[:, :part].T.double().numpy()
    probabilities = embedding.probabilities[:, :part].T.double().numpy()

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose predictions are given, in the order of the candidates."""

        def fit(self, X, y):
            self.classes_ = np.arange(num_classes)
            return self

        def predict_proba(self, X):
            return probabilities[: len(X)]

    labels = np.full(part, np.nan)
    labels[0] = 0
    classifier = SklearnClassifier(Given(), classes=np.arange(num_classes)).fit(features, labels)
    badge = Badge(random_state=0)
    coreset = CoreSet(random_state=0)
    rows = []
    for name, select, scorer, update in (
        (
            "BADGE",
            lambda: badge.query(features, labels, classifier, fit_clf=False, batch_size=PICKS),
            BadgeScorer(0),
            lambda offer, pick: (offer.embedding, pick == 0),
        ),
        (
            "k-center",
            lambda: coreset.query(features, labels, batch_size=PICKS),
            KCenterScorer(embedding.hidden[:, :1]),
            lambda offer, pick: offer.embedding,
        ),
    ):
        slow, peak = theirs(select)
        fast, used = ours(embedding, scorer, update, threads)
        share = n / part
        rows.append(
            [name, slow * share, fast, slow * share / fast, peak * share / 1e6, used / 1e6, peak * share / used]
        )
    show(
        f"{PICKS} picks of n = {n:,}, C = {num_classes}, E = {width}; scikit-activeml on {part:,}, scaled. {machine()}",
        ["method", "scikit-activeml s", "ours s", "ratio", "scikit-activeml MB", "ours MB", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
