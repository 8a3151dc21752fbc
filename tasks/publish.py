"""publish: a selection becomes an immutable version that people and trainers read as it is.

subsets/<name>/<version>/ holds data/*.parquet (conversational prompt, chosen and rejected, and the numbers that explain
each row), a report, a data set card and the manifest. Texts are read shard by shard, so memory does not grow with the
subset.
"""

from __future__ import annotations

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
from tasks.errors import RunError
from tasks.explain import explain
from tasks.ingest import read_shard, shards_of
from tasks.pairtable import PairTable, open_pairs
from tasks.progress import Meter, Report, silent
from tasks.records import (
    MESSAGES,
    PREFERENCES,
    SCHEMA_VERSION,
    Counts,
    Selection,
    Version,
    Work,
    digest,
    rounded,
    texts_seal,
    with_scorers,
)
from tasks.report import report_html
from tasks.samples import held_by, rows_of
from tasks.store import Store, parquet_options
from tasks.subset import selection_path
from tasks.versions import find_build, publish_folder, remember_build

_TEXTS = ("prompt", "chosen", "rejected")
_SHOWN = 20  # rows at either end of the ranking, in the report
_ROWS = 4096  # joined and written at once: as much text as is held in memory


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
    with store.room() as folder:
        ends = _Ends(selection.counts.out)
        summary = _write_rows(config, selection, store, folder / "data", meter, ends)
        counts = {"into": selection.counts.out, "out": summary["rows"], "dropped": {}}
        explanation = explain(subset, selection, store)
        content = {"name": selection.name, "counts": counts, "summary": summary, **lineage, "explanation": explanation}
        (folder / "README.md").write_text(dataset_card(config, content), encoding="utf-8")
        (folder / "report.html").write_text(report_html(content, ends.highest, ends.lowest), encoding="utf-8")
        files = len(list((folder / "data").iterdir()))
        version = publish_folder(store, "subsets", selection.name, folder, content)
    remember_build(store, version, inputs)
    work = Work(shards_made=files, seconds=time.monotonic() - started)
    return Version(version.name, version.version, version.counts, work)


def _lineage(subset: SubsetConfig, selection: Selection, store: Store) -> dict[str, Any]:
    """How a subset came about, without anything that differs between two makings of it or did not take part in it."""
    rewards = selection.pairs.rewards
    completions = rewards.completions
    facts = ("rule", "generators", "scorer", "reward_scale", "mean_reward", "agreement", "generator_delta", "ensembles")
    manifest = f"pairs/{selection.pairs.digest}/manifest.json"
    pairs = store.read_object(manifest, "generators", "took_part", *facts)
    first = _step("import", completions.counts) if completions.authors else _step("ingest", completions.prompts.counts)
    used = [name for name in completions.generators if completions.authors or name in pairs["generators"]]
    generators = {name: completions.generators[name] for name in used}
    return {
        "kind": "preference pairs",
        "subset": subset.model_dump(exclude={"name", "pairs", "controls"}),
        "control": selection.control,
        "pairing": {"name": selection.pairs.name, **{key: pairs[key] for key in facts}},
        "funnel": [
            first,
            *pairs["took_part"],
            _step("pair", selection.pairs.counts),
            _step("subset", selection.counts),
        ],
        "length_unit": completions.length_unit,
        "adaptive": {"ladder": list(completions.ladder), "rounds": list(completions.rounds)}
        if completions.rounds
        else None,
        "parents": {
            "prompts": completions.prompts.digest,
            "samples": completions.samples,
            "allotment": completions.allotment or None,
            "generators": generators,
            "scorers": dict(rewards.scorers),
            "pairs": selection.pairs.digest,
            "selection": selection.digest,
        },
        "made_with": {
            fingerprint: models.facts_of(fingerprint, store)
            for fingerprint in [*generators.values(), *rewards.scorers.values()]
        },
    }


def _step(stage: str, counts: Counts) -> dict[str, Any]:
    return {"stage": stage, "into": counts.into, "out": counts.out, "dropped": dict(sorted(counts.dropped.items()))}


class _Ends:
    """The first and the last rows of a ranking, as they come by in any order."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.highest: list[dict[str, Any]] = []
        self.lowest: list[dict[str, Any]] = []

    def look(self, table: pa.Table) -> None:
        rank = table["rank"].to_numpy()
        for row in table.filter(pa.array(rank < _SHOWN)).to_pylist():
            self.highest.append(row)
        for row in table.filter(pa.array((rank >= self.rows - _SHOWN) & (rank >= _SHOWN))).to_pylist():
            self.lowest.append(row)
        self.highest.sort(key=lambda row: row["rank"])
        self.lowest.sort(key=lambda row: -row["rank"])


def _write_rows(
    config: PublishConfig, selection: Selection, store: Store, folder: Path, meter: Meter, ends: _Ends
) -> dict[str, Any]:
    """Write all rows into numbered Parquet files; their number and the means of their metrics."""
    folder.mkdir(parents=True)
    metrics = ("pvar", "margin", "score_chosen", "score_rejected", "chosen_tokens", "rejected_tokens")
    sums: dict[str, list[float]] = {name: [0.0, 0] for name in metrics}
    writer, written = None, 0
    for table in _regular(_tables(selection, store)):
        ends.look(table)
        while table.num_rows:
            file, used = divmod(written, config.rows_per_file)
            if used == 0:
                if writer:
                    writer.close()
                options = parquet_options(table.schema)
                writer = pq.ParquetWriter(folder / f"train-{file:05d}.parquet", table.schema, **options)
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
    means = {name: rounded(total / n) if n else None for name, (total, n) in sums.items()}
    return {"rows": written, **{f"mean_{name}": mean for name, mean in means.items()}}


def _regular(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of _ROWS, which become row groups: a subset takes few rows of a shard."""
    open_: list[pa.Table] = []
    rows = 0
    for table in tables:
        open_.append(table)
        rows += table.num_rows
        if rows >= _ROWS:
            yield pa.concat_tables(open_)
            open_, rows = [], 0
    if open_:
        yield pa.concat_tables(open_)


