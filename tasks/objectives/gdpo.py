"""GDPO: -log s(beta (2p - 1) delta), p the soft label: how sure it is that y_w is the better one; beta of summed
log-ratios, 0.01 to 0.5.

Geometric-averaged DPO, Furuta et al. 2024 (arXiv 2409.06691): with the likelihoods averaged geometrically by p,
pi(y_w)^p pi(y_l)^(1-p) against pi(y_l)^p pi(y_w)^(1-p), the gap of log-ratios becomes (2p - 1) delta. So a pair that is
as good as tied has next to no gradient, where conservative DPO would drive its log-ratios to be equal. p is
s((r_w - r_l) / T) or a column with shares of votes; p = 1 is DPO. We know the formula from the paper's text, not code.

The paper has p >= 1/2. Ours: below that, where the scorer contradicts the label, the pair is turned round; at 1/2 it
has a loss of ln 2 and no gradient; a pair without a margin or share is refused, as is a share outside [0, 1].
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.errors import ConfigError
from tasks.objectives.batch import PairBatch
from tasks.objectives.numbers import Data, Floats, column
from tasks.objectives.settings import Gdpo


def columns(data: Data, settings: Gdpo) -> dict[str, Floats]:
    """sureness: 2p - 1, in [-1, 1]."""
    if not settings.shares:
        return {"sureness": np.tanh(column(data, settings.margin) / settings.temperature / 2)}  # 2 s(x) - 1
    shares = column(data, settings.shares)
    outside = int(((shares < 0) | (shares > 1)).sum())
    if outside:
        raise ConfigError(f"train: {outside} of {len(shares)} values of {settings.shares!r} are no shares from 0 to 1")
    return {"sureness": 2 * shares - 1}


def loss(batch: PairBatch, settings: Gdpo) -> Tensor:
    return -logsigmoid(settings.beta * batch.columns["sureness"] * batch.delta)
