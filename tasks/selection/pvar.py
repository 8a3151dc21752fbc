"""PVar: the preference variance of a prompt.

For samples y_i, y_j of one prompt with rewards r_i, r_j, the preference p(i, j) = sigmoid((r_i - r_j) / T) has mean
exactly 1/2 over ordered pairs, because p(j, i) = 1 - p(i, j). The unbiased estimate of its variance from n rewards is

    PVar = 2 / (n (n - 1)) * sum over i < j of (sigmoid((r_i - r_j) / T) - 1/2)^2        in [0, 1/4]

Centring at 1/2, not at the empirical mean over i < j, keeps it independent of the samples' order. T is the reward
scale: gaps far below T make PVar proportional to Var(r) / 8, gaps far above it saturate PVar at 1/4.

Degenerate: fewer than two finite rewards leave PVar undefined, NaN here, never 0.

Source: Guo et al. 2025, On the Role of Preference Variance in Preference Optimization, arXiv 2510.13022 (definition);
the estimator follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK = 16_384  # prompts worked on at once: columns that fit the cache, long enough that threads seldom meet
WIDE = 1400.0  # a prompt's largest gap in units of T, above which exp of its centred rewards leaves the floats


def pvar(rewards: Floats, scale: float = 1.0) -> Floats:
    """PVar of each prompt. rewards: [prompts, samples], NaN where there is none; scale: T > 0. Returns [prompts]."""
    return pvar_with_error(rewards, scale)[0]


def pvar_with_error(rewards: Floats, scale: float = 1.0) -> tuple[Floats, Floats]:
    """PVar and its jackknife standard error, each [prompts]. The error needs three finite rewards, else it is NaN.

    Leaving sample i out changes PVar by -2 (s_i - mean s) / ((n - 1) (n - 2)), s_i being its sum over pairs; the error
    is sqrt((n - 1) / n * sum of the squared changes) (Tukey 1958).
    """
    value, error = np.full(len(rewards), np.nan), np.full(len(rewards), np.nan)
    for block, known, sums, _ in _blocks(rewards, scale):
        n, total = known.sum(axis=0), sums.sum(axis=0)
        centred = (sums - total / np.maximum(n, 1)) * known
        change = 2 * np.sqrt((centred * centred).sum(axis=0))
        np.divide(total, n * (n - 1.0), out=value[block], where=n >= 2)
        np.divide(change, np.sqrt(n * (n - 1.0)) * (n - 2.0), out=error[block], where=n >= 3)
    return value, error


def pair_sums(rewards: Floats, scale: float = 1.0) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """What the moments of PVar's noise are made of.

    With v_ij = (sigmoid((r_i - r_j) / T) - 1/2)^2: the sums of v_ij over j [prompts, samples], of v_ij^2 over ordered
    pairs [prompts], and the finite rewards [prompts].
    """
    sums, squares = np.empty(np.shape(rewards)), np.empty(len(rewards))
    n = np.empty(len(rewards), dtype=np.int64)
    for block, known, mine, square in _blocks(rewards, scale):
        sums[block], squares[block], n[block] = mine.T, square, known.sum(axis=0)
    return sums, squares, n


def _blocks(rewards: Floats, scale: float) -> Iterator[tuple[slice, NDArray[np.bool_], Floats, Floats]]:
    """Per block of prompts: which rewards are finite and their sums [samples, prompts], and the squares [prompts]."""
    rewards = np.asarray(rewards, dtype=np.float64)
    for start in range(0, len(rewards), BLOCK):
        block = slice(start, start + BLOCK)
        values = np.array(rewards[block].T, order="C")  # a copy, also where one prompt is contiguous either way
        known = np.isfinite(values)
        values[~known] = np.nan
        yield block, known, *_block_sums(values, scale)


def _block_sums(values: Floats, scale: float) -> tuple[Floats, Floats]:
    """`pair_sums` of a block. values: [samples, prompts], finite or NaN.

    sigmoid(a - b) - 1/2 = (e^a - e^b) / (e^a + e^b) / 2 takes one exponential per sample, where tanh((a - b) / 2) / 2
    takes one per pair; it needs rewards within the range of exp around their middle. Others are left to tanh.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # a gap beyond any float is an infinite one
        high, low = np.fmax.reduce(values, initial=-np.inf), np.fmin.reduce(values, initial=np.inf)
        wide = (high - low) / scale > WIDE
        powers = np.exp((values - (high / 2 + low / 2)) / scale)
        sums, squares = _over_pairs(powers, _of_powers)
        if wide.any():
            apart = values[:, wide] / 2
            sums[:, wide], squares[wide] = _over_pairs(apart, lambda a, b: np.tanh((a - b) / scale))
    return sums, squares


def _of_powers(a: Floats, b: Floats) -> Floats:
    difference = a - b
    difference /= a + b
    return difference


def _over_pairs(values: Floats, doubled: Callable[[Floats, Floats], Floats]) -> tuple[Floats, Floats]:
    """The sums of a block from 2 sigmoid((r_i - r_j) / T) - 1 of each pair, NaN where one of the two is missing."""
    sums, squares = np.zeros(values.shape), np.zeros(values.shape[1])
    gaps = bool(np.isnan(values).any())
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            v = doubled(values[i], values[j])
            v *= v
            if gaps:
                np.nan_to_num(v, copy=False)
            sums[i] += v
            sums[j] += v
            v *= v
            squares += v
    return sums / 4, squares / 8


class PooledScale:
    """The data set's pooled standard deviation within prompts, from chunks: what `reward_scale: auto` uses for T."""

    def __init__(self) -> None:
        self.squares = 0.0
        self.freedom = 0

    def add(self, rewards: Floats) -> None:
        """rewards: [prompts, samples], NaN where there is none."""
        there = np.isfinite(rewards)
        n = there.sum(axis=1)
        use = n >= 2
        kept, there = np.where(there, rewards, 0.0)[use], there[use]
        mean = kept.sum(axis=1) / n[use]
        high, low = np.where(there, kept, -np.inf).max(axis=1), np.where(there, kept, np.inf).min(axis=1)
        varies = there & (high > low)[:, None]  # equal rewards do not, though their rounded mean may differ from them
        self.squares += float((np.where(varies, kept - mean[:, None], 0.0) ** 2).sum())
        self.freedom += int((n[use] - 1).sum())

    @property
    def value(self) -> float:
        """1 where nothing varies: then PVar is 0 at any scale."""
        return float(np.sqrt(self.squares / self.freedom)) if self.squares > 0 else 1.0
