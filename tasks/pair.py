"""pair: rewards to a table of pairs with every metric of theirs, and why the other prompts have none.

Works shard by shard on arrays, without reading texts. The table lies at pairs/<digest>/ (pairs.parquet, drops.parquet,
manifest.json) under a digest of everything that decides it. Metrics that need the whole data set (a scale, z-scores,
the generators' deltas) take a first pass over the rewards.
"""

from __future__ import annotations

import binascii
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.adapt import sample_of
from tasks.ahead import in_order
from tasks.columns import Columns, ShardColumns
from tasks.config import PairingConfig
from tasks.errors import ConfigError
from tasks.forms import CHOSEN, REJECTED
from tasks.ingest import read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import (
    DROPS,
    PAIRED,
    PAIRS,
    SCHEMA_VERSION,
    Counts,
    Pairs,
    Rewards,
    Work,
    digest,
    rounded,
    with_scorers,
)
from tasks.sections import EnsembleConfig
from tasks.selection import pairing
from tasks.selection.adaptive import first_counts
from tasks.selection.agreement import agreement
from tasks.selection.delta import GeneratorDelta, Moments
from tasks.selection.pairing import KEPT, REASONS, Choice
from tasks.selection.posterior import Posterior, Prior, fit_prior, posterior
from tasks.selection.pvar import PooledScale, pvar_with_error
from tasks.selection.ranking import Hashes, uniform
from tasks.store import Store, parquet_options, sealed, signed


def pair(
    config: PairingConfig,
    rewards: Rewards,
    store: Store,
    report: Report = silent,
    ensembles: list[EnsembleConfig] | None = None,
) -> Pairs:
    """The table of pairs by one rule."""
    started = time.monotonic()
    completions = rewards.completions
    columns = Columns(list(config.generators), rewards, ensembles or [], store)
    scorer = _deciding(config, columns)
    table_digest = digest(
        {
            "schema": SCHEMA_VERSION,
            "stage": "pair",
            "columns": PAIRS.names,
            "prompts": completions.prompts.digest,
            "samples": completions.samples,
            "allotment": completions.allotment,
            # PVar's prior is fitted on the first round, of which two ladders to one allotment may differ.
            **({"ladder": list(completions.ladder)} if completions.ladder else {}),
            # Rewards that were missing may be asked for again.
            **({"missing": dict(rewards.counts.dropped)} if rewards.counts.dropped else {}),
            "completions": list(columns.generators.values()),
            "generators": [[name, completions.generators.get(name)] for name in columns.authors],
            "scorer": scorer,
            "scorers": [[name, fingerprint] for name, fingerprint in rewards.scorers.items()],
            "ensembles": [ensemble.model_dump() for ensemble in columns.ensembles],
            **config.model_dump(include={"rule", "reward_scale", "seed"}),
        }
    )
    manifest_path = f"pairs/{table_digest}/manifest.json"
    tables = [f"pairs/{table_digest}/{name}.parquet" for name in ("pairs", "drops")]
    shards = shards_of(store, completions.prompts)
    if {manifest_path, *tables} <= set(store.list(f"pairs/{table_digest}")):
        try:
            counts = Counts(**store.read_object(manifest_path, "counts")["counts"])
        except (AttributeError, TypeError) as error:
            raise store.damaged(manifest_path) from error
        Meter(report, "pair", counts.into, "prompts", reused=counts.into)
        return Pairs(config.name, table_digest, rewards, counts, Work(shards_reused=len(shards)))
    meter = Meter(report, "pair", completions.prompts.counts.out, "prompts")
    survey = _survey(config, columns, scorer, shards)
    with store.room() as folder:
        manifest = _write(config, columns, survey, shards, folder, meter)
        for path in tables:
            store.create_file(path, folder / Path(path).name)
    store.create_json(manifest_path, manifest)
    work = Work(shards_made=len(shards), seconds=time.monotonic() - started)
    return Pairs(config.name, table_digest, rewards, Counts(**manifest["counts"]), work)