def _tables(selection: Selection, store: Store) -> Iterator[pa.Table]:
    """The subset's rows, with texts, at most a prompt shard at a time."""
    chosen = store.read_table(selection_path(selection.pairs, selection.digest))
    rows, ranks = chosen["pair"].to_numpy(), chosen["rank"].to_numpy()
    start = 0
    with open_pairs(store, selection.pairs) as pairs:
        texts = Texts(store, pairs)
        further = [name.removeprefix("margin.") for name in pairs.schema.names if name.startswith("margin.")]
        schema = with_scorers(PREFERENCES, further)
        for batch in pairs.batches():
            low, high = np.searchsorted(rows, [start, start + batch.num_rows])
            taken = pa.Table.from_batches([batch]).take(rows[low:high] - start)
            taken = taken.append_column("rank", pa.array(ranks[low:high]))
            start += batch.num_rows
            shard = taken["shard"].to_numpy()
            cuts = np.flatnonzero(np.diff(shard)) + 1  # the pairs of a shard stand together
            for first, last in zip([0, *cuts], [*cuts, len(shard)], strict=True):
                for at in range(first, last, _ROWS):
                    yield texts.join(int(shard[at]), taken.slice(at, min(_ROWS, last - at)), schema)


class Texts:
    """Looks up prompts and completions of the pairs of one shard at a time."""

    def __init__(self, store: Store, table: PairTable) -> None:
        self.store, self.rows_of = store, rows_of(store)
        self.shards = shards_of(store, table.pairs.rewards.completions.prompts)
        self.made_of, self.seals = f"pairs/{table.pairs.digest}", table.seals
        self.held: tuple[int, dict[str, pa.ListArray]] = (-1, {})  # a shard, and columns of its files

    def join(self, shard: int, pairs: pa.Table, schema: pa.Schema) -> pa.Table:
        """Pairs of one shard with their texts, as conversations: those columns of both that the schema names."""
        if shard != self.held[0]:
            self.held = (shard, {})
        columns = {
            "prompt": self._prompts(self.shards[shard]["digest"]).take(pairs["row"].combine_chunks()),
            "chosen": self._side(pairs, "chosen"),
            "rejected": self._side(pairs, "rejected"),
        }
        copied = {f.name: pairs[f.name].cast(f.type) for f in schema if f.name not in _TEXTS}
        return pa.table({name: {**columns, **copied}[name] for name in schema.names}, schema=schema)

    def _side(self, pairs: pa.Table, which: str) -> pa.ListArray:
        """The texts of one side as conversations of one message."""
        files = pairs[f"{which}_file"].combine_chunks().dictionary_encode()
        rows, samples = pairs["row"].to_numpy(), pairs[f"{which}_sample"].to_numpy()
        numbers = files.indices.to_numpy()
        parts, order = [], []
        for number, file in enumerate(files.dictionary.to_pylist()):
            mine, held = np.flatnonzero(numbers == number), held_by(file)
            lists, part = self._texts(file), self.rows_of(held)
            inside = rows[mine] if part is None else np.searchsorted(part, rows[mine])
            places = lists.offsets.to_numpy()[inside] + samples[mine] - held.first
            parts.append(lists.values.take(pa.array(places)))
            order.append(mine)
        texts = pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(order))))
        roles = pa.repeat(pa.scalar("assistant"), len(texts))
        messages = pa.StructArray.from_arrays([roles, texts], fields=list(MESSAGES.value_type))
        return pa.ListArray.from_arrays(pa.array(np.arange(len(texts) + 1, dtype=np.int32)), messages)

    def _texts(self, file: str) -> pa.ListArray:
        if file not in self.held[1]:
            table = self.store.read_table(file, ["texts", "text_digests"])
            if self.seals is not None and self.seals.get(file) != texts_seal(table["text_digests"]).decode():
                raise RunError(f"{file} has other texts now than {self.made_of} was made of; remove that and run again")
            self.held[1][file] = table["texts"].combine_chunks()
        return self.held[1][file]

    def _prompts(self, shard: str) -> pa.ListArray:
        if shard not in self.held[1]:
            self.held[1][shard] = read_shard(self.store, shard, ["messages"])["messages"].combine_chunks()
        return self.held[1][shard]
