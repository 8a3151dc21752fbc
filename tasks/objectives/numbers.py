"""Numbers of the whole training set, as the objectives' `columns` read them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.errors import ConfigError

Floats = NDArray[np.float64]
Data = Mapping[str, ArrayLike]


def column(data: Data, name: str) -> Floats:
    """One number per pair. ConfigError where there is no such column, or where pairs have no number in it."""
    if name not in data:
        raise ConfigError(f"train: the objective goes by {name!r}, which the subset does not have")
    values = np.asarray(data[name], np.float64)
    missing = int((~np.isfinite(values)).sum())
    if missing:
        raise ConfigError(
            f"train: {missing} of {len(values)} pairs have no {name!r}, which the objective goes by; "
            f"score them, leave them out of the subset, or take an objective that needs none"
        )
    return values


def percentiles(values: Floats) -> Floats:
    """Rank of each value, scaled to [0, 1]; ties share the mean of their ranks, so values all equal have 1/2."""
    if len(values) < 2:
        return np.full(len(values), 0.5)
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts + 1) / 2
    return ranks[at] / (len(values) - 1)
