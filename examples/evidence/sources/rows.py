"""Rows of numbers and names, as inputs and classes, and their random splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from harness import Data, Part

TRAINING, VALIDATION = 0.5, 0.2
MOST_LEVELS = 100
MISSING = "?"

Floats = npt.NDArray[np.float64]


class Rows(NamedTuple):
    """Columns of numbers (n,), nan where one is missing, or of names (n,); and the classes' names (n,)."""

    columns: list[npt.NDArray[Any]]
    labels: npt.NDArray[Any]


class Source(NamedTuple):
    """A data set to be read.

    Args:
        kind: Which sets it is compared with.
        family: What it is a version of.
        name: Its own name.
        load: Reads it.
    """

    kind: str
    family: str
    name: str
    load: Callable[[], Rows]


def encode(rows: Rows, most_rows: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Inputs (n, d), nan where a number is missing, and classes (n,) from 0.

    A name becomes a column of 0 and 1, and a missing name counts as a name. Of a column with more than
    `MOST_LEVELS` names the most frequent ones have columns. Of more than `most_rows` rows as many are drawn.
    """
    labels = rows.labels
    chosen: Any = slice(None)
    if len(labels) > most_rows:
        chosen = np.random.default_rng(0).permutation(len(labels))[:most_rows]
    inputs: list[Floats] = []
    for column in (column[chosen] for column in rows.columns):
        if column.dtype.kind == "f":
            inputs.append(column)
        else:
            frequent = Counter(sorted(column.tolist())).most_common(MOST_LEVELS)
            inputs += [(column == level).astype(np.float64) for level in sorted(name for name, _ in frequent)]
    return np.stack(inputs, 1), np.unique(labels[chosen], return_inverse=True)[1].astype(np.int64)


def split(seed: int, inputs: Floats, target: npt.NDArray[np.int64]) -> Data:
    """A random split, alike in each class, with inputs scaled by the training rows; missing ones are 0."""
    random = np.random.default_rng([31, seed])
    parts: list[list[npt.NDArray[np.intp]]] = [[], [], []]
    for label in range(target.max() + 1):
        rows = random.permutation(np.flatnonzero(target == label))
        ends = [round(TRAINING * len(rows)), round((TRAINING + VALIDATION) * len(rows))]
        for part, some in zip(parts, np.split(rows, ends), strict=True):
            part.append(some)
    training, *_ = (np.concatenate(part) for part in parts)
    seen = inputs[training]
    count = np.maximum(np.isfinite(seen).sum(0), 1)  # a column may be missing in every training row
    mean = np.nansum(seen, 0) / count
    deviation = np.sqrt(np.nansum((seen - mean) ** 2, 0) / count)
    # The deviation of a column of equal numbers may come out as 1e-17 instead of 0.
    deviation[deviation <= 1e-9 * np.abs(mean)] = 0
    scaled = np.nan_to_num((inputs - mean) / np.where(deviation > 0, deviation, 1.0))
    return Data(
        *(
            Part(
                torch.tensor(scaled[rows], dtype=torch.float32),
                torch.tensor(target[rows]),
                torch.zeros(len(rows)),
            )
            for rows in map(np.concatenate, parts)
        )
    )
