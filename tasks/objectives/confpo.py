"""ConfPO: -log s(beta (kept(y_w) - kept(y_l)) - gamma), where kept(y) is the mean log-probability of those tokens of y
whose probability is below the mean over y; no reference; beta of mean log-probabilities, 1.5 to 10.

arXiv 2506.08712: SimPO on the tokens that the policy is least sure of, which carry most of the gradient. Which are kept
follows the policy but has no gradient. Defaults of beta and gamma are those of the authors' script for Mistral.

Degenerate: a response of one token, or of tokens with equal probabilities, has none below its mean. A pair with nothing
kept on a side is skipped: its loss and gradient are 0, and the mean over the batch counts it, as in the authors' code.
Ours: a token within rounding (1e-6) of the mean is not below it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.objectives.batch import PairBatch, Side
from tasks.objectives.settings import Confpo

_ROUNDING = 1e-6


def loss(batch: PairBatch, settings: Confpo) -> Tensor:
    chosen, rejected = unsure(batch.chosen), unsure(batch.rejected)
    gap = _mean(batch.chosen, chosen) - _mean(batch.rejected, rejected)
    return torch.where(chosen.any(dim=1) & rejected.any(dim=1), -logsigmoid(settings.beta * gap - settings.gamma), 0.0)


def unsure(side: Side) -> Tensor:
    """Whether a token is kept, [pairs, tokens] bool."""
    inside = side.mask > 0
    logps = side.logps.detach().to(torch.promote_types(side.logps.dtype, torch.float32))
    mean = logps.masked_fill(~inside, -torch.inf).logsumexp(dim=1) - side.length.to(logps.dtype).log()
    return inside & (logps < mean.unsqueeze(1) - _ROUNDING)


def _mean(side: Side, kept: Tensor) -> Tensor:
    return (side.logps * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
