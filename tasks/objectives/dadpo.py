"""DA-DPO in text form: -log s(beta g delta) with g = 1 + |gap|; beta of summed log-ratios, 0.01 to 0.5.

arXiv 2601.00623 is about images: there the gap is between scores of CLIP and of LLaVA for the two responses; the loss
is the authors' code. An easy pair, one with a wide gap, gets a larger beta: its log-ratios reach the flat part of the
loss sooner and it is overfitted less.

The text form is ours. gap is the mean of two percentile ranks over the training set, in [0, 1]: of the reward model's
margin, which stands for CLIP, and of mean(y_w) - mean(y_l) under the reference, which stands for LLaVA. So g lies in
[1, 2], from the pair that both find hardest, contradictions of the label included, to the one that both find easiest;
scales of rewards and of log-probabilities do not matter. Ties share a rank; one pair alone has a gap of 1/2. A pair
without a margin is refused.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch
from tasks.objectives.numbers import Data, Floats, column, percentiles
from tasks.objectives.settings import Dadpo


def columns(data: Data, settings: Dadpo) -> dict[str, Floats]:
    """scale: g. Besides the subset's columns data needs, per side, the reference's log-probability (ref_chosen,
    ref_rejected: sums) and the tokens that it is of (chosen_length, rejected_length)."""
    chosen = column(data, "ref_chosen") / np.maximum(column(data, "chosen_length"), 1)
    rejected = column(data, "ref_rejected") / np.maximum(column(data, "rejected_length"), 1)
    gap = (percentiles(column(data, settings.margin)) + percentiles(chosen - rejected)) / 2
    return {"scale": 1 + gap}


def loss(batch: PairBatch, settings: Dadpo) -> Tensor:
    return -logsigmoid(settings.beta * batch.columns["scale"] * batch.delta)
