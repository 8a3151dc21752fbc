"""CrPO: C (-log s(beta delta)) with C = sum_k lambda_k max(s_k(y_w) - s_k(y_l), 0) over named scores; beta of summed
log-ratios, 0.01 to 0.5.

arXiv 2505.14442, for creativity: novelty, diversity, surprise, quality. A pair counts for as much as its chosen side is
better by the scores that matter; where it is better by none it counts for nothing. The loss is the authors' code with
rejected scores; the scores are whatever the subset has margins of. They are not normalised: lambda is per unit of a
score, and the mean of C acts as a factor on the learning rate.

Ours: a pair without one of the margins is refused, and so is a training set in which C is 0 for every pair.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.errors import ConfigError
from tasks.objectives.batch import PairBatch
from tasks.objectives.numbers import Data, Floats, column
from tasks.objectives.settings import Crpo


def columns(data: Data, settings: Crpo) -> dict[str, Floats]:
    """weight: C."""
    better = {name: np.maximum(column(data, name), 0) for name in settings.weights}
    weight = np.sum([settings.weights[name] * values for name, values in better.items()], axis=0)
    if not weight.any():
        raise ConfigError(f"train: crpo would learn nothing: no pair has {' or '.join(better)} above 0")
    return {"weight": weight}


def loss(batch: PairBatch, settings: Crpo) -> Tensor:
    return batch.columns["weight"] * -logsigmoid(settings.beta * batch.delta)
