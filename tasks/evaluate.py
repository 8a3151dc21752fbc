"""evaluate: a policy against a reference on held-out prompts.

Both answer the same prompts through `generate`; reward models, functions and pointwise judges rate the answers through
`score`, pairwise judges compare them through `duel`. All of that is kept and reused; this module only counts. By
rewards, every sample of the one meets every sample of the other; by a pairwise judge, sample i meets sample i, and
wins where both orders say so. What the numbers mean is in docs/evaluation.md. The report lies at
evaluations/<digest>.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import models
from tasks.columns import Columns
from tasks.config import CompareConfig
from tasks.duel import read_grades, texts_of
from tasks.errors import RunError
from tasks.ingest import read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, Duels, Rewards, digest, rounded
from tasks.samples import wanted_of
from tasks.selection.arena import agreed, arena_score, points_of
from tasks.selection.lengthcontrol import Controlled, controlled, length_controlled
from tasks.selection.style import FEATURES, differences, markdown_counts
from tasks.selection.winrate import WinRate, mean_points, meetings
from tasks.store import Store

ENOUGH = 30  # prompts, for a fit of two or three numbers
BOOTSTRAPS = 200
_GRADES = {2: "much_better", 1: "better", 0: "tie", -1: "worse", -2: "much_worse"}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Sides:
    """What is known of all samples, apart from what anybody thinks of them.

    tokens: lengths of policy and reference, [2, prompts, samples], NaN where there is no sample; style: counts,
    [2, prompts, samples, features], or None; difficulty: [prompts], or None; sources: [prompts].
    """

    tokens: Floats
    style: Floats | None
    difficulty: Floats | None
    sources: NDArray[Any]

    def at(self, rows: Any) -> _Sides:
        return _Sides(
            self.tokens[:, rows],
            None if self.style is None else self.style[:, rows],
            None if self.difficulty is None else self.difficulty[rows],
            self.sources[rows],
        )


def evaluate(
    config: CompareConfig, rewards: Rewards, store: Store, report: Report = silent, duels: Duels | None = None
) -> dict[str, Any]:
    """Per scorer and source: win rate, raw and with length controlled, with standard errors; and lengths in tokens."""
    completions = rewards.completions
    shards = shards_of(store, completions.prompts)
    meter = Meter(report, "evaluate", len(shards), "shards")
    columns = Columns([config.policy, config.reference], rewards, [], store)
    read = []
    for shard in shards:
        read.append(columns.read(shard, list(rewards.scorers)))
        meter.add(1)
    number = completions.samples
    tokens = np.concatenate([np.where(one.present, one.tokens, np.nan) for one in read])
    sides = _Sides(
        np.stack(_halves(tokens, number)),
        _style(config, rewards, store, tokens) if config.style else None,
        _difficulty(config, shards, store) if config.difficulty else None,
        np.concatenate([_column(store, shard, "source") for shard in shards]),
    )
    scorers = {}
    for name in rewards.scorers:
        both = _halves(np.concatenate([arrays.rewards[name] for arrays in read]), number)
        scorers[name] = _by_source(sides, _by_rewards, *both)
    if duels:
        for name in duels.judges:
            parts = zip(*read_grades(store, duels, name, config), strict=True)
            scorers[name] = _by_source(sides, _by_grades, *(np.concatenate(part) for part in parts))
    fingerprints = [*rewards.scorers.values(), *(duels.judges.values() if duels else [])]
    result = {
        "policy": config.policy,
        "reference": config.reference,
        "prompts": completions.prompts.counts.out,
        "samples": completions.samples,
        "generators": dict(completions.generators),
        "made_with": {
            fingerprint: models.facts_of(fingerprint, store)
            for fingerprint in [*completions.generators.values(), *fingerprints]
        },
        "scorers": scorers,
        "mean_tokens": _lengths(sides),
    }
    store.create_json(f"evaluations/{digest([SCHEMA_VERSION, result])}.json", result)
    return result


# --- one scorer


@dataclass(frozen=True)
class _Compared:
    """points: the policy's, [prompts, meetings]; sample_of: which samples met, of policy and of reference."""

    points: Floats
    sample_of: tuple[NDArray[np.int64], NDArray[np.int64]]
    about: dict[str, Any]  # what else there is to say


def _by_source(sides: _Sides, compare: Callable[..., _Compared], *judged: Floats) -> dict[str, Any]:
    """The comparison over all prompts, and of each source alone. judged: arrays [prompts, samples]."""
    rows = {str(source): np.flatnonzero(sides.sources == source) for source in np.unique(sides.sources)}
    parts = {source: _summary(compare(*(array[at] for array in judged)), sides.at(at)) for source, at in rows.items()}
    return {**_summary(compare(*judged), sides), "by_source": parts}


def _by_rewards(policy: Floats, reference: Floats) -> _Compared:
    number = policy.shape[1]
    samples = np.repeat(np.arange(number), number), np.tile(np.arange(number), number)
    about = {"mean_reward": {"policy": _mean(policy), "reference": _mean(reference)}}
    return _Compared(meetings(policy, reference), samples, about)


