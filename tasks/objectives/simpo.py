"""SimPO: -log s(beta (mean(y_w) - mean(y_l)) - gamma), without a reference; beta of mean log-probabilities, 2 to 10.

Meng, Xia, Chen 2024 (arXiv 2405.14734). gamma is the margin of rewards that is asked for; the authors' configurations
give it as a share of beta (gamma = beta times gamma_beta_ratio), here and in TRL's experimental CPO it is absolute.

Equal responses have a loss of -log s(-gamma) and no gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch
from tasks.objectives.settings import Simpo


def loss(batch: PairBatch, settings: Simpo) -> Tensor:
    return -logsigmoid(settings.beta * (batch.chosen.mean - batch.rejected.mean) - settings.gamma)
