"""adapt: generate and score in rounds, so that samples go to the prompts whose place in a subset they may change.

After each round every prompt's PVar so far decides whether another step of the ladder pays for it (the mathematics is
in tasks/selection/adaptive.py). Rounds go through the stages and the store like any other samples: a rerun finds what
is there and comes to the same decisions, and a later run with a fixed number of samples makes only the others.

How many samples each prompt has ended with is its allotment; the rounds are kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.columns import Columns
from tasks.generate import generate
from tasks.progress import Report, silent
from tasks.records import PromptSet, Rewards, Work
from tasks.samples import allot
from tasks.score import score
from tasks.sections import GenerateConfig, ScoreConfig
from tasks.selection.adaptive import climb, first_counts, next_round
from tasks.selection.posterior import fit_prior, posterior
from tasks.selection.pvar import PooledScale, pvar
from tasks.store import Store

FITTED_ON = 100_000  # prompts, about; more do not make the prior better
_SHARDS = 16  # at least, so that a source that stands in one place does not speak for all

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def adapt(
    config: GenerateConfig,
    scoring: ScoreConfig,
    prompts: PromptSet,
    store: Store,
    report: Report = silent,
    address: str = "local",
) -> Rewards:
    """The completions after as many rounds as pay, and the rewards that decided. Work is that of all rounds.

    `config.samples` is the fixed number that they are measured by.
    """
    deciding = deciding_scorers(config, scoring)

    def make(allotment: str) -> Rewards:
        completions = generate(config, prompts, store, report, address, allotment)
        return score(deciding, completions, store, report, address)

    adapted = walk(config, deciding.scorers[0].name, prompts, store, make)
    assert adapted
    return adapted


def deciding_scorers(config: GenerateConfig, scoring: ScoreConfig) -> ScoreConfig:
    """The one whose rewards decide."""
    assert config.adaptive
    name = config.adaptive.scorer or scoring.scorers[0].name
    return scoring.model_copy(update={"scorers": [scorer for scorer in scoring.scorers if scorer.name == name]})


def walk(
    config: GenerateConfig, scorer: str, prompts: PromptSet, store: Store, make: Callable[[str], Rewards | None]
) -> Rewards | None:
    """Round by round as the rewards of `scorer` decide.

    make: from an allotment to the rewards of its samples. Where it has none, that is the end, and there are none here.
    """
    settings = config.adaptive
    assert settings
    counts = first_counts(prompts.counts.out, settings.ladder)
    prior, scale, generated, scored = None, 1.0, Work(), Work()
    rounds: list[dict[str, Any]] = []
    while rewards := make(allot(store, counts)):
        completions = rewards.completions
        generated, scored = generated.plus(completions.work), scored.plus(rewards.work)
        columns = Columns([], rewards, [], store)
        if prior is None:
            scale = reward_scale(settings.reward_scale, scorer, columns)
            prior = fit_prior(sample_of(scorer, columns, counts), scale)
        values, finite, tokens, fixed_tokens = _so_far(scorer, columns, scale, config.samples)
        step = next_round(
            posterior(values, finite, prior),
            counts,
            prior,
            settings.fraction,
            quality=settings.quality,
            fixed=config.samples,
            ladder=settings.ladder,
        )
        told = {key: value for key, value in asdict(step).items() if key != "going"}
        rounds.append({**told, "tokens": tokens, "fixed_tokens": fixed_tokens})
        if not step.going.any():
            made = replace(completions, work=generated, ladder=tuple(settings.ladder), rounds=tuple(rounds))
            return replace(rewards, completions=made, work=scored)
        counts = climb(counts, step.going, settings.ladder)
    return None


def reward_scale(wanted: float, scorer: str, columns: Columns) -> float:
    """T of PVar: as configured, or where that is 0 the pooled deviation within prompts of what is there."""
    if wanted:
        return wanted
    pooled = PooledScale()
    for shard in columns.shards:
        pooled.add(columns.read(shard, [scorer], texts=False).rewards[scorer])
    return pooled.value


def sample_of(scorer: str, columns: Columns, counts: Ints | None) -> Floats:
    """Rewards [prompts, samples] to fit a prior on: of evenly spaced prompts, chosen without a look at them.

    counts: how many samples each prompt has in the first round, those it got by its rewards left out; None: all.
    """
    shards = columns.shards
    read = np.ones(len(shards), np.bool_)
    if counts is None:  # in a round, the pilot is spread over all of them
        number = max(_SHARDS, round(len(shards) * FITTED_ON / sum(shard["rows"] for shard in shards)))
        read[:] = False
        read[np.linspace(0, len(shards), min(len(shards), number), endpoint=False).astype(np.int64)] = True
    every = max(1, sum(shard["rows"] for shard, taken in zip(shards, read, strict=True) if taken) // FITTED_ON)
    found, start = [], 0
    for shard, taken in zip(shards, read, strict=True):
        first = counts[start : start + shard["rows"]] if counts is not None else None
        start += shard["rows"]
        if not taken:
            continue
        rewards = columns.read(shard, [scorer], texts=False).rewards[scorer]
        rows = np.arange(len(rewards)) % every == 0
        if first is not None:
            rows |= first > first.min()  # of the pilot
            rewards = np.where(np.arange(rewards.shape[1]) < first[:, None], rewards, np.nan)
        found.append(rewards[rows])
    width = max(rewards.shape[1] for rewards in found)
    wide = [np.pad(rewards, ((0, 0), (0, width - rewards.shape[1])), constant_values=np.nan) for rewards in found]
    return np.concatenate(wide)


def _so_far(scorer: str, columns: Columns, scale: float, fixed: int) -> tuple[Floats, Ints, int, int]:
    """Of each prompt its PVar and finite rewards; tokens spent, and what a fixed number of samples would have cost."""
    values, finite, tokens, fixed_tokens = [], [], 0, 0.0
    for shard in columns.shards:
        arrays = columns.read(shard, [scorer])
        rewards, made = arrays.rewards[scorer], arrays.present.sum(axis=1)
        values.append(pvar(rewards, scale))
        finite.append(np.isfinite(rewards).sum(axis=1))
        spent = np.where(arrays.present, arrays.tokens, 0).sum(axis=1)
        tokens += int(spent.sum())
        fixed_tokens += float((fixed * spent / np.maximum(made, 1)).sum())
    return np.concatenate(values), np.concatenate(finite), tokens, round(fixed_tokens)
