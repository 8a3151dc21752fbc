"""Adaptive PVar: the same top subset for fewer completions.

Samples are made in rounds that climb a ladder of counts (3, 4, 6, 8, ...). After each round the question per prompt is
whether its next step pays: it costs completions, and may move the prompt over or under the cut. With the posterior of
`tasks.selection.posterior` this is optimal stopping. For a cut c and a price l per completion, the value of a prompt
whose x = 4 PVar has posterior mean u at step k of the ladder is

    V_k(u) = max( max(u - c, 0),  E[V_{k+1}(u')] - l (n_{k+1} - n_k) )

where u', the posterior mean after the next step, is spread about u with the variance that the step is expected to take
off the posterior. So surely low and surely high prompts stop first, and those near the cut go furthest. c is the cut at
which the expected subset has its size, and l the highest price at which its expected mean PVar is still the wanted
share of what a fixed number of samples for everybody would give (Lagrangian relaxation of the budget; Whittle 1988).

The subset is the top of the posterior means, so that a prompt stopped early on two lucky samples does not win by its
noise. Everything works on numbers per prompt and on a grid of GRID means: memory O(prompts), order of samples and of
prompts without influence.

The promise rests on the model. In benchmarks/adaptive.py the real quality fell short of it by up to 0.025, and by at
most 0.01 at a quality of 1 (more, up to 0.06, on 783 rated prompts, whose pilot is below 80): ask for 1 where 0.99 must
hold. Covariates helped a little on one data set and hurt on another.

Degenerate: a prompt whose PVar is undefined counts as an average one when it is decided who goes on, and is never in
the subset; a fraction of 1, equal rewards everywhere or one prompt leave nothing to decide, and nobody goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tasks.selection.posterior import MOST, Floats, Ints, Posterior, Prior, pilot

Mask = NDArray[np.bool_]

LADDER = (3, 4, 6, 8, 12, 16, 24)
PILOT, PILOT_SHARE, PILOT_SAMPLES = 400, 0.1, 8  # prompts at most, of all, and their samples
LEAST = 0.005  # a round for a smaller share of the prompts is not worth an engine's start
GRID = np.linspace(0, 1, 201) ** 1.5  # of posterior means; finer at the low end, where most prompts lie
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)


@dataclass(frozen=True)
class Round:
    """What a round leaves, and what the model of the rewards expects of the rest."""

    going: Mask  # [prompts]: which get their next step's samples
    prompts: int
    completions: int  # so far
    undecided: int  # go on
    inside: int  # stopped, and in the subset as it stands
    outside: int
    expected_completions: float  # in the end
    fixed_completions: int  # what the fixed number of samples would have cost
    expected_quality: float  # mean true PVar of the final subset over that of the fixed subset
    expected_overlap: float  # share of the subset as it stands that the fixed number of samples would choose too


@dataclass(frozen=True)
class _Plan:
    go: list[Mask]  # per step, [GRID]
    cost: float  # completions still to be made
    gain: float  # sum of x over the expected subset


def first_counts(prompts: int, ladder: Sequence[int] = LADDER) -> Ints:
    """Completions of the first round, [prompts]: the first step, but more for the pilot that the prior is fitted on."""
    counts = np.full(prompts, ladder[0], dtype=np.int64)
    more = next((n for n in ladder if n >= PILOT_SAMPLES), ladder[-1])
    counts[pilot(prompts, min(PILOT, max(1, round(prompts * PILOT_SHARE))))] = more
    return counts


def climb(counts: Ints, going: Mask, ladder: Sequence[int] = LADDER) -> Ints:
    """Completions per prompt once those that go on have got their next step's."""
    steps = np.array([*ladder[1:], ladder[-1]])[np.searchsorted(ladder, counts)]
    return np.where(going, steps, counts)


