"""Particulars of the libraries: settings of LightGBM, and the Hessian of XGBoost."""

from __future__ import annotations

import functools
import json
import sys
from concurrent import futures

import numpy as np

READS_PROBABILITIES = {
    "binary", "binary_logloss", "binary_error", "cross_entropy", "xentropy", "kullback_leibler", "kldiv",
    "multiclass", "multi_logloss", "softmax", "multiclassova", "multiclass_ova", "ova", "ovr",
}  # fmt: skip
"""Metrics of LightGBM that need its own objective."""
BALANCING = {
    "scale_pos_weight": ("none", "1", "1.0"),
    **dict.fromkeys(("is_unbalance", "unbalance", "unbalanced_sets"), ("none", "false", "0")),
}
"""Settings of LightGBM that belong to its own objective, and the values that change nothing there."""


def xgboost_curvature() -> float | None:
    """The factor by which XGBoost multiplies `q (1 - q)` of softmax; None if its Hessian is `|q - y|`."""
    return measured_curvature() if "xgboost" in sys.modules else 2.0


@functools.cache
def measured_curvature() -> float | None:
    def covers() -> list[float]:
        xgboost = sys.modules["xgboost"]
        settings = {"objective": "multi:softprob", "num_class": 3, "base_score": 0.5, "nthread": 1}
        booster = xgboost.train(settings, xgboost.DMatrix(np.zeros((1, 1)), label=[0.0]), 1)
        return [json.loads(tree)["cover"] for tree in booster.get_dump(with_stats=True, dump_format="json")]

    # XGBoost keeps distributed training per thread. In another thread this training waits for no worker.
    with futures.ThreadPoolExecutor(1) as thread:
        own, other, _ = thread.submit(covers).result()
    # At probabilities of 1/3, `q (1 - q)` is equal for all classes, and `|q - y|` is larger for the label.
    return 2.0 if own < 1.5 * other else None
