"""Which two samples of a prompt make a pair, or why none do.

best_vs_worst    the highest reward over the lowest, the first of equals (the field's on-policy recipe).
best_vs_random   the highest reward over a random one of the lower ones.
random_pair      two random rewarded samples, the higher reward chosen.
generator_delta  the first sample of the stronger generator over the first of the weaker; no reward is needed (Delta
                 Learning, arXiv 2507.06187; Decomposing the Delta, arXiv 2604.08723). Rewards, if any, are recorded.
labelled         samples 2k and 2k+1 are the chosen and rejected of an imported pair; no reward is needed.

Each rule gives candidates; those that cannot be a pair carry a reason. A pair whose two texts are equal or whose
rewards tie is never emitted. Randomness comes as one uniform number per sample, so the caller decides its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]

REASONS = ("", "fewer than two rewards", "missing sample", "rewards tie", "identical texts")
KEPT, TOO_FEW, MISSING, TIE, SAME = range(len(REASONS))
ABSENT = -1  # in place of a generator: there is no sample


@dataclass(frozen=True)
class Choice:
    """Candidates: row (prompt), chosen and rejected (columns), reason (index into REASONS); all [candidates]."""

    row: Ints
    chosen: Ints
    rejected: Ints
    reason: NDArray[np.int8]


def best_vs_worst(rewards: Floats, texts: Ints) -> Choice:
    """rewards: [prompts, samples], NaN where there is none; texts: digests, same shape."""
    there = np.isfinite(rewards)
    chosen = np.where(there, rewards, -np.inf).argmax(axis=1)
    rejected = np.where(there, rewards, np.inf).argmin(axis=1)
    return _by_reward(rewards, texts, there, chosen, rejected)


def best_vs_random(rewards: Floats, texts: Ints, draws: Floats) -> Choice:
    """As best_vs_worst; draws: a uniform number per sample, the smallest of those with a lower reward is rejected."""
    there = np.isfinite(rewards)
    chosen = np.where(there, rewards, -np.inf).argmax(axis=1)
    lower = there & (rewards < np.take_along_axis(rewards, chosen[:, None], axis=1))
    lower &= texts != np.take_along_axis(texts, chosen[:, None], axis=1)
    rejected = np.where(lower.any(axis=1), np.where(lower, draws, np.inf).argmin(axis=1), chosen)
    return _by_reward(rewards, texts, there, chosen, rejected)


def random_pair(rewards: Floats, texts: Ints, draws: Floats) -> Choice:
    """As best_vs_random; the two samples with the smallest draws, ordered by reward."""
    there = np.isfinite(rewards)
    drawn = np.argsort(np.where(there, draws, np.inf), axis=1, kind="stable")
    first, second = drawn[:, 0], drawn[:, min(1, rewards.shape[1] - 1)]
    row = np.arange(len(rewards))
    swap = rewards[row, first] < rewards[row, second]
    return _by_reward(rewards, texts, there, np.where(swap, second, first), np.where(swap, first, second))


def generator_delta(rewards: Floats, texts: Ints, generators: Ints) -> Choice:
    """generators: [prompts, samples], 0 where the stronger wrote it, 1 the weaker, ABSENT where there is no sample."""
    chosen, rejected = (generators == 0).argmax(axis=1), (generators == 1).argmax(axis=1)
    both = (generators == 0).any(axis=1) & (generators == 1).any(axis=1)
    row = np.arange(len(rewards))
    return Choice(row, chosen, rejected, _reasons(rewards, texts, row, chosen, rejected, ~both, MISSING))


def labelled(rewards: Floats, texts: Ints, generators: Ints) -> Choice:
    """generators: ABSENT where there is no sample. A prompt without any pair is one candidate that misses it."""
    there = generators != ABSENT
    pairs = there[:, 0::2][:, : there.shape[1] // 2] & there[:, 1::2]
    row, k = np.nonzero(pairs)
    bare = np.flatnonzero(~pairs.any(axis=1))
    row, k = np.concatenate([row, bare]), np.concatenate([k, np.zeros(len(bare), k.dtype)])
    position = np.argsort(row, kind="stable")
    row, chosen = row[position], 2 * k[position]
    rejected = np.minimum(chosen + 1, rewards.shape[1] - 1)
    return Choice(row, chosen, rejected, _reasons(rewards, texts, row, chosen, rejected, np.isin(row, bare), MISSING))


def _by_reward(rewards: Floats, texts: Ints, there: Bools, chosen: Ints, rejected: Ints) -> Choice:
    row = np.arange(len(rewards))
    reason = _reasons(rewards, texts, row, chosen, rejected, there.sum(axis=1) < 2, TOO_FEW)
    # Where all rewards tie both sides are one sample: its text says nothing, those of the others do.
    one = np.flatnonzero((chosen == rejected) & (reason == SAME))
    varied = ((texts[one] != texts[one, chosen[one]][:, None]) & there[one]).any(axis=1)
    reason[one[varied]] = TIE
    return Choice(row, chosen, rejected, reason)


def _reasons(
    rewards: Floats, texts: Ints, row: Ints, chosen: Ints, rejected: Ints, unusable: Bools, why: int
) -> NDArray[np.int8]:
    reasons = np.full(len(row), KEPT, dtype=np.int8)
    reasons[rewards[row, chosen] == rewards[row, rejected]] = TIE  # false where a reward is NaN
    reasons[texts[row, chosen] == texts[row, rejected]] = SAME
    reasons[unusable] = why
    return reasons
