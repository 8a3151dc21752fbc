"""How far two scorers order a prompt's samples alike.

Over the pairs of samples that both scorers rated, with C concordant, D discordant, and A, B those that the first and
the second scorer do not tie:

    Kendall's tau-b = (C - D) / sqrt(A B)        in [-1, 1]
    flipped         = D / (C + D)                in [0, 1], the share of comparisons that would turn round

NaN where nothing can be compared: fewer than two samples rated by both, or all tied.
Source: Kendall 1945, The treatment of ties in ranking problems.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def agreement(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """tau-b and flipped of each prompt. first, second: rewards [prompts, samples], NaN where there is none."""
    prompts, samples = first.shape
    balance, concordant, discordant = np.zeros(prompts), np.zeros(prompts), np.zeros(prompts)
    untied_first, untied_second = np.zeros(prompts), np.zeros(prompts)
    both = np.isfinite(first) & np.isfinite(second)
    for i in range(samples):
        for j in range(i + 1, samples):
            rated = both[:, i] & both[:, j]
            with np.errstate(invalid="ignore"):
                a = np.where(rated, np.sign(first[:, i] - first[:, j]), 0.0)
                b = np.where(rated, np.sign(second[:, i] - second[:, j]), 0.0)
            same = a * b
            balance += same
            concordant += same > 0
            discordant += same < 0
            untied_first += a != 0
            untied_second += b != 0
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = balance / np.sqrt(untied_first * untied_second)
        flipped = discordant / (concordant + discordant)
    return np.where(np.isfinite(tau), tau, np.nan), np.where(np.isfinite(flipped), flipped, np.nan)
