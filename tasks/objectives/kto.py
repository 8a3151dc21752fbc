"""KTO: lambda_D (1 - s(beta (lr(y) - z))) of a desirable, lambda_U (1 - s(beta (z - lr(y)))) of an undesirable
completion; z the divergence of policy from reference; beta of summed log-ratios, 0.01 to 0.5.

Ethayarajh et al. 2024 (arXiv 2402.01306). Unpaired: what it knows of a completion is whether it is desirable, so pairs
become twice as many completions. TRL's KTOTrainer runs it, with its loss and its estimate of z: the mean log-ratio of
completions under prompts of others, over all processes, no less than 0, without gradient. `loss` is the formula, to
hold TRL's against. TRL passes each completion on to the next row, within blocks as large as a device's batch, before
training. So there must be more than one row per device; the rows must be drawn in order, not shuffled, for a block to
be a batch; and the two completions of a pair must not be neighbours: they would be passed to their own prompt.

Ours are the weights where none are given. The paper asks for lambda_D n_D / (lambda_U n_U) between 1 and 4/3; `weights`
makes it 1, by raising the rarer label's above 1. Completions from whole pairs have equal counts, and weights of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.errors import ConfigError
from tasks.objectives.settings import Kto


def weights(desirable: int, undesirable: int, settings: Kto) -> tuple[float, float]:
    """Of a desirable and of an undesirable completion, from how many there are of each; a given weight stays."""
    if not desirable or not undesirable:
        raise ConfigError(
            f"train: kto needs completions of both labels; {desirable} are desirable and {undesirable} are not"
        )
    ratio = undesirable / desirable  # lambda_D over lambda_U
    first, second = settings.desirable_weight, settings.undesirable_weight
    if not first and not second:
        return max(1.0, ratio), max(1.0, 1 / ratio)
    return first or second * ratio, second or first / ratio


def loss(ratios: Tensor, desirable: Tensor, divergence: Tensor, of_each: tuple[float, float], beta: float) -> Tensor:
    """[completions]. ratios: lr(y); desirable: bool; divergence: z, scalar, or the mean log-ratio it is made of."""
    reward = beta * (ratios - divergence.detach().clamp(min=0))
    return torch.where(desirable, of_each[0] * torch.sigmoid(-reward), of_each[1] * torch.sigmoid(reward))
