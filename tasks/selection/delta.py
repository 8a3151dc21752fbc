"""What is known about scorers and generators over a whole data set, from chunks of it.

Moments: mean and standard deviation of a scorer's rewards, for z-scores in ensembles:

    ensemble(y) = mean over members m of (r_m(y) - mean_m) / sd_m,   disagreement(y) = sd over members of the same z

GeneratorDelta: by how much one generator's mean reward exceeds another's over the prompts that both answered:

    delta(a, b) = mean over those prompts of (mean reward of a's samples - mean reward of b's)

Sources: Delta Learning, arXiv 2507.06187; Decomposing the Delta, arXiv 2604.08723 (generator-level delta).
Degenerate: a member whose rewards are all equal says nothing, its z is 0; generators that share no prompt have a delta
of NaN; a sample that a member did not rate has no ensemble reward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.signedinteger[Any]]


ROUNDING = 1e-14  # of a mean, relative to it: equal rewards such as 0.1 differ from theirs by as much


class Moments:
    """Count, mean and squares about it, merged chunk by chunk (Chan, Golub, LeVeque 1979), so that nothing cancels."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, rewards: Floats) -> None:
        """rewards: any shape, NaN where there is none."""
        values = rewards[np.isfinite(rewards)]
        if not len(values):
            return
        mean, total = float(values.mean()), self.count + len(values)
        apart = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + apart**2 * self.count * len(values) / total
        self.mean += apart * len(values) / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation (of a sample); 0 with fewer than two rewards, and where it is but their rounding."""
        deviation = float(np.sqrt(self.squares / (self.count - 1))) if self.count > 1 else 0.0
        return deviation if deviation > ROUNDING * abs(self.mean) else 0.0

    def z(self, rewards: Floats) -> Floats:
        return (
            (rewards - self.mean) / self.deviation if self.deviation > 0 else np.where(np.isnan(rewards), np.nan, 0.0)
        )


def ensemble(z_scores: list[Floats]) -> tuple[Floats, Floats]:
    """Reward and disagreement per sample, from the members' z-scores of equal shape; NaN where one is missing."""
    stacked = np.stack(z_scores)
    return stacked.mean(axis=0), stacked.std(axis=0)


class GeneratorDelta:
    """Mean rewards of generators, alone and against each other."""

    def __init__(self, generators: int) -> None:
        self.number = generators
        self.sums, self.counts = np.zeros(generators), np.zeros(generators)
        self.prompts, self.apart, self.squares = (np.zeros((generators, generators)) for _ in range(3))

    def add(self, rewards: Floats, generators: Ints) -> None:
        """rewards: [prompts, samples], NaN where there is none; generators: number of who wrote each, same shape."""
        rated = np.isfinite(rewards)
        means = np.full((len(rewards), self.number), np.nan)
        for g in range(self.number):
            mine = rated & (generators == g)
            n = mine.sum(axis=1)
            total = np.where(mine, rewards, 0.0).sum(axis=1)
            self.sums[g] += total.sum()
            self.counts[g] += n.sum()
            np.divide(total, n, out=means[:, g], where=n > 0)
        there = np.isfinite(means)
        known, k = np.where(there, means, 0.0), there.astype(float)
        first = known.T @ k  # [a, b]: sum of a's means over the prompts of both
        second = (known**2).T @ k
        self.prompts += k.T @ k
        self.apart += first - first.T
        self.squares += second + second.T - 2 * known.T @ known

    def mean(self) -> Floats:
        """Mean reward of each generator over all its samples; NaN where it has none."""
        return _divide(self.sums, self.counts)

    def delta(self) -> Floats:
        """[a, b]: by how much a exceeds b over the prompts of both; NaN without any."""
        return _divide(self.apart, self.prompts)

    def error(self, a: int, b: int) -> float:
        """Standard error of delta[a, b] over prompts; NaN with fewer than two."""
        n = self.prompts[a, b]
        if n < 2:
            return float("nan")
        variance = max(0.0, self.squares[a, b] / n - (self.apart[a, b] / n) ** 2)
        return float(np.sqrt(variance / (n - 1)))


def _divide(over: Floats, under: Floats) -> Floats:
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)
