"""pair: rewards to a table of pairs, one per prompt at most, and why the other prompts have none.

Works shard by shard on arrays, without reading texts: completions carry digests of theirs. The table lies at
pairs/<digest>/ (pairs.parquet, drops.parquet, manifest.json) under a digest of everything that decides it.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.config import PairingConfig
from tasks.generate import completions_path, covering, existing_ranges
from tasks.ingest import read_shard, shards_of
from tasks.progress import Meter, Report, silent
from tasks.records import DROPS, FILE, PAIRS, SCHEMA_VERSION, Completions, Counts, Pairs, Rewards, Work, digest
from tasks.score import rewards_path
from tasks.selection.pairing import KEPT, Choice, best_vs_worst, generator_delta
from tasks.selection.pvar import PooledScale, pvar
from tasks.store import Store


def pair(config: PairingConfig, rewards: Rewards, store: Store, report: Report = silent) -> Pairs:
    """The table of pairs by one rule."""
    started = time.monotonic()
    completions = rewards.completions
    generators = list(config.generators or completions.generators)
    scorer = config.scorer or next(iter(rewards.scorers))
    table_digest = digest(
        {
            "schema": SCHEMA_VERSION,
            "stage": "pair",
            "prompts": completions.prompts.digest,
            "samples": completions.samples,
            "generators": [[name, completions.generators[name]] for name in generators],
            "scorer": [scorer, rewards.scorers[scorer]],
            "rule": config.rule,
            "reward_scale": config.reward_scale,
        }
    )
    manifest_path = f"pairs/{table_digest}/manifest.json"
    shards = shards_of(store, completions.prompts)
    if store.exists(manifest_path):
        counts = Counts(**store.read_json(manifest_path)["counts"])
        Meter(report, "pair", counts.into, "prompts", reused=counts.into)
        return Pairs(config.name, table_digest, rewards, counts, Work(shards_reused=len(shards)))
    meter = Meter(report, "pair", completions.prompts.counts.out, "prompts")
    columns = Columns(generators, completions, rewards.scorers[scorer], store)
    scale = config.reward_scale or _pooled_scale(columns, shards)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _write(config, columns, scale, shards, Path(folder), meter)
        store.create_file(f"pairs/{table_digest}/pairs.parquet", Path(folder) / "pairs.parquet")
        store.create_file(f"pairs/{table_digest}/drops.parquet", Path(folder) / "drops.parquet")
    manifest |= {"rule": config.rule, "generators": generators, "scorer": scorer, "reward_scale": scale}
    store.create_json(manifest_path, manifest)
    work = Work(shards_made=len(shards), seconds=time.monotonic() - started)
    return Pairs(config.name, table_digest, rewards, Counts(**manifest["counts"]), work)


@dataclass(frozen=True)
class ShardColumns:
    """One prompt shard as arrays; a column is one sample of one generator.

    rewards: [prompts, columns], NaN where there is none; texts: digests, tokens: lengths, present: whether there is a
    sample, all of the same shape; files: of completions, per column.
    """

    rewards: NDArray[np.float64]
    texts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    present: NDArray[np.bool_]
    files: list[str]


class Columns:
    """Reads completions and rewards of some generators side by side. Column g * samples + i is sample i of the g-th."""

    def __init__(self, generators: list[str], completions: Completions, scorer: str, store: Store) -> None:
        self.store, self.scorer = store, scorer
        self.generators, self.samples = generators, completions.samples
        self.fingerprints = [completions.generators[name] for name in generators]
        self.ranges = [existing_ranges(store, f"rewards/{scorer}/{fingerprint}") for fingerprint in self.fingerprints]

    def name(self, column: int) -> str:
        return self.generators[column // self.samples]

    def read(self, shard: dict[str, Any]) -> ShardColumns:
        rewards, texts, tokens, present = [], [], [], []
        files: list[str] = []
        for fingerprint, ranges in zip(self.fingerprints, self.ranges, strict=True):
            # A scorer names all its files by one of the two; see tasks/score.py.
            rated = shard["prompts"] if shard["prompts"] in ranges else shard["digest"]
            for (first, last), part in covering(ranges[rated], self.samples):
                source = completions_path(fingerprint, shard["prompts"], (first, last))
                made = self.store.read_table(source, ["text_digests", "tokens"])
                scored = self.store.read_table(
                    rewards_path(self.scorer, fingerprint, rated, (first, last)), ["rewards"]
                )
                width = last - first
                files += [source] * (part.stop - part.start)
                here, digests = dense(made["text_digests"], width, 0)
                present.append(here[:, part])
                texts.append(digests[:, part])
                tokens.append(dense(made["tokens"], width, 0)[1][:, part])
                rewards.append(dense(scored["rewards"], width, np.nan)[1][:, part])
        return ShardColumns(np.hstack(rewards), np.hstack(texts), np.hstack(tokens), np.hstack(present), files)


def dense(lists: pa.ChunkedArray, width: int, fill: Any) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """A column of lists, each full or empty, as an array [rows, width], and where there was an entry."""
    array = lists.combine_chunks()
    lengths = np.diff(array.offsets.to_numpy())
    assert set(np.unique(lengths)) <= {0, width}, "a list of samples is neither full nor empty"
    flat = array.flatten()
    values = flat.fill_null(fill).to_numpy(zero_copy_only=False)
    result = np.full((len(array), width), fill, dtype=values.dtype)
    full = lengths == width
    result[full] = values.reshape(-1, width)
    return np.repeat(full[:, None], width, axis=1), result


def _pooled_scale(columns: Columns, shards: list[dict[str, Any]]) -> float:
    pooled = PooledScale()
    for shard in shards:
        pooled.add(columns.read(shard).rewards)
    return pooled.value


def _write(
    config: PairingConfig, columns: Columns, scale: float, shards: list[dict[str, Any]], folder: Path, meter: Meter
) -> dict[str, Any]:
    """Both tables into a local folder; the counts and the generators' mean rewards."""
    into, out, dropped = 0, 0, Counter[str]()
    answered = samples = rated = 0
    sums, numbers = np.zeros(len(columns.generators)), np.zeros(len(columns.generators))
    with (
        pq.ParquetWriter(folder / "pairs.parquet", PAIRS, compression="zstd") as pairs,
        pq.ParquetWriter(folder / "drops.parquet", DROPS, compression="zstd") as drops,
    ):
        for index, shard in enumerate(shards):
            arrays = columns.read(shard)
            choice = _choose(config, columns, arrays)
            variance = pvar(arrays.rewards, scale)
            prompts = read_shard(columns.store, shard["digest"], ["prompt_id", "source"])
            kept = np.flatnonzero(choice.reason == KEPT)
            lost = np.flatnonzero(choice.reason != KEPT)
            pairs.write_table(_pairs_table(columns, arrays, choice, variance, prompts, index, kept))
            drops.write_table(
                pa.table(
                    [
                        prompts["prompt_id"].take(lost),
                        pa.array(choice.reason[lost].tolist(), pa.string()),
                        pa.array(variance[lost], from_pandas=True),
                    ],
                    schema=DROPS,
                )
            )
            into, out = into + shard["rows"], out + len(kept)
            dropped.update(choice.reason[lost].tolist())
            answered += int(arrays.present[:, :: columns.samples].sum())
            samples += int(arrays.present.sum())
            rated += int(np.isfinite(arrays.rewards).sum())
            by_generator = arrays.rewards.reshape(len(arrays.rewards), len(columns.generators), -1)
            sums += np.nansum(by_generator, axis=(0, 2))
            numbers += np.isfinite(by_generator).sum(axis=(0, 2))
            meter.add(shard["rows"])
    means = {
        name: round(float(total / n), 6) if n else None
        for name, total, n in zip(columns.generators, sums, numbers, strict=True)
    }
    asked = into * len(columns.generators)
    return {
        "counts": {"into": into, "out": out, "dropped": dict(sorted(dropped.items()))},
        # Of the generators and the scorer that took part, unlike the run's own counts.
        "took_part": [
            _step("generate", asked, answered, "refused"),
            _step("score", samples, rated, "no reward"),
        ],
        "mean_reward": means,
    }


