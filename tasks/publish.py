"""publish: a selection becomes an immutable version that people and trainers read as it is.

subsets/<name>/<version>/ holds data/*.parquet (conversational prompt, chosen and rejected, and the numbers that explain
each row), a data set card and the manifest. Texts are read shard by shard, so memory does not grow with the subset.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import models
from tasks.card import dataset_card
from tasks.config import PublishConfig, SubsetConfig
from tasks.generate import samples_in
from tasks.ingest import read_shard, shards_of
from tasks.pair import iter_pairs
from tasks.progress import Meter, Report, silent
from tasks.records import PREFERENCES, SCHEMA_VERSION, Counts, Selection, Version, Work, digest
from tasks.store import Store
from tasks.subset import selection_path
from tasks.versions import find_build, publish_folder, remember_build

_COPIED = [name for name in PREFERENCES.names if name not in ("prompt", "chosen", "rejected", "rank")]


def publish(
    config: PublishConfig, subset: SubsetConfig, selection: Selection, store: Store, report: Report = silent
) -> Version:
    """Publish a selection; a selection that was published before is found again."""
    started = time.monotonic()
    lineage = _lineage(subset, selection, store)
    inputs = digest({"schema": SCHEMA_VERSION, "stage": "publish", "lineage": lineage, **config.model_dump()})
    known = find_build(store, "subsets", selection.name, inputs)
    if known:
        Meter(report, "publish", known.counts.into, "rows", reused=known.counts.into)
        return known
    meter = Meter(report, "publish", selection.counts.out, "rows")
    with tempfile.TemporaryDirectory() as folder:
        room, target = Path(folder) / "room", Path(folder) / "version"
        summary = _write_rows(config, selection, store, room, target / "data", meter)
        counts = {"into": selection.counts.out, "out": summary["rows"], "dropped": {}}
        content = {"name": selection.name, "counts": counts, "summary": summary, **lineage}
        (target / "README.md").write_text(dataset_card(config, content), encoding="utf-8")
        version = publish_folder(store, "subsets", selection.name, target, content)
    remember_build(store, version, inputs)
    return Version(version.name, version.version, version.counts, Work(seconds=time.monotonic() - started))


def _lineage(subset: SubsetConfig, selection: Selection, store: Store) -> dict[str, Any]:
    """How a subset came about, without anything that differs between two makings of it or did not take part in it."""
    rewards = selection.pairs.rewards
    completions = rewards.completions
    pairs = store.read_json(f"pairs/{selection.pairs.digest}/manifest.json")
    return {
        "kind": "preference pairs",
        "subset": subset.model_dump(exclude={"name", "pairs"}),
        "pairing": {
            "name": selection.pairs.name,
            **{key: pairs[key] for key in ("rule", "generators", "scorer", "reward_scale", "mean_reward")},
        },
        "funnel": [
            _step("ingest", completions.prompts.counts),
            *pairs["took_part"],
            _step("pair", selection.pairs.counts),
            _step("subset", selection.counts),
        ],
        "parents": {
            "prompts": completions.prompts.digest,
            "samples": completions.samples,
            "generators": {name: completions.generators[name] for name in pairs["generators"]},
            "scorers": {pairs["scorer"]: rewards.scorers[pairs["scorer"]]},
            "pairs": selection.pairs.digest,
            "selection": selection.digest,
        },
        "made_with": {
            fingerprint: models.facts_of(fingerprint, store)
            for fingerprint in [
                *(completions.generators[name] for name in pairs["generators"]),
                rewards.scorers[pairs["scorer"]],
            ]
        },
    }


def _step(stage: str, counts: Counts) -> dict[str, Any]:
    return {"stage": stage, "into": counts.into, "out": counts.out, "dropped": dict(sorted(counts.dropped.items()))}


def _write_rows(
    config: PublishConfig, selection: Selection, store: Store, room: Path, target: Path, meter: Meter
) -> dict[str, Any]:
    """Write all rows into numbered Parquet files; their number and the means of their metrics."""
    target.mkdir(parents=True)
    metrics = ("pvar", "margin", "score_chosen", "score_rejected", "chosen_tokens", "rejected_tokens")
    sums: dict[str, list[float]] = {name: [0.0, 0] for name in metrics}
    writer, written = None, 0
    for table in _tables(selection, store, room):
        while table.num_rows:
            file, used = divmod(written, config.rows_per_file)
            if used == 0:
                if writer:
                    writer.close()
                writer = pq.ParquetWriter(target / f"train-{file:05d}.parquet", PREFERENCES, compression="zstd")
            piece, table = table.slice(0, config.rows_per_file - used), table.slice(config.rows_per_file - used)
            assert writer
            writer.write_table(piece)
            written += piece.num_rows
            meter.add(piece.num_rows)
            for name in metrics:
                values = piece[name].drop_null().to_numpy()
                sums[name] = [sums[name][0] + float(values.sum()), sums[name][1] + len(values)]
    if writer:
        writer.close()
    means = {name: round(total / n, 6) if n else None for name, (total, n) in sums.items()}
    return {"rows": written, **{f"mean_{name}": mean for name, mean in means.items()}}


def _tables(selection: Selection, store: Store, room: Path) -> Iterator[pa.Table]:
    """The subset's rows, with texts, a prompt shard at a time."""
    texts = _Texts(selection, store)
    chosen = store.read_table(selection_path(selection.pairs, selection.digest))
    rows, ranks = chosen["pair"].to_numpy(), chosen["rank"].to_numpy()
    start = 0
    for batch in iter_pairs(store, selection.pairs, room):
        low, high = np.searchsorted(rows, [start, start + batch.num_rows])
        taken = pa.Table.from_batches([batch]).take(rows[low:high] - start)
        taken = taken.append_column("rank", pa.array(ranks[low:high]))
        start += batch.num_rows
        shards = taken["shard"].to_numpy()
        for shard in np.unique(shards):
            yield texts.join(int(shard), taken.filter(pa.array(shards == shard)))


class _Texts:
    """Looks up prompts and completions of one shard at a time."""

    def __init__(self, selection: Selection, store: Store) -> None:
        self.store = store
        self.shards = shards_of(store, selection.pairs.rewards.completions.prompts)

    def join(self, shard: int, pairs: pa.Table) -> pa.Table:
        name = self.shards[shard]["digest"]
        prompts = read_shard(self.store, name, ["messages"])["messages"].take(pairs["row"])
        files = {*pairs["chosen_file"].to_pylist(), *pairs["rejected_file"].to_pylist()}
        texts = {file: self.store.read_table(file, ["texts"])["texts"].to_pylist() for file in files}

        def side(which: str) -> list[list[dict[str, str]]]:
            columns = [pairs[f"{which}_file"], pairs["row"], pairs[f"{which}_sample"]]
            places = zip(*(column.to_pylist() for column in columns), strict=True)
            return [
                [{"role": "assistant", "content": texts[file][row][sample - samples_in(file)[0]]}]
                for file, row, sample in places
            ]

        columns = {
            "prompt": prompts,
            "chosen": side("chosen"),
            "rejected": side("rejected"),
            "rank": pairs["rank"],
            **{column: pairs[column] for column in _COPIED},
        }
        return pa.table({column: columns[column] for column in PREFERENCES.names}, schema=PREFERENCES)