def next_round(
    found: Posterior,
    counts: Ints,
    prior: Prior,
    fraction: float,
    *,
    quality: float = 0.99,
    fixed: int = 16,
    ladder: Sequence[int] = LADDER,
) -> Round:
    """Who goes on, and what is expected. counts: completions made per prompt, each a step of the ladder.

    fraction: the subset's share of prompts; quality: the least expected share of the mean true PVar of the subset that
    `fixed` samples for everybody would choose.
    """
    u = np.where(np.isfinite(found.mean), found.mean / MOST, prior.mean)
    size = min(len(u), max(1, round(len(u) * fraction)))
    steps = np.searchsorted(ladder, counts)
    crowd = np.stack([_crowd(u[steps == k]) for k in range(len(ladder))])
    later = [_forward(prior, a, b) for a, b in pairwise(ladder)]
    at_fixed = [_to_fixed(prior, n, fixed) for n in ladder]
    chosen, fixed_gain = _fixed_subset(crowd, ladder, at_fixed, size, fixed)
    low, high = np.log(1e-7), 0.0  # of the price of a completion, in x
    for _ in range(14):
        price = (low + high) / 2
        enough = _plan(crowd, ladder, later, size, np.exp(price)).gain >= quality * fixed_gain
        low, high = (price, high) if enough else (low, price)
    plan = _plan(crowd, ladder, later, size, np.exp(low))
    decided = size == len(u) or not np.nanmax(found.error, initial=0.0) > 0
    going = np.zeros(len(u), dtype=bool)
    inside = np.zeros(len(u), dtype=bool)
    inside[top(found.mean, size)] = True
    overlap = np.zeros(len(u))
    for k in range(len(ladder)):
        here = steps == k
        overlap[here] = np.interp(u[here], GRID, chosen[k])
        if k + 1 < len(ladder) and not decided:
            going[here] = np.interp(u[here], GRID, plan.go[k].astype(np.float64)) > 0.5
    if going.sum() < LEAST * len(u):
        going[:] = False
    completions = int(counts.sum())
    return Round(
        going=going,
        prompts=len(u),
        completions=completions,
        undecided=int(going.sum()),
        inside=int((inside & ~going).sum()),
        outside=int((~inside & ~going).sum()),
        expected_completions=completions + (0.0 if decided else plan.cost),
        fixed_completions=fixed * len(u),
        expected_quality=plan.gain / fixed_gain if fixed_gain > 0 else 1.0,
        expected_overlap=float(overlap[inside].mean()) if inside.any() else 1.0,
    )


def top(means: Floats, size: int) -> Ints:
    """The rows of the `size` largest means, fewer where fewer are defined; of equals the first."""
    ordered = np.argsort(-means, kind="stable")
    known: Ints = ordered[np.isfinite(means[ordered])]
    return known[:size]


def _plan(crowd: Floats, ladder: Sequence[int], later: list[Floats], size: int, price: float) -> _Plan:
    """The best stopping rule at a price, with the cut at which the expected subset has its size.

    crowd: prompts per step and grid point, [steps, GRID].
    """
    low, high = 0.0, 1.0
    for _ in range(18):
        cut = (low + high) / 2
        go, kept, cost, gain = _stopping(ladder, later, cut, price)
        selected = float((crowd * kept).sum())
        low, high = (cut, high) if selected > size else (low, cut)
    return _Plan(go, float((crowd * cost).sum()), float((crowd * gain).sum()) + (size - selected) * cut)


def _stopping(
    ladder: Sequence[int], later: list[Floats], cut: float, price: float
) -> tuple[list[Mask], Floats, Floats, Floats]:
    """Per step and grid point: whether to go on, the chance to be kept, completions still made, expected x if kept."""
    stop = np.column_stack([np.maximum(GRID - cut, 0.0), _above(cut), np.zeros(len(GRID)), _above(cut) * GRID])
    go, states = [np.zeros(len(GRID), dtype=bool)], [stop]  # value, kept, cost, gain
    for k in range(len(ladder) - 2, -1, -1):
        samples = ladder[k + 1] - ladder[k]
        on = later[k] @ states[0] + samples * np.array([-price, 0.0, 1.0, 0.0])
        better = on[:, 0] > stop[:, 0]
        go.insert(0, better)
        states.insert(0, np.where(better[:, None], on, stop))
    _, kept, cost, gain = np.moveaxis(np.stack(states), 2, 0)
    return go, kept, cost, gain


