"""AMaPO: -log s(beta q - m) with q = mean(y_w) - mean(y_l); m = beta 1[q < mu] exp(((mu - q) / sd) mu), no gradient.

arXiv 2511.09385. No reference; beta of mean log-probabilities, 2 to 3. mu and sd (of a sample, n - 1) are those of q
over the batch, all processes together: pairs that are ranked worse than the average get a margin on top, and so more
gradient. While mu is negative, early in training, the margin is below beta and falls with the distance from mu.

The batch is what the processes see at once, as in the authors' code: gradient accumulation does not enlarge it, so give
a process as many pairs as fit.

Degenerate (ours, the code has NaN): a single pair, or pairs of equal q, have no sd and no margin, and the loss is
SimPO's without gamma. exp() is held at e^20, where a pair has all the gradient it can get.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch
from tasks.objectives.settings import Amapo

_MOST = 20.0  # of the exponent
_SAME = 1e-6  # a spread this much smaller than the values is rounding


def loss(batch: PairBatch, settings: Amapo) -> Tensor:
    q = batch.chosen.mean - batch.rejected.mean
    return -logsigmoid(settings.beta * (q - margins(q.detach(), batch.gather(q.detach()))))


def margins(q: Tensor, everywhere: Tensor) -> Tensor:
    """m / beta of each pair, [pairs]; everywhere: q of all processes' pairs."""
    q, everywhere = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (q, everywhere))
    if len(everywhere) < 2:
        return torch.zeros_like(q)
    mu, sd = everywhere.mean(), everywhere.std()
    if sd <= _SAME * everywhere.abs().max():
        return torch.zeros_like(q)
    return torch.where(q < mu, ((mu - q) / sd * mu).clamp(max=_MOST).exp(), 0.0)
