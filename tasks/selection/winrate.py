"""Win rate of one policy over another, from rewards of both on the same prompts, or from points of single meetings.

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
    return mean_points(meetings(policy, reference))


def meetings(policy: Floats, reference: Floats) -> Floats:
    """The policy's points of every sample against every sample, [prompts, samples of the one * of the other]: 1, 1/2
    or 0, NaN where one has no reward."""
    difference = policy[:, :, None] - reference[:, None, :]
    won = np.where(np.isfinite(difference), 0.5 + 0.5 * np.sign(difference), np.nan)
    return won.reshape(len(won), -1)


def points(meetings: Floats) -> Floats:
    """Per prompt the share of the points that the policy gets, [prompts]; NaN where there was no meeting."""
    known = np.isfinite(meetings)
    met = known.sum(axis=1)
    return np.where(met > 0, np.where(known, meetings, 0.0).sum(axis=1) / np.maximum(met, 1), np.nan)


def mean_points(meetings: Floats) -> WinRate:
    """meetings: points [prompts, meetings] in [0, 1], NaN where there was none; a prompt without any is left out."""
    wins = points(meetings)
    wins = wins[np.isfinite(wins)]
    if not len(wins):
        return WinRate(float("nan"), float("nan"), 0)
    error = float(wins.std(ddof=1) / np.sqrt(len(wins))) if len(wins) > 1 else float("nan")
    return WinRate(float(wins.mean()), error, len(wins))