def _fixed_subset(
    crowd: Floats, ladder: Sequence[int], at_fixed: list[Floats], size: int, fixed: int
) -> tuple[list[Floats], float]:
    """The chance per step and grid point to be in the fixed subset, and the expected sum of x over that."""
    low, high = 0.0, 1.0
    for _ in range(18):
        cut = (low + high) / 2
        chance = [move @ _above(cut) for move in at_fixed]
        selected = sum(float(c @ p) for c, p in zip(crowd, chance, strict=True))
        low, high = (cut, high) if selected > size else (low, cut)
    gain = (size - selected) * cut
    for n, row, move, p in zip(ladder, crowd, at_fixed, chance, strict=True):
        # before `fixed` samples their outcome tells about x; after it x is known better than they tell
        gain += float(row @ (move @ (GRID * _above(cut)) if n < fixed else GRID * p))
    return chance, gain


def _above(cut: float) -> Floats:
    """[GRID]: 1 above the cut, 0 below it, a ramp of one grid step between, so that it moves smoothly with the cut."""
    return np.clip((GRID - cut) / np.gradient(GRID) + 0.5, 0.0, 1.0)


def _crowd(u: Floats) -> Floats:
    """[GRID]: numbers of prompts, each shared between its two neighbours so that the sum of u is kept."""
    left, share = _neighbours(u)
    here, above = np.bincount(left, 1 - share, len(GRID)), np.bincount(left + 1, share, len(GRID))
    return np.asarray(here + above, dtype=np.float64)


def _neighbours(u: Floats) -> tuple[Ints, Floats]:
    """The grid point below each u, and how far u is on the way to the next one, in [0, 1]."""
    left = np.clip(np.searchsorted(GRID, u, side="right") - 1, 0, len(GRID) - 2).astype(np.int64)
    return left, np.clip((u - GRID[left]) / (GRID[left + 1] - GRID[left]), 0.0, 1.0)


def _forward(prior: Prior, n: int, more: int) -> Floats:
    """[GRID, GRID]: the distribution of the posterior mean after `more` samples, from each one after n."""
    before, after = prior.strength + prior.weight(np.array([n, more]))
    variance = GRID * (1 - GRID) * (after - before) / ((before + 1) * after)
    return _blur(GRID, np.sqrt(np.maximum(variance, 0.0)))


def _to_fixed(prior: Prior, n: int, fixed: int) -> Floats:
    """The same for the first `fixed` samples of n that were made, or still to be made."""
    if n <= fixed:
        return _forward(prior, n, fixed)
    all_of_them, first = prior.weight(np.array([n, fixed]))
    # x_fixed given x_n has mean x_n and what Var(x_fixed) exceeds Var(x_n) by; then both are shrunk
    x = (GRID * (prior.strength + all_of_them) - prior.strength * prior.mean) / all_of_them
    deviation = np.sqrt(GRID * (1 - GRID) * max(1 / first - 1 / all_of_them, 0.0))
    shrink = first / (prior.strength + first)
    return _blur(prior.mean + shrink * (x - prior.mean), shrink * deviation)


def _blur(mean: Floats, deviation: Floats) -> Floats:
    """[GRID, GRID]: row i spreads one prompt as a logit-normal stretched to that mean and deviation.

    Skewed away from the nearer end of [0, 1], as a distribution of means on an interval is: a normal one has too few
    low prompts rise to the cut.
    """
    mean = np.clip(mean, 1e-6, 1 - 1e-6)
    shape = np.minimum(deviation / (mean * (1 - mean)), 3.0)
    share = WEIGHTS / WEIGHTS.sum()
    nodes = 1 / (1 + np.exp(-np.log(mean / (1 - mean))[:, None] - shape[:, None] * NODES))  # [GRID, nodes]
    off = nodes - (nodes @ share)[:, None]
    width = np.sqrt(off**2 @ share)
    nodes = mean[:, None] + off * np.divide(deviation, width, out=np.zeros(len(mean)), where=width > 0)[:, None]
    move = np.zeros((len(GRID), len(GRID)))
    rows = np.arange(len(GRID))
    for node, weight in zip(np.clip(nodes, 0.0, 1.0).T, share, strict=True):
        left, part = _neighbours(node)
        np.add.at(move, (rows, left), weight * (1 - part))
        np.add.at(move, (rows, left + 1), weight * part)
    return move
