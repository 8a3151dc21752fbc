"""Subsets to compare a subset with, of equal size, so that what made the difference can be told.

random          drawn from the pool that the rankings chose from: the baseline that active selection often fails to beat
                (arXiv 2604.02766).
bottom          the other end of the last ranking's order of that pool.
margin_matched  pairs the subset did not take whose margins are as near as possible to the subset's: with best against
                worst PVar is almost a function of the margin, and only this control tells the two apart.
length_matched  likewise by length_difference, chosen minus rejected.

Matching: the subset's pairs take turns, in a seeded random order, to take the nearest pair that is still free. Each
pair is taken once. How near they came is reported, because often nothing near is left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def matched(targets: Floats, candidates: Floats) -> Ints:
    """For each target in turn, the index of the nearest free candidate; [min(targets, candidates)].

    targets, candidates: finite values, in orders that say nothing. Of two equally near candidates the smaller value is
    taken; of equal values those above a target are taken from the first on, those below from the last.
    """
    position = np.argsort(candidates, kind="stable")
    values = candidates[position]
    places = np.searchsorted(values, targets, side="left")
    # Union-find over the sorted candidates: the next free place at or below, at or above. Index 0 and n + 1 are walls.
    n = len(values)
    below, above = list(range(n + 2)), list(range(n + 2))
    sorted_values = [-np.inf, *values.tolist(), np.inf]
    taken: list[int] = []
    for target, place in zip(targets.tolist()[:n], places.tolist(), strict=False):
        low, high = _find(below, place), _find(above, place + 1)
        if low == 0 or (high <= n and sorted_values[high] - target < target - sorted_values[low]):
            low = high
        taken.append(low - 1)
        below[low], above[low] = low - 1, low + 1
    return position[np.array(taken, dtype=np.int64)]


def _find(links: list[int], place: int) -> int:
    """The end of the links from a place, which are shortened on the way."""
    end = place
    while links[end] != end:
        end = links[end]
    while links[place] != end:
        links[place], place = end, links[place]
    return end


def close(targets: Floats, found: Floats, pool: Floats) -> float:
    """Share of matches within a fifth of the pool's standard deviation, the usual caliper; NaN without a match.

    targets: in the order given to `matched`; found: the values it took.
    """
    if not len(found):
        return float("nan")
    caliper = 0.2 * float(pool.std())
    return float(np.mean(np.abs(targets[: len(found)] - found) <= caliper + 1e-12))
