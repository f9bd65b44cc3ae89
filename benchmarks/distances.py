"""Time and memory of BADGE and k-center, compared with scikit-activeml in the same process.

    pip install 'fishermask[benchmarks]'
    python benchmarks/distances.py

20,000 candidates, 100 classes, 768 features, 10 picks. scikit-activeml forms the n x (C E) gradient embedding. Its time
and memory are proportional to the number of candidates, so it is measured on a part of them and scaled.
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


def measure_fishermask(embedding, scorer, shards):
    """Return the seconds of ``PICKS`` picks and the bytes of state, on local shards."""
    pool = local_pool(embedding, shards)
    started = time.perf_counter()
    greedy(pool, DistanceCriterion(scorer, pool.scores_type), PICKS)
    seconds = time.perf_counter() - started
    fields = (embedding.probabilities, embedding.hidden)
    return seconds, sum(field.numel() * field.element_size() for field in fields) + 4 * embedding.hidden.shape[1]


def measure_numpy(select):
    """Return the seconds of ``select`` and the peak bytes of NumPy's allocations."""
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

    class FixedPredictions(ClassifierMixin, BaseEstimator):
        """A classifier that returns stored predictions in the order of the candidates."""

        def fit(self, X, y):
            self.classes_ = np.arange(num_classes)
            return self

        def predict_proba(self, X):
            return probabilities[: len(X)]

    labels = np.full(part, np.nan)
    labels[0] = 0
    classifier = SklearnClassifier(FixedPredictions(), classes=np.arange(num_classes)).fit(features, labels)
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
        slow, peak = measure_numpy(select)
        fast, used = measure_fishermask(embedding, scorer, threads)
        share = n / part
        rows.append(
            [name, slow * share, fast, slow * share / fast, peak * share / 1e6, used / 1e6, peak * share / used]
        )
    show(
        f"{PICKS} picks of n = {n:,}, C = {num_classes}, E = {width}; scikit-activeml on {part:,}, scaled. {machine()}",
        ["method", "scikit-activeml s", "fishermask s", "ratio", "scikit-activeml MB", "fishermask MB", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
