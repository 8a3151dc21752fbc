"""evaluate: a policy against a reference on held-out prompts.

Both answer the same prompts through `generate` and `score`, so everything is kept and reused like any other samples;
this module only compares. The report lies at evaluations/<digest>.json.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks import models
from tasks.columns import Columns
from tasks.config import CompareConfig
from tasks.ingest import read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, Rewards, digest, rounded
from tasks.selection.winrate import win_rate
from tasks.store import Store


def evaluate(config: CompareConfig, rewards: Rewards, store: Store, report: Report = silent) -> dict[str, Any]:
    """Per scorer: mean reward of both, win rate with its standard error, per source; and lengths in tokens."""
    completions = rewards.completions
    shards = shards_of(store, completions.prompts)
    meter = Meter(report, "evaluate", len(shards), "shards")
    columns = Columns([config.policy, config.reference], rewards, [], store)
    read = []
    for shard in shards:
        read.append(columns.read(shard, list(rewards.scorers)))
        meter.add(1)
    sources = np.concatenate([_sources(store, shard["digest"]) for shard in shards])
    scorers = {}
    for name in rewards.scorers:
        both = np.concatenate([arrays.rewards[name] for arrays in read])
        scorers[name] = _compare(both[:, : completions.samples], both[:, completions.samples :])
        scorers[name]["by_source"] = {
            str(source): _compare(both[at, : completions.samples], both[at, completions.samples :])
            for source in np.unique(sources)
            for at in [sources == source]
        }
    tokens = np.concatenate([arrays.tokens for arrays in read]).astype(float)
    present = np.concatenate([arrays.present for arrays in read])
    lengths = _lengths(np.where(present, tokens, np.nan), completions.samples)
    result = {
        "policy": config.policy,
        "reference": config.reference,
        "prompts": completions.prompts.counts.out,
        "samples": completions.samples,
        "generators": dict(completions.generators),
        "made_with": {
            fingerprint: models.facts_of(fingerprint, store)
            for fingerprint in [*completions.generators.values(), *rewards.scorers.values()]
        },
        "scorers": scorers,
        "mean_tokens": lengths,
    }
    store.create_json(f"evaluations/{digest([SCHEMA_VERSION, result])}.json", result)
    return result


def _compare(policy: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    wins = win_rate(policy, reference)
    return {
        "mean_reward": {"policy": _mean(policy), "reference": _mean(reference)},
        "win_rate": round(wins.rate, 6) if wins.prompts else None,
        "standard_error": round(wins.error, 6) if wins.prompts > 1 else None,
        "prompts": wins.prompts,
    }


def _lengths(tokens: np.ndarray, samples: int) -> dict[str, float | None]:
    return {"policy": _mean(tokens[:, :samples]), "reference": _mean(tokens[:, samples:])}


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return rounded(known.mean()) if len(known) else None


def _sources(store: Store, shard: str) -> np.ndarray:
    return np.array(read_shard(store, shard, ["source"])["source"].to_pylist())
