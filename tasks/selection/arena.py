"""Arena-Hard's score: verdicts in five grades, strong ones weigh 3, both orders are games of their own.

After Arena-Hard (arXiv 2406.11939) and its code: every game is a judge's grade of one order, from 2 (much better) over
0 (tie) to -2; a win counts 1, a tie 1/2; a game of grade 2 or -2 counts as three; a Bradley-Terry fit turns games into
strengths, and the score is the chance of beating the baseline. With one policy and one baseline that is the weighted
share of the points. The interval is from bootstraps over prompts, since the games of one prompt are not independent.

Bradley-Terry (1952): P(a beats b) = s(strength_a - strength_b). With features of each game (a's style minus b's,
tasks/selection/style.py) the logit gets their weighted sum, and strengths are for equal style. A small ridge keeps who
always wins finite and makes strengths sum to nearly zero; only their differences mean something.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.selection.logistic import RIDGE, fit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STRONG = 3.0  # what a game of grade 2 or -2 weighs


@dataclass(frozen=True)
class Score:
    """score, error and the 95 % interval in [0, 1], NaN without games; of `games` games."""

    score: float
    error: float
    low: float
    high: float
    games: int


def points_of(grades: Floats) -> Floats:
    """1, 1/2 and 0 for grades above, at and below 0; NaN stays."""
    return 0.5 + 0.5 * np.sign(grades)


def weights_of(grades: Floats) -> Floats:
    """3 for strong verdicts, else 1, and 0 where there is none."""
    return np.where(np.isnan(grades), 0.0, np.where(np.abs(grades) == 2, STRONG, 1.0))


def agreed(first: Floats, second: Floats) -> Floats:
    """Points of a comparison that was made in both orders: a win or a loss where both say so, else a tie.

    first, second: grades of the policy when shown first and second, same shape; NaN where either is.
    """
    same = np.sign(first) == np.sign(second)
    return np.where(np.isnan(first + second), np.nan, np.where(same, points_of(first), 0.5))


def arena_score(grades: Floats, bootstraps: int = 200, seed: int = 0) -> Score:
    """grades: the policy's [prompts, games], NaN where there was none."""
    weights = weights_of(grades)
    weight = weights.sum(axis=1)
    won = np.where(weights > 0, weights * points_of(grades), 0.0).sum(axis=1)
    use = weight > 0
    n = int(use.sum())
    if not n:
        return Score(np.nan, np.nan, np.nan, np.nan, 0)
    weight, won = weight[use], won[use]
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstraps)
    drawn = (times @ won) / (times @ weight)
    low, high = np.quantile(drawn, [0.025, 0.975])
    error = float(drawn.std(ddof=1)) if n > 1 else float("nan")
    return Score(float(won.sum() / weight.sum()), error, float(low), float(high), int((weights > 0).sum()))


def bradley_terry(
    first: Ints, second: Ints, points: Floats, weights: Floats, features: Floats | None = None, ridge: float = RIDGE
) -> tuple[Floats, Floats]:
    """Strengths [models] on the logit scale, and the effect of each feature.

    first, second: numbers of the models of each game [games]; points: of the first; features: [games, features].
    """
    games, models = len(points), int(max(first.max(), second.max())) + 1
    design = np.zeros((games, models))
    design[np.arange(games), first] += 1
    design[np.arange(games), second] -= 1
    at, _ = fit(design if features is None else np.hstack([design, features]), points, weights, ridge)
    return at[:models], at[models:]
