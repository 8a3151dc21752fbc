"""MADPO: w (-log s(beta delta)) with w = s(c h) / s(h), c = c(|h|), h the reward model's margin; beta of summed
log-ratios, 0.01 to 0.5.

    c(m) = c_min + (c_max - c_min) / (1 + ((c_max - 1) / (1 - c_min)) exp(lambda (m - tau)))

arXiv 2510.05342. c is 1 at m = tau, above 1 for hard pairs, whose margin it raises, and below 1 for easy ones; w is 1
where h <= -tau: a label that the reward model contradicts strongly is left alone. h is signed, negative where it
contradicts the label; such a pair has w < 1. With h > 0, w lies in (1, 2) for hard pairs and in (1/2, 1) for easy ones:
always compare with DPO on a subset without h < 0, which has part of the effect. w does not depend on the policy.

Defaults: the authors' c_max 4, c_min = 1 / c_max, lambda 1 and tau 6.907 = ln(0.999 / 0.001), on the scale of their
reward model. Ours: a pair without a margin is refused, and w is computed by logarithms, so that no h overflows.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch
from tasks.objectives.numbers import Data, Floats, column
from tasks.objectives.settings import Madpo


def columns(data: Data, settings: Madpo) -> dict[str, Floats]:
    """weight: w."""
    h = column(data, settings.margin)
    c = amplification(np.abs(h), settings)
    return {"weight": np.exp(np.where(h > -settings.tau, _log_sigmoid(c * h) - _log_sigmoid(h), 0.0))}


def amplification(size: Floats, settings: Madpo) -> Floats:
    """c(m), [pairs]."""
    most, least = settings.c_max, settings.c_min or 1 / settings.c_max
    offset = np.log((most - 1) / (1 - least))
    return least + (most - least) * np.exp(_log_sigmoid(-(settings.slope * (size - settings.tau) + offset)))


def _log_sigmoid(x: Floats) -> Floats:
    return -np.logaddexp(0.0, -x)


def loss(batch: PairBatch, settings: Madpo) -> Tensor:
    return batch.columns["weight"] * -logsigmoid(settings.beta * batch.delta)