def _by_grades(first: Floats, second: Floats) -> _Compared:
    """By a pairwise judge: what it said in each order, how often both agree, and how often the first place won."""
    each = np.arange(first.shape[1])
    known = np.isfinite(first)
    points = agreed(first, second)
    same = np.sign(first[known]) == np.sign(second[known])
    places = np.concatenate([points_of(first[known]), 1 - points_of(second[known])])
    score = arena_score(np.hstack([first, second]), BOOTSTRAPS)
    about = {
        "mean_reward": {"policy": None, "reference": None},
        "judge": {
            "shown_first": _counted(first),
            "shown_second": _counted(second),
            "consistency": _mean(same.astype(float)),
            "first_place": _mean(places),
        },
        "arena": {
            "score": _rounded(score.score),
            "standard_error": _rounded(score.error),
            "low": _rounded(score.low),
            "high": _rounded(score.high),
            "games": score.games,
            "bootstraps": BOOTSTRAPS,
        },
    }
    return _Compared(points, (each, each), about)


def _counted(grades: Floats) -> dict[str, int]:
    return {name: int((grades == grade).sum()) for grade, name in _GRADES.items()}


def _summary(compared: _Compared, sides: _Sides) -> dict[str, Any]:
    points, (mine, others) = compared.points, compared.sample_of
    raw = mean_points(points)
    longer = sides.tokens[0][:, mine] - sides.tokens[1][:, others]
    found = {
        **compared.about,
        **_rate(raw),
        "length_controlled": None,
        "mean_tokens": _lengths(sides),
        "verdicts": {
            "wins": int((points == 1).sum()),
            "ties": int((points == 0.5).sum()),
            "losses": int((points == 0).sum()),
        },
    }
    if raw.prompts >= ENOUGH:
        lc = length_controlled(points, longer, sides.difficulty)
        found["length_controlled"] = {**_controlled(lc), "length_effect": _rounded(float(lc.effects[0]))}
    if sides.style is not None:
        found["style_controlled"] = None
        if raw.prompts >= ENOUGH:
            dressed = differences(sides.style[0][:, mine], sides.style[1][:, others])
            sc = controlled(points, dressed, sides.difficulty)
            effects = {name: _rounded(float(value)) for name, value in zip(FEATURES, sc.effects, strict=True)}
            found["style_controlled"] = {**_controlled(sc), "effects": effects}
    return found


def _rate(raw: WinRate) -> dict[str, Any]:
    return {
        "win_rate": _rounded(raw.rate),
        "standard_error": _rounded(raw.error),
        "prompts": raw.prompts,
    }


def _controlled(found: Controlled) -> dict[str, Any]:
    return {
        "win_rate": _rounded(found.rate),
        "standard_error": _rounded(found.error),
        "prompts": found.prompts,
        "difficulty_effect": _rounded(found.difficulty),
    }


# --- what is known of the samples


def _style(config: CompareConfig, rewards: Rewards, store: Store, tokens: Floats) -> Floats:
    """Counts of both sides, [2, prompts, samples, features], read shard by shard; NaN where there is no text."""
    completions = rewards.completions
    lengths = np.stack(_halves(tokens, completions.samples))
    style = np.full((*lengths.shape, len(FEATURES)), np.nan)
    style[..., 0] = lengths
    for side, name in enumerate((config.policy, config.reference)):
        start = 0
        for shard, number in wanted_of(store, completions):
            texts = texts_of(store, completions.generators[name], shard["prompts"], number)
            for row, mine in enumerate(texts, start):
                for sample, text in enumerate(mine):
                    if text is not None:
                        style[side, row, sample, 1:] = markdown_counts(text)
            start += shard["rows"]
    return style


def _difficulty(config: CompareConfig, shards: list[dict[str, Any]], store: Store) -> Floats:
    """A kept column as numbers, centred and scaled to a deviation of 1."""
    values = []
    for shard in shards:
        for fields in _column(store, shard, "fields"):
            value = json.loads(fields).get(config.difficulty)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RunError(
                    f"evaluate.difficulty: a prompt has {value!r} in column {config.difficulty!r}, which is no number"
                )
            values.append(float(value))
    found = np.array(values)
    spread = found.std()
    return (found - found.mean()) / (spread if spread > 0 else 1.0)


def _column(store: Store, shard: dict[str, Any], name: str) -> NDArray[Any]:
    return np.array(read_shard(store, shard["digest"], [name])[name].to_pylist())


def _halves(both: Floats, samples: int) -> tuple[Floats, Floats]:
    """Of policy and reference."""
    return both[:, :samples], both[:, samples:]


def _lengths(sides: _Sides) -> dict[str, float | None]:
    return {"policy": _mean(sides.tokens[0]), "reference": _mean(sides.tokens[1])}


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return rounded(known.mean()) if len(known) else None


def _rounded(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
