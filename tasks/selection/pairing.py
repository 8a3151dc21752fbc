"""Which two samples of a prompt make its pair, or why none do.

best_vs_worst: the highest reward against the lowest, the first of equals.
generator_delta: the first sample of the stronger generator against the first of the weaker; no reward is needed
(Delta Learning, arXiv 2507.06187; Decomposing the Delta, arXiv 2604.08723). Rewards, if any, are recorded.

A pair whose two texts are equal or whose rewards tie is never emitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

KEPT = ""
TOO_FEW = "fewer than two rewards"
MISSING = "missing sample"
TIE = "rewards tie"
SAME = "identical texts"


@dataclass(frozen=True)
class Choice:
    """chosen, rejected: column of each prompt's pair, [prompts]; reason: KEPT or why there is none, [prompts]."""

    chosen: Ints
    rejected: Ints
    reason: NDArray[np.object_]


def best_vs_worst(rewards: Floats, texts: Ints) -> Choice:
    """rewards: [prompts, samples], NaN where there is none; texts: digests, same shape."""
    there = np.isfinite(rewards)
    chosen = np.where(there, rewards, -np.inf).argmax(axis=1)
    rejected = np.where(there, rewards, np.inf).argmin(axis=1)
    too_few = there.sum(axis=1) < 2
    first = np.take_along_axis(texts, chosen[:, None], axis=1)
    # Where all rewards tie both sides are the same sample: its text says nothing, those of the others do.
    all_same = ((texts == first) | ~there).all(axis=1)
    same = np.where(chosen == rejected, all_same, _same(texts, chosen, rejected))
    return Choice(chosen, rejected, _reasons(rewards, same, chosen, rejected, too_few, TOO_FEW))


def generator_delta(rewards: Floats, texts: Ints, present: Bools, stronger: int, weaker: int) -> Choice:
    """stronger, weaker: column of each generator's first sample; present: where there is a sample at all."""
    chosen = np.full(len(rewards), stronger)
    rejected = np.full(len(rewards), weaker)
    absent = ~(present[:, stronger] & present[:, weaker])
    same = _same(texts, chosen, rejected)
    return Choice(chosen, rejected, _reasons(rewards, same, chosen, rejected, absent, MISSING))


def _same(texts: Ints, chosen: Ints, rejected: Ints) -> Bools:
    row = np.arange(len(texts))
    return texts[row, chosen] == texts[row, rejected]


def _reasons(
    rewards: Floats, same: Bools, chosen: Ints, rejected: Ints, unusable: Bools, why: str
) -> NDArray[np.object_]:
    row = np.arange(len(rewards))
    tie = rewards[row, chosen] == rewards[row, rejected]  # false where a reward is NaN
    reasons = np.full(len(rewards), KEPT, dtype=object)
    reasons[tie] = TIE
    reasons[same] = SAME
    reasons[unusable] = why
    return reasons
