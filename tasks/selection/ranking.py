"""Which pairs a subset takes: the top or bottom of an order, with ties broken by a seeded hash.

Integer ratings and verifiers tie often; a tie broken by position would favour whatever came first in the input. The
hash of (seed, prompt id) is the same on every machine, so the same pairs are taken. `random` is that hash alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def order(values: NDArray[np.float64], ties: NDArray[np.uint64], keep: str = "top") -> NDArray[np.int64]:
    """Row numbers from first to last taken; rows whose value is NaN are left out.

    values: [pairs]; ties: `hashes` of their prompt ids; keep: "top" takes large values first, "bottom" small ones.
    """
    ordered = np.lexsort((ties, values))
    ordered = ordered[~np.isnan(values[ordered])]
    return ordered[::-1] if keep == "top" else ordered  # so that top and bottom share no tied row before they must


def hashes(ids: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """A uniform 64-bit number per id, for a seed."""
    key = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8, key=key).digest() for i in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def size(available: int, fraction: float | None, count: int | None) -> int:
    """How many of the available pairs to take: a share, rounded, but at least one; or a number, at most all."""
    if fraction is not None:
        return min(available, max(1, round(available * fraction)))
    assert count is not None
    return min(available, count)
