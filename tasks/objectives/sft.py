"""SFT: -mean(y_w), the length-mean negative log-likelihood of the chosen response; without rejected, reference or beta.

The baseline that a preference objective has to beat, and MixDPO's other branch. By default each response counts alike,
and the loss of a pair does not depend on the batch it is in. `average: tokens` is TRL's sft loss: each token of a batch
counts alike, -logp(y_w) / mean length, so that long responses weigh more, by what else is in their batch.
"""

from __future__ import annotations

from torch import Tensor

from tasks.objectives.batch import PairBatch
from tasks.objectives.settings import Sft


def loss(batch: PairBatch, settings: Sft) -> Tensor:
    if settings.average == "pairs":
        return -batch.chosen.mean
    return -batch.chosen.sum / batch.chosen.mask.sum(dim=1).mean(dtype=batch.chosen.logps.dtype).clamp(min=1)
