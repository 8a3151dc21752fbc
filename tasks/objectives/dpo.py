"""DPO: -log s(beta delta) with delta = lr(y_w) - lr(y_l); beta of summed log-ratios, 0.01 to 0.5.

Rafailov et al. 2023 (arXiv 2305.18290). With label smoothing eps it is conservative DPO, which takes a share eps of the
labels to be wrong: (1 - eps) (-log s(beta delta)) + eps (-log s(-beta delta)) (Mitchell 2023). Without, TRL's own loss
is used.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch
from tasks.objectives.settings import Dpo


def smoothed(logits: Tensor, eps: float) -> Tensor:
    """-log s(logits), of which a share eps is turned round."""
    return -(1 - eps) * logsigmoid(logits) - eps * logsigmoid(-logits)


def loss(batch: PairBatch, settings: Dpo) -> Tensor:
    return smoothed(settings.beta * batch.delta, settings.label_smoothing)
