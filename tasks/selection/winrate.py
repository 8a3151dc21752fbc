"""Win rate of one policy over another, from rewards of both on the same prompts.

Per prompt, every sample of the policy meets every sample of the reference: a higher reward is a win, a tie counts 1/2.
The win rate is the mean over prompts; prompts are independent, samples of one prompt are not, so the standard error is
that of the mean over prompts (the usual clustered error).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WinRate:
    """rate and error in [0, 1]; error is NaN with fewer than two prompts."""

    rate: float
    error: float
    prompts: int


def win_rate(policy: Floats, reference: Floats) -> WinRate:
    """policy, reference: rewards [prompts, samples], NaN where there is none; a prompt without both is left out."""
    wins = points(policy, reference)
    wins = wins[np.isfinite(wins)]
    if not len(wins):
        return WinRate(float("nan"), float("nan"), 0)
    error = float(wins.std(ddof=1) / np.sqrt(len(wins))) if len(wins) > 1 else float("nan")
    return WinRate(float(wins.mean()), error, len(wins))


def points(policy: Floats, reference: Floats) -> Floats:
    """Per prompt the share of meetings that the policy wins; NaN where there is none."""
    difference = policy[:, :, None] - reference[:, None, :]
    known = np.isfinite(difference)
    won = np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))
    meetings = known.sum(axis=(1, 2))
    sums = np.where(known, won, 0.0).sum(axis=(1, 2))
    return np.where(meetings > 0, sums / np.maximum(meetings, 1), np.nan)
