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


def pvar(rewards: Floats, scale: float = 1.0) -> Floats:
    """PVar of each prompt. rewards: [prompts, samples], NaN where there is none; scale: T > 0. Returns [prompts]."""
    rewards = np.asarray(rewards, dtype=np.float64)
    there = np.isfinite(rewards)
    n = there.sum(axis=1)
    values = np.where(there, rewards, 0.0)
    total = np.zeros(len(rewards))
    with np.errstate(over="ignore", under="ignore"):  # a gap beyond any float is an infinite one
        for i in range(rewards.shape[1]):
            for j in range(i + 1, rewards.shape[1]):
                # sigmoid(x) - 1/2 = tanh(x / 2) / 2, which does not overflow
                preference = np.tanh((values[:, i] - values[:, j]) / scale / 2) / 2
                total += np.where(there[:, i] & there[:, j], preference**2, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n >= 2, 2 * total / (n * (n - 1)), np.nan)


def pvar_with_error(rewards: Floats, scale: float = 1.0) -> tuple[Floats, Floats]:
    rewards = np.asarray(rewards, dtype=np.float64)
    value = pvar(rewards, scale)
    return value, np.full(len(value), np.nan)


class PooledScale:
    """The data set's pooled standard deviation within prompts, from chunks: what `reward_scale: 0` uses for T."""

    def __init__(self) -> None:
        self.squares = 0.0
        self.freedom = 0

    def add(self, rewards: Floats) -> None:
        """rewards: [prompts, samples], NaN where there is none."""
        there = np.isfinite(rewards)
        n = there.sum(axis=1)
        use = n >= 2
        kept = np.where(there, rewards, 0.0)[use]
        mean = kept.sum(axis=1) / n[use]
        self.squares += float((np.where(there[use], kept - mean[:, None], 0.0) ** 2).sum())
        self.freedom += int((n[use] - 1).sum())

    @property
    def value(self) -> float:
        """1 where nothing varies: then PVar is 0 at any scale."""
        return float(np.sqrt(self.squares / self.freedom)) if self.squares > 0 else 1.0
