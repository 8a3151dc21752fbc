"""IPO: ([lr(y_w)/|y_w| - lr(y_l)/|y_l|] - 1 / (2 beta))^2; beta, the paper's tau, sets the gap that is drawn to.

Azar et al. 2023 (arXiv 2310.12036, equation 17) have summed log-ratios. TRL, whose loss ipo this is, normalises them by
length, which it reports its authors meant. A gap beyond 1 / (2 beta) is drawn back, so nothing is learned without end,
not even from labels that never contradict each other. At policy = reference the loss is 1 / (4 beta^2), not ln 2.
"""

from __future__ import annotations

from torch import Tensor

from tasks.objectives.batch import PairBatch
from tasks.objectives.settings import Ipo


def loss(batch: PairBatch, settings: Ipo) -> Tensor:
    return (batch.delta_of_means - 1 / (2 * settings.beta)) ** 2
