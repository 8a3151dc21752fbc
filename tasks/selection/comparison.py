"""How sure a difference between trained policies is, with few seeds and many prompts.

Policies are random effects: the value of seed s on prompt i is taken to be mu + a_s + b_i + e_si, with the seed's own
effect a (another order of the pairs trains another policy), the prompt's b and the rest e. The question is about mu,
for other seeds and other prompts than these. So both are resampled, each level on its own (the pigeonhole bootstrap of
Owen 2007, arXiv 0712.1111), with two corrections without which few seeds look far too sure:

- Resampling S seed means draws from their spread around their own mean, too small by (S-1)/S, and takes it as known.
  Each draw is widened by sqrt(S/(S-1)) and by sqrt((S-1)/chi2_{S-1}), which makes it one of Student's t.
- The rest e is in the spread of the seed means and again in that of the prompt means. The prompts' part is shrunk by
  what e puts into it (analysis of variance, method of moments), down to 0.

A single seed has no spread: the interval then speaks of other prompts for that one policy. Differences are taken seed
by seed and prompt by prompt before anything is resampled, so what both arms share drops out.

Several differences are tested step by step (Holm 1979): the clearest of m at alpha / m, the next at alpha / (m-1),
until the first that is not distinguishable from 0; all that follow are not either. Each interval has the level of its
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 20_000
_CELLS = 4_000_000  # drawn at once

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and prompts; deviation of the seeds' means; bounds of the interval. NaN where unknown."""

    mean: float
    deviation: float
    low: float
    high: float
    prompts: int


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline. level: error rate that the interval was given, after the correction."""

    mean: float
    deviation: float
    low: float
    high: float
    prompts: int
    p: float
    level: float
    distinguishable: bool


def estimate(values: Floats, alpha: float = 0.05, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """values: [seeds, prompts], NaN where there is none; a prompt that any seed lacks is left out."""
    known = complete(values)
    low, high = bounds(replicates(known, resamples, seed), alpha)
    return Estimate(_mean(known), _deviation(known), low, high, known.shape[1])


def differences(
    pairs: Mapping[str, tuple[Floats, Floats]], alpha: float = 0.05, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """pairs: by name an arm and its baseline, each [seeds, prompts] with rows of the same seeds."""
    apart = {name: complete(arm - baseline) for name, (arm, baseline) in pairs.items()}
    drawn = {name: replicates(values, resamples, seed) for name, values in apart.items()}
    p = {name: p_value(draws) for name, draws in drawn.items()}
    found = {}
    for name, level in holm(p, alpha).items():
        low, high = bounds(drawn[name], level)
        values = apart[name]
        clear = p[name] <= level
        found[name] = Difference(_mean(values), _deviation(values), low, high, values.shape[1], p[name], level, clear)
    return {name: found[name] for name in pairs}


def complete(values: Floats) -> Floats:
    """The prompts that all seeds have."""
    return values[:, np.isfinite(values).all(axis=0)]


def replicates(values: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """What mu may be, [resamples], sorted. values: [seeds, prompts], all finite. Empty without two prompts."""
    seeds, prompts = values.shape
    if prompts < 2 or seeds < 1:
        return np.empty(0)
    rng = np.random.default_rng(seed)
    mean = values.mean()
    of_prompts, of_seeds = values.mean(axis=0) - mean, values.mean(axis=1) - mean
    rest = values - mean - of_prompts - of_seeds[:, None]
    draws = np.full(resamples, mean)
    draws += _resampled(of_prompts, resamples, rng) * _own_share(of_prompts, rest)
    if seeds > 1:
        stretch = np.sqrt(seeds / rng.chisquare(seeds - 1, resamples))
        draws += _resampled(of_seeds, resamples, rng) * stretch
    return np.sort(draws)


def bounds(draws: Floats, level: float) -> tuple[float, float]:
    """The interval that leaves half of `level` out at each end. draws: sorted. NaN without draws."""
    if not len(draws):
        return float("nan"), float("nan")
    place = max(int(level / 2 * (len(draws) + 1)), 1)
    return float(draws[place - 1]), float(draws[-place])


def p_value(draws: Floats) -> float:
    """The level from which on the interval leaves 0 out. draws: sorted. 1 without draws."""
    if not len(draws):
        return 1.0
    beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return float(min(1.0, 2 * (beyond + 1) / (len(draws) + 1)))


def holm(p: Mapping[str, float], alpha: float) -> dict[str, float]:
    """The level at which each is tested, the clearest first; from the first failure on the level stays."""
    levels: dict[str, float] = {}
    left, failed = len(p), False
    for name in sorted(p, key=lambda name: p[name]):
        levels[name] = alpha / left
        failed = failed or p[name] > alpha / left
        left -= not failed
    return levels


def _own_share(of_prompts: Floats, rest: Floats) -> float:
    """How much of the spread of the prompts' means is their own, and not the rest's; as a factor of deviations."""
    seeds, prompts = rest.shape
    spread = float((of_prompts**2).sum()) / (prompts - 1)
    if seeds < 2 or not spread:
        return 1.0
    noise = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1)) / seeds
    return float(np.sqrt(max(0.0, 1.0 - noise / spread)))


def _resampled(effects: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means of as many effects, drawn with replacement."""
    number = len(effects)
    rows = max(_CELLS // number, 1)
    parts = [
        effects[rng.integers(0, number, (min(rows, resamples - start), number))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")


def _deviation(values: Floats) -> float:
    return float(values.mean(axis=1).std(ddof=1)) if values.size and len(values) > 1 else float("nan")
