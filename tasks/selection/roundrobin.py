"""Win shares from a round robin of comparisons, each made in both orders.

With v[a, b] the points of a when shown first against b (1 won, 0 lost, 1/2 tie), a's score against b is
(v[a, b] + 1 - v[b, a]) / 2: a judge that always prefers the first place gives every comparison 1/2. The win share of a
sample is its mean score over its opponents, in [0, 1], equal texts among them with 1/2 each: the Borda count of the
sample, which for complete round robins orders samples as a Bradley-Terry fit does.

Position consistency is the share of a sample's comparisons whose verdict is the same in both orders. Equal texts are
not compared, so they do not count there.

Degenerate cases: a comparison that lacks one of its orders is left out; a sample with less than half of its
comparisons, or without an opponent, has no share; one whose opponents all equal it has share 1/2 and no consistency.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def win_shares(
    points: NDArray[np.float64], copies: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Win share and position consistency of each text, float arrays [texts], NaN where there is none.

    points: [texts, texts], v above, NaN where there is no verdict; the diagonal is not read.
    copies: [texts], how many samples have this text.
    """
    texts = len(copies)
    judged = np.isfinite(points) & np.isfinite(points.T) & ~np.eye(texts, dtype=bool)
    weights = judged * copies  # [text, opponent]
    scores = np.where(judged, (points + 1 - points.T) / 2, 0.0)
    same = judged & (points == 1 - points.T)
    compared = weights.sum(axis=1)
    asked = copies.sum() - copies
    equal = copies - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = ((weights * scores).sum(axis=1) + equal / 2) / (compared + equal)
        consistency = (weights * same).sum(axis=1) / compared
    shares[2 * compared < asked] = np.nan
    return shares, consistency
