"""What a loss sees of a batch of pairs.

Notation of the formulas in this folder: y_w chosen, y_l rejected; logp(y) the policy's log-probability of a response,
summed over its tokens; lr(y) = logp(y) - reference's logp(y); mean(y) = logp(y) / |y|; s the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Side:
    """One response of each pair. All but `reference` are [pairs, tokens], padded on the right.

    logps: the policy's log-probability of each token of the response, 0 elsewhere; mask: 1 at those tokens;
    reference: the reference's, summed, [pairs]; reference_tokens: the same by token; weights: one per token.
    """

    logps: Tensor
    mask: Tensor
    reference: Tensor | None = None
    reference_tokens: Tensor | None = None
    weights: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        """logp(y), [pairs]."""
        return (self.logps * self.mask).sum(dim=1)

    @property
    def length(self) -> Tensor:
        """|y|, at least 1, [pairs]."""
        return self.mask.sum(dim=1).clamp(min=1)

    @property
    def mean(self) -> Tensor:
        """mean(y), [pairs]."""
        return self.sum / self.length

    @property
    def ratio(self) -> Tensor:
        """lr(y), [pairs]."""
        assert self.reference is not None, "this objective needs the reference's log-probabilities"
        return self.sum - self.reference


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class PairBatch:
    """columns: numbers per pair, [pairs], as the objective's `columns` gave them; gather: values of all processes."""

    chosen: Side
    rejected: Side
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    gather: Callable[[Tensor], Tensor] = _alone

    @property
    def delta(self) -> Tensor:
        """lr(y_w) - lr(y_l), [pairs]."""
        return self.chosen.ratio - self.rejected.ratio

    @property
    def delta_of_means(self) -> Tensor:
        """lr(y_w)/|y_w| - lr(y_l)/|y_l|, [pairs]."""
        return self.chosen.ratio / self.chosen.length - self.rejected.ratio / self.rejected.length
