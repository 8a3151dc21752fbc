"""Which pairs a step of a subset takes: those in a range, or one end of an order; ties fall by a seeded hash.

Integer ratings and verifiers tie often; a tie broken by position would favour whatever came first in the input. The
hash of (prompt id, seed) is the same on every machine, so the same pairs are taken. `random` is that hash alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def order(values: Floats, ids: Hashes, seed: int, keep: str = "top") -> Ints:
    """Row numbers from first to last taken; rows whose value is NaN are left out.

    values: [pairs]; ids: 64 bits of their prompts' ids; keep: "top" takes large values first, "bottom" small ones.
    """
    rows = np.flatnonzero(~np.isnan(values))
    ordered = rows[np.argsort(values[rows])]
    same = values[ordered[1:]] == values[ordered[:-1]]
    tied = np.zeros(len(ordered), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    among = ordered[tied]
    ordered[tied] = among[np.lexsort((hashes(ids[among], seed), values[among]))]
    return ordered[::-1] if keep == "top" else ordered  # so that top and bottom share no tied row before they must


def best(values: Floats, ids: Hashes, seed: int, number: int, keep: str = "top") -> Ints:
    """The first `number` rows of `order`, without sorting the others. values: without NaN."""
    if number >= len(values) or number <= 0:
        return order(values, ids, seed, keep)[: max(0, number)]
    signed = values if keep == "top" else -values
    cut = np.partition(signed, len(values) - number)[len(values) - number]
    inside, tied = np.flatnonzero(signed > cut), np.flatnonzero(signed == cut)
    of_tied = tied[order(np.zeros(len(tied)), ids[tied], seed, keep)][: number - len(inside)]
    rows = np.concatenate([inside, of_tied])
    return rows[order(values[rows], ids[rows], seed, keep)]


def hashes(ids: Hashes, seed: int) -> Hashes:
    """A uniform 64-bit number per id, for a seed. ids: 64 bits of a digest. (The finaliser of splitmix64.)"""
    with np.errstate(over="ignore"):
        mixed = ids + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def uniform(ids: Hashes, columns: int, seed: int) -> Floats:
    """Draws in [0, 1), [ids, columns]: for a seed, each id has its own, whatever stands around it."""
    keys = hashes(ids, seed)
    draws = np.stack([hashes(keys, column) for column in range(columns)], axis=1)
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def size(available: int, fraction: float | None, count: int | None) -> int:
    """How many of the available pairs to take: a share, rounded, but at least one; or a number, at most all."""
    if fraction is not None:
        return min(available, max(1, round(available * fraction)))
    assert count is not None
    return min(available, count)


def within_budget(tokens: Ints, budget: float) -> int:
    """How many pairs from the front fit a budget of tokens. tokens: of each pair, in the order of taking."""
    return int(np.searchsorted(np.cumsum(tokens), budget, side="right"))


def shares(sizes: dict[str, int], total: int, quotas: dict[str, float]) -> dict[str, int]:
    """How many of `total` each stratum gives: its quota of it, or its share of all pairs; at most what it has.

    Whole numbers by largest remainder, so that they add up to what the quotas add up to. Without quotas, what a small
    stratum cannot give is not asked of others: a stratum's share stays what it is.
    """
    whole = sum(sizes.values())
    wanted = {s: total * (quotas.get(s, 0.0) if quotas else n / whole) for s, n in sizes.items()}
    given = {s: int(np.floor(w + 1e-9)) for s, w in wanted.items()}
    left = round(sum(wanted.values())) - sum(given.values())
    for stratum in sorted(wanted, key=lambda s: (given[s] - wanted[s], s))[: max(0, left)]:
        given[stratum] += 1
    return {s: min(n, sizes[s]) for s, n in given.items()}


def in_range(
    values: Floats, low: float | None, high: float | None, within: float | None, quantiles: tuple[float, float] | None
) -> NDArray[np.int8]:
    """Per pair 0 (kept), -1 (below), 1 (above) or 2 (no value). All bounds hold at once, and are themselves inside."""
    low, high = (-np.inf if low is None else low), (np.inf if high is None else high)
    if within is not None:
        low, high = max(low, -within), min(high, within)
    if quantiles is not None and not np.isnan(values).all():
        bottom, top = np.nanquantile(values, quantiles)
        low, high = max(low, float(bottom)), min(high, float(top))
    side = np.where(values < low, -1, np.where(values > high, 1, 0))
    return np.where(np.isnan(values), 2, side).astype(np.int8)
