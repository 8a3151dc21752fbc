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

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK = 8192  # prompts worked on at once: the columns of a block stay in the processor's cache


def pvar(rewards: Floats, scale: float = 1.0) -> Floats:
    """PVar of each prompt. rewards: [prompts, samples], NaN where there is none; scale: T > 0. Returns [prompts]."""
    rewards = np.asarray(rewards, dtype=np.float64)
    there = np.isfinite(rewards)
    n = there.sum(axis=1)
    total = np.zeros(len(rewards))
    for start in range(0, len(rewards), BLOCK):
        block = slice(start, start + BLOCK)
        known = np.ascontiguousarray(there[block].T)
        values = np.where(known, rewards[block].T, 0.0)
        with np.errstate(over="ignore", under="ignore"):  # a gap beyond any float is an infinite one
            for i in range(len(values)):
                for j in range(i + 1, len(values)):
                    # sigmoid(x) - 1/2 = tanh(x / 2) / 2, which does not overflow
                    preference = np.tanh((values[i] - values[j]) / scale / 2) / 2
                    total[block] += np.where(known[i] & known[j], preference**2, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n >= 2, 2 * total / (n * (n - 1)), np.nan)


def pair_sums(rewards: Floats, scale: float = 1.0) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """What PVar, its error and the moments of its noise are made of, with one tanh per pair of samples.

    With v_ij = (sigmoid((r_i - r_j) / T) - 1/2)^2: the sums of v_ij over j [prompts, samples], of v_ij^2 over ordered
    pairs [prompts], and the finite rewards [prompts].
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    there = np.isfinite(rewards)
    sums, squares = np.zeros(rewards.shape), np.zeros(len(rewards))
    for start in range(0, len(rewards), BLOCK):
        block = slice(start, start + BLOCK)
        known = np.ascontiguousarray(there[block].T)
        values = np.where(known, rewards[block].T, 0.0)
        mine, square = np.zeros(values.shape), np.zeros(values.shape[1])
        with np.errstate(over="ignore", under="ignore"):
            for i in range(len(values)):
                for j in range(i + 1, len(values)):
                    v = np.tanh((values[i] - values[j]) / scale / 2) / 2
                    v *= v
                    v *= known[i] & known[j]
                    mine[i] += v
                    mine[j] += v
                    square += v * v
        sums[block], squares[block] = mine.T, 2 * square
    return sums, squares, there.sum(axis=1)


def pvar_with_error(rewards: Floats, scale: float = 1.0) -> tuple[Floats, Floats]:
    """PVar and its jackknife standard error, each [prompts]. The error needs three finite rewards, else it is NaN.

    Leaving sample i out changes PVar by -2 (s_i - mean s) / ((n - 1) (n - 2)), s_i being its sum over pairs; the error
    is sqrt((n - 1) / n * sum of the squared changes) (Tukey 1958).
    """
    sums, _, n = pair_sums(rewards, scale)
    total = sums.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = np.where(np.isfinite(rewards), sums - (total / n)[:, None], 0.0)
        change = 4 * (centred**2).sum(axis=1) / ((n - 1.0) * (n - 2.0)) ** 2
        value = np.where(n >= 2, total / (n * (n - 1.0)), np.nan)
        return value, np.where(n >= 3, np.sqrt((n - 1) / n * change), np.nan)


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
