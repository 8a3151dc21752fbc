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
    difference = policy[:, :, None] - reference[:, None, :]
    known = np.isfinite(difference)
    points = np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))
    meetings = known.sum(axis=(1, 2))
    use = meetings > 0
    if not use.any():
        return WinRate(float("nan"), float("nan"), 0)
    wins = np.where(known, points, 0.0).sum(axis=(1, 2))[use] / meetings[use]
    error = float(wins.std(ddof=1) / np.sqrt(len(wins))) if len(wins) > 1 else float("nan")
    return WinRate(float(wins.mean()), error, len(wins))
