"""MixDPO: z (-mean(y_w)) + (1 - z) cDPO(beta delta, eps), z = 1 where the margin is below tau; largest margins first.

arXiv 2602.00954. A pair whose sides a reward model can hardly tell apart teaches a wrong preference as often as a right
one; its chosen side is still worth imitating. tau is a quantile of the subset's margins or a threshold; the pairs come
sorted by margin, largest first, without shuffling. beta of summed log-ratios, 0.01. The paper's runs on Llama and
Mistral have eps = 0.1, so their DPO branch is conservative DPO: give a baseline the same eps.

Degenerate: pairs at the threshold go to DPO, so at a quantile of 0 all do; a pair without a margin is refused.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.objectives.batch import PairBatch
from tasks.objectives.dpo import smoothed
from tasks.objectives.numbers import Data, Floats, column
from tasks.objectives.settings import Mixdpo


def columns(data: Data, settings: Mixdpo) -> dict[str, Floats]:
    """imitate: 1 for the pairs that go to SFT."""
    margin = column(data, "margin")
    tau = settings.threshold if settings.threshold is not None else np.quantile(margin, settings.quantile)
    return {"imitate": (margin < tau).astype(np.float64)}


def loss(batch: PairBatch, settings: Mixdpo) -> Tensor:
    imitate = batch.columns["imitate"] > 0
    preference = smoothed(settings.beta * batch.delta, settings.label_smoothing)
    return torch.where(imitate, -batch.chosen.mean, preference)
