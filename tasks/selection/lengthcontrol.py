"""Length-controlled win rate: what the win rate would be if both answers were equally long.

After AlpacaEval 2 (arXiv 2404.04475): logit P(policy beats reference) = theta + phi tanh(dlen / std(dlen)) +
psi difficulty(x), without a further intercept; the rate is the mean over prompts of s(theta + psi difficulty(x)).
dlen is the policy's length minus the reference's. Preferences may be soft (a judge's probability) or 0, 1/2 and 1.

A prompt counts once: its meetings (sample by sample) share the weight 1. The standard error is that of an M-estimator
with prompts as clusters: a prompt k moves the rate by (g_k - rate) / n through the mean, and by J' H^-1 u_k through the
coefficients (g_k: the prompt's rate, H: curvature, u_k: its score, J: slope of the rate in the coefficients). What the
data leave open is the ridge's prior alone, of variance 1 / ridge: its part ridge |H^-1 J|^2 is added, so that an answer
that was always longer by the same comes with an error near 1/2, not with a rate that looks certain.

Degenerate cases: with lengths that never differ, or no lengths, the rate and its error are the raw ones; fewer than two
prompts give no rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.selection.logistic import RIDGE, fit, sigmoid

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Controlled:
    """rate and error in [0, 1], NaN with fewer than two prompts; effects: per feature, what +1 of it adds to the logit.

    base: theta; difficulty: psi, 0 without difficulties.
    """

    rate: float
    error: float
    prompts: int
    base: float
    effects: Floats
    difficulty: float


def length_controlled(points: Floats, longer: Floats, difficulty: Floats | None = None) -> Controlled:
    """points: [prompts, meetings], the policy's share of each, NaN where there was none; longer: dlen, likewise;
    difficulty: [prompts]."""
    return controlled(points, squashed(longer, points)[..., None], difficulty)


def squashed(longer: Floats, points: Floats) -> Floats:
    """tanh(dlen / std(dlen)), the deviation being over the meetings that took place."""
    known = longer[np.isfinite(points) & np.isfinite(longer)]
    scale = known.std(ddof=1) if len(known) > 1 else 0.0
    if scale == 0:  # all alike: only its sign is left
        return np.sign(longer)
    return np.tanh(longer / scale)


def controlled(
    points: Floats, features: Floats, difficulty: Floats | None = None, weights: Floats | None = None
) -> Controlled:
    """The rate at features of zero.

    points: [prompts, meetings]; features: [prompts, meetings, features], of the policy minus of the reference;
    difficulty: [prompts]; weights: [prompts, meetings], what a meeting counts within its prompt, 1 by default.
    """
    known = np.isfinite(points) & np.isfinite(features).all(axis=-1)
    if difficulty is not None:
        known &= np.isfinite(difficulty)[:, None]
    each = known * (np.ones_like(points) if weights is None else weights)
    total = each.sum(axis=1)
    use = total > 0
    n = int(use.sum())
    if n < 2:
        return Controlled(np.nan, np.nan, n, np.nan, np.full(features.shape[-1], np.nan), np.nan)
    prompt, meeting = np.nonzero(known & use[:, None])
    share = each[prompt, meeting] / total[prompt]
    row = np.cumsum(use) - 1  # of a prompt, among those used
    hard = np.zeros((n, 0)) if difficulty is None else difficulty[use][:, None]
    still = np.hstack([np.ones((n, 1)), np.zeros((n, features.shape[-1])), hard])  # equal features, per prompt
    design = still[row[prompt]]
    design[:, 1 : 1 + features.shape[-1]] = features[prompt, meeting]
    targets = points[prompt, meeting]
    at, curvature = fit(design, targets, share)
    chances = sigmoid(still @ at)
    rate = float(chances.mean())
    slope = np.linalg.solve(curvature, (chances * (1 - chances)) @ still / n)
    scores = (share * (targets - sigmoid(design @ at))) * (design @ slope)
    moved = (chances - rate) / n + np.bincount(row[prompt], scores, minlength=n)
    variance = n / (n - 1) * float(moved @ moved) + RIDGE * float(slope @ slope)
    effects = at[1 : 1 + features.shape[-1]]
    psi = float(at[-1]) if difficulty is not None else 0.0
    return Controlled(rate, min(float(np.sqrt(variance)), 0.5), n, float(at[0]), effects, psi)
