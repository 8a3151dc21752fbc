"""DPO-norm: -log s(beta [lr(y_w)/|y_w| - lr(y_l)/|y_l|]); beta of length-normalised log-ratios, 5 to 10.

DPO in which a long response does not count more for its length, as in the recipes of Tulu 3 (arXiv 2411.15124), Delta
Learning (arXiv 2507.06187) and OLMo 3. TRL has it as sigmoid_norm.

Degenerate: a response without tokens has a log-ratio of 0.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch
from tasks.objectives.settings import DpoNorm


def loss(batch: PairBatch, settings: DpoNorm) -> Tensor:
    return -logsigmoid(settings.beta * batch.delta_of_means)