def _deciding(config: PairingConfig, columns: Columns) -> str:
    """The scorer whose rewards decide, or are recorded; empty for labelled pairs without any."""
    if config.scorer and config.scorer not in columns.scorers:
        known = ", ".join(columns.scorers) or "none"
        raise ConfigError(f"pair {config.name!r}: scorer: {config.scorer!r} is not one of {known}")
    if not columns.scorers and config.rule not in ("labelled", "generator_delta"):
        raise ConfigError(
            f"pair {config.name!r}: rule {config.rule} goes by rewards, and there are none; use rule: labelled for "
            "pairs that were imported; for other rows name the columns with ratings, as in "
            "import.ratings: [{name: score}], or add a scorer under `score`"
        )
    if config.rule == "labelled" and set(columns.rewards.completions.authors) != {CHOSEN, REJECTED}:
        raise ConfigError(f"pair {config.name!r}: rule labelled is for imported pairs; use best_vs_worst")
    return config.scorer or next(iter(columns.scorers), "")


@dataclass(frozen=True)
class Survey:
    """What is known of the whole data set before the pairs are made. delta: [generators, generators], by authors."""

    scorer: str
    scale: float
    generators: GeneratorDelta
    delta: NDArray[np.float64]
    prior: Prior | None  # of PVar; None without rewards


def _survey(config: PairingConfig, columns: Columns, scorer: str, shards: list[dict[str, Any]]) -> Survey:
    """A pass over the rewards for what the pairs need of the data set; none where they need nothing."""
    pooled, generators = PooledScale(), GeneratorDelta(len(columns.authors))
    members = sorted({member for ensemble in columns.ensembles for member in ensemble.members})
    unknown = [member for member in members if member not in columns.singles]
    if unknown:
        raise ConfigError(f"ensembles: member {unknown[0]!r} is not one of {', '.join(columns.singles)}")
    if members:
        moments: dict[str, Moments] = defaultdict(Moments)
        for arrays in in_order(lambda shard: columns.read(shard, members, texts=False), shards):
            for member in members:
                moments[member].add(arrays.rewards[member])
        columns.moments = moments
    if scorer and (not config.reward_scale or len(columns.authors) > 1):
        for arrays in in_order(lambda shard: columns.read(shard, [scorer], texts=False), shards):
            pooled.add(arrays.rewards[scorer])
            generators.add(arrays.rewards[scorer], arrays.authors)
    scale = config.reward_scale or pooled.value
    delta = generators.delta()
    np.fill_diagonal(delta, 0.0)
    return Survey(scorer, scale, generators, delta, _prior(scorer, scale, columns))


def _prior(scorer: str, scale: float, columns: Columns) -> Prior | None:
    """Fitted on all samples, or on those of the first round where the later ones were asked for by their rewards."""
    if not scorer:
        return None
    completions = columns.rewards.completions
    first = None
    if completions.rounds:
        first = first_counts(completions.prompts.counts.out, completions.ladder)
    return fit_prior(sample_of(scorer, columns, first), scale)


