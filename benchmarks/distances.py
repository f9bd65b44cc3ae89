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
from pools import local_pool, random_embedding
from table import machine, show

from fishermask.pool.selection import DistanceCriterion, greedy
from fishermask.tensors.distances import BadgeScorer, KCenterScorer

PICKS = 10


def ours(embedding, scorer, shards):
    """Seconds for ``PICKS`` picks and bytes of state, on ``shards`` shards in process."""
    pool = local_pool(embedding, shards)
    started = time.perf_counter()
    greedy(pool, DistanceCriterion(scorer, pool.scores_type), PICKS)
    seconds = time.perf_counter() - started
    fields = (embedding.probabilities, embedding.hidden)
    return seconds, sum(field.numel() * field.element_size() for field in fields) + 4 * embedding.hidden.shape[1]


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
    for name, select, scorer in (
        (
            "BADGE",
            lambda: badge.query(features, labels, classifier, fit_clf=False, batch_size=PICKS),
            BadgeScorer(0),
        ),
        (
            "k-center",
            lambda: coreset.query(features, labels, batch_size=PICKS),
            KCenterScorer(embedding.hidden[:, :1]),
        ),
    ):
        slow, peak = theirs(select)
        fast, used = ours(embedding, scorer, threads)
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
