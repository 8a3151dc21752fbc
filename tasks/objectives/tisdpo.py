"""TIS-DPO: -log s(beta [sum_t w_t lr_t(y_w) - sum_t w_t lr_t(y_l)]), lr_t the log-ratio of token t and w_t its weight;
beta of summed log-ratios, 0.01 to 0.5.

Liu et al. 2024 (arXiv 2410.04350). Two helper models, trained by DPO on the pairs (+) and on the pairs turned round
(-), say how much a token is to blame: s_t = logp_-(t) - logp_+(t). Weights rise with s_t in a rejected response and
with -s_t in a chosen one, by rank from 0.7 to 1.3: from the authors' code, as is the loss. In the paper's formula they
are exponential in the clipped s_t.

Ours: ranks are within a response; tokens of equal score share the mean of their ranks; a response of one token has the
middle weight. Weights of 1 are DPO.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.errors import RunError
from tasks.objectives.batch import PairBatch, Side
from tasks.objectives.numbers import Floats, percentiles
from tasks.objectives.settings import Tisdpo


def token_weights(plus: Floats, minus: Floats, chosen: bool, settings: Tisdpo) -> Floats:
    """Weights of a response's tokens, [tokens]; plus, minus: the helper models' log-probabilities of them."""
    plus, minus = np.asarray(plus, np.float64), np.asarray(minus, np.float64)
    if not (np.isfinite(plus).all() and np.isfinite(minus).all()):
        raise RunError("train: a helper model of tisdpo gives a token a log-probability that is not finite")
    ranks = percentiles(plus - minus if chosen else minus - plus)
    return settings.low + (settings.high - settings.low) * ranks


def loss(batch: PairBatch, settings: Tisdpo) -> Tensor:
    return -logsigmoid(settings.beta * (_weighted(batch.chosen) - _weighted(batch.rejected)))


def _weighted(side: Side) -> Tensor:
    assert side.reference_tokens is not None and side.weights is not None, "tisdpo goes by tokens"
    return (side.weights * (side.logps - side.reference_tokens) * side.mask).sum(dim=1)