def _write(
    config: PairingConfig, columns: Columns, survey: Survey, shards: list[dict[str, Any]], folder: Path, meter: Meter
) -> dict[str, Any]:
    """Both tables into a local folder; the manifest."""
    others = [scorer for scorer in columns.scorers if scorer != survey.scorer]
    schema = with_scorers(PAIRS, others)
    totals: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    texts: dict[str, str] = {}
    with (
        pq.ParquetWriter(folder / "pairs.parquet", signed(schema), **parquet_options(schema)) as pairs,
        pq.ParquetWriter(folder / "drops.parquet", signed(DROPS), **parquet_options(DROPS)) as drops,
    ):

        def make(item: tuple[int, dict[str, Any]]) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
            return _shard_tables(config, columns, survey, others, schema, *item)

        for (kept, lost, counts), shard in zip(in_order(make, enumerate(shards)), shards, strict=True):
            pairs.write_table(kept)
            drops.write_table(lost)
            totals.update(counts["totals"])
            dropped.update(counts["dropped"])
            sums.update(counts["sums"])
            texts.update(counts["texts"])
            meter.add(shard["rows"])
        # In the table itself, as the store keeps the first that is written: see Texts.
        pairs.add_key_value_metadata({PAIRED: sealed(texts)})
    asked = len(columns.authors) if not columns.imported else 1
    prompts = sum(shard["rows"] for shard in shards)
    took_part = [_step("score", totals["samples"], totals["rated"], "no reward")] if survey.scorer else []
    if not columns.imported:
        took_part = [_step("generate", prompts * asked, totals["answered"], "refused"), *took_part]
    return {
        "counts": {"into": totals["into"], "out": totals["out"], "dropped": dict(sorted(dropped.items()))},
        # Of the generators and the scorers that took part, unlike the run's own counts.
        "took_part": took_part,
        "rule": config.rule,
        "generators": columns.authors,
        "scorer": survey.scorer or None,
        "reward_scale": survey.scale if survey.scorer else None,
        "mean_reward": _mean_rewards(columns, survey, sums),
        "ensembles": [ensemble.model_dump() for ensemble in columns.ensembles],
        "generator_delta": _generator_delta(config, columns, survey),
        "agreement": [
            {
                "scorers": [survey.scorer, other],
                "kendall_tau": _ratio(sums[f"tau.{other}"], sums[f"tau.{other} n"]),
                "flipped": _ratio(sums[f"flipped.{other}"], sums[f"flipped.{other} n"]),
                "prompts": int(sums[f"tau.{other} n"]),
            }
            for other in others
        ],
    }


def _mean_rewards(columns: Columns, survey: Survey, sums: Counter[str]) -> dict[str, float | None]:
    if len(columns.authors) == 1:
        return {columns.authors[0]: _ratio(sums["reward"], sums["reward n"])}
    means = survey.generators.mean()
    return {name: _finite(means[i]) for i, name in enumerate(columns.authors)}


def _generator_delta(config: PairingConfig, columns: Columns, survey: Survey) -> dict[str, Any] | None:
    if config.rule != "generator_delta":
        return None
    return {
        "stronger": columns.authors[0],
        "weaker": columns.authors[1],
        "delta": _finite(survey.delta[0, 1]),
        "standard_error": _finite(survey.generators.error(0, 1)),
        "prompts": int(survey.generators.prompts[0, 1]),
    }


def _finite(value: float) -> float | None:
    return rounded(value) if np.isfinite(value) else None


def _ratio(total: float, n: float) -> float | None:
    return rounded(total / n) if n else None


def _step(stage: str, into: int, out: int, why: str) -> dict[str, Any]:
    return {"stage": stage, "into": into, "out": out, "dropped": {why: into - out} if into > out else {}}


def _choose(config: PairingConfig, rewards: NDArray[np.float64], arrays: ShardColumns, bits: Hashes) -> Choice:
    texts = arrays.texts
    if config.rule == "generator_delta":
        return pairing.generator_delta(rewards, texts, arrays.authors)
    if config.rule == "labelled":
        return pairing.labelled(rewards, texts, arrays.authors)
    if config.rule == "best_vs_worst":
        return pairing.best_vs_worst(rewards, texts)
    draws = uniform(bits, rewards.shape[1], config.seed)
    rule = pairing.best_vs_random if config.rule == "best_vs_random" else pairing.random_pair
    return rule(rewards, texts, draws)