def _step(stage: str, into: int, out: int, why: str) -> dict[str, Any]:
    return {"stage": stage, "into": into, "out": out, "dropped": {why: into - out} if into > out else {}}


def _choose(config: PairingConfig, columns: Columns, arrays: ShardColumns) -> Choice:
    if config.rule == "generator_delta":
        return generator_delta(arrays.rewards, arrays.texts, arrays.present, 0, columns.samples)
    return best_vs_worst(arrays.rewards, arrays.texts)


def _pairs_table(
    columns: Columns,
    arrays: ShardColumns,
    choice: Choice,
    variance: NDArray[np.float64],
    prompts: pa.Table,
    shard: int,
    kept: NDArray[np.int64],
) -> pa.Table:
    chosen, rejected = choice.chosen[kept], choice.rejected[kept]
    best, worst = arrays.rewards[kept, chosen], arrays.rewards[kept, rejected]
    values: list[Any] = [
        prompts["prompt_id"].take(kept).combine_chunks(),
        pa.array(np.full(len(kept), shard), pa.int32()),
        pa.array(kept, pa.int32()),
        prompts["source"].take(kept).combine_chunks(),
        pa.array([columns.name(c) for c in chosen], pa.string()),
        pa.array([arrays.files[c] for c in chosen], FILE),
        pa.array(chosen % columns.samples, pa.int32()),
        pa.array([columns.name(c) for c in rejected], pa.string()),
        pa.array([arrays.files[c] for c in rejected], FILE),
        pa.array(rejected % columns.samples, pa.int32()),
        pa.array(best, from_pandas=True),
        pa.array(worst, from_pandas=True),
        pa.array(best - worst, from_pandas=True),
        pa.array(variance[kept], from_pandas=True),
        pa.array(np.isfinite(arrays.rewards[kept]).sum(axis=1), pa.int32()),
        pa.array(arrays.tokens[kept, chosen], pa.int32()),
        pa.array(arrays.tokens[kept, rejected], pa.int32()),
    ]
    return pa.table(values, schema=PAIRS)


def iter_pairs(store: Store, pairs: Pairs, folder: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The table of pairs in pieces; `folder` is local room for a copy of the file."""
    local = store.fetch(f"pairs/{pairs.digest}/pairs.parquet", folder / f"{pairs.digest}.parquet")
    yield from pq.ParquetFile(local).iter_batches(batch_size=16_384, columns=columns)