def _shard_tables(
    config: PairingConfig,
    columns: Columns,
    survey: Survey,
    others: list[str],
    schema: pa.Schema,
    index: int,
    shard: dict[str, Any],
) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """The pairs and drops of one shard, and what is to be counted, summed and kept of all."""
    arrays = columns.read(shard)
    prompts = read_shard(columns.store, shard["digest"], ["prompt_id", "source"])
    rewards = arrays.rewards.get(survey.scorer, np.full(arrays.texts.shape, np.nan))
    finite = np.isfinite(rewards).sum(axis=1)
    bits = id_bits(prompts["prompt_id"])
    choice = _choose(config, rewards, arrays, bits)
    variance, error = pvar_with_error(rewards, survey.scale)
    known = posterior(variance, finite, survey.prior) if survey.prior else Posterior(variance, error)
    lost = np.flatnonzero(choice.reason != KEPT)
    keep = np.flatnonzero(choice.reason == KEPT)
    row, chosen, rejected = choice.row[keep], choice.chosen[keep], choice.rejected[keep]

    def sides(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return values[row, chosen], values[row, rejected]

    (best, worst), (longer, shorter), (ours, theirs) = sides(rewards), sides(arrays.tokens), sides(arrays.authors)
    values: dict[str, Any] = {
        "prompt_id": prompts["prompt_id"].take(row).combine_chunks(),
        "id_bits": bits[row],
        "shard": np.full(len(row), index),
        "row": row,
        "source": prompts["source"].take(row).combine_chunks(),
        "chosen_generator": _named(ours, columns.authors),
        "rejected_generator": _named(theirs, columns.authors),
        "chosen_file": _named(arrays.files[row, chosen], arrays.names),
        "rejected_file": _named(arrays.files[row, rejected], arrays.names),
        "chosen_sample": arrays.samples[chosen],
        "rejected_sample": arrays.samples[rejected],
        "score_chosen": best,
        "score_rejected": worst,
        "margin": best - worst,
        "pvar": variance[row],
        "pvar_error": error[row],
        "pvar_posterior": known.mean[row],
        "pvar_posterior_error": known.error[row],
        "rewards_finite": finite[row],
        "generator_delta": survey.delta[ours, theirs],
        "disagreement": _mean_by_row(arrays.disagreement.get(survey.scorer), len(rewards))[row],
        "chosen_tokens": longer,
        "rejected_tokens": shorter,
        "length_difference": longer.astype(np.int64) - shorter,
    }
    sums: Counter[str] = Counter({"reward": np.nansum(rewards), "reward n": finite.sum()})
    for other in others:
        a, b = sides(arrays.rewards[other])
        tau, flipped = agreement(rewards, arrays.rewards[other])
        values |= {f"margin.{other}": a - b, f"tau.{other}": tau[row], f"flipped.{other}": flipped[row]}
        for name, of_prompts in ((f"tau.{other}", tau), (f"flipped.{other}", flipped)):
            sums.update({name: float(np.nansum(of_prompts)), f"{name} n": int(np.isfinite(of_prompts).sum())})
    drops = {
        "prompt_id": prompts["prompt_id"].take(choice.row[lost]).combine_chunks(),
        "reason": _named(choice.reason[lost], list(REASONS)),
        "pvar": variance[choice.row[lost]],
    }
    reasons = np.bincount(choice.reason[lost], minlength=len(REASONS))
    totals = {
        "into": len(choice.row),
        "out": len(row),
        "answered": sum((arrays.authors == author).any(axis=1).sum() for author in range(len(columns.authors))),
        "samples": arrays.present.sum(),
        "rated": finite.sum(),
    }
    counts = {
        "totals": Counter({name: int(n) for name, n in totals.items()}),
        "dropped": Counter({REASONS[i]: int(n) for i, n in enumerate(reasons) if n}),
        "sums": sums,
        "texts": dict(zip(arrays.names, arrays.seals, strict=True)),
    }
    return _table(values, schema), _table(drops, DROPS), counts


def _table(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """NaN becomes null: no value."""
    return pa.table([_array(values[field.name], field.type) for field in schema], schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return values if values.type == kind else values.cast(kind)
    return pa.array(values, from_pandas=True).cast(kind)


def _named(numbers: NDArray[Any], names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), pa.array(names, pa.string()))


def _mean_by_row(values: NDArray[np.float64] | None, rows: int) -> NDArray[np.float64]:
    """Mean over the known values of each row; NaN where there is none."""
    if values is None:
        return np.full(rows, np.nan)
    known = np.isfinite(values)
    n = known.sum(axis=1)
    return np.divide(np.where(known, values, 0.0).sum(axis=1), n, out=np.full(rows, np.nan), where=n > 0)


def id_bits(ids: pa.ChunkedArray | pa.Array) -> Hashes:
    """The first 64 bits of prompt ids, which are digests in hex."""
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if not len(array):
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    letters = memoryview(array.buffers()[2])[offsets[0] : offsets[-1]]
    return np.frombuffer(binascii.unhexlify(letters), ">u8")[::2].astype(np.uint64)
