"""ingest: prompts from files into a prompt set of immutable shards.

The input streams: rows are read, checked, de-duplicated (on disk, by digest) and cut into shards one after the other,
so memory stays flat however long the input is. A bad row is quarantined with its reason. Prompts that were cut into
shards before are cut alike in every later source, so that what was paid for them is found again.
"""

from __future__ import annotations

import math
import re
import sqlite3
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import ConfigError, RunError
from tasks.progress import Meter, Report, silent
from tasks.prompts import to_prompt
from tasks.records import PROMPTS, QUARANTINE, SCHEMA_VERSION, Counts, PromptSet, Work, digest
from tasks.rows import BadRow
from tasks.sections import IngestConfig, SourceConfig
from tasks.sources import read_rows, source_digest
from tasks.store import Store

_BLOCK = 1000  # rows between two progress reports
_MARK = re.compile(r"prompts/cuts/(?P<first>[0-9a-f]+)\.(?P<rows>\d{1,9})\.(?P<name>[0-9a-f]+)")


def ingest(config: IngestConfig, store: Store, report: Report = silent) -> PromptSet:
    """The prompt set of a source. A source that was read before with the same settings is not read again."""
    started = time.monotonic()
    known = known_prompts(config, store)
    if known:
        Meter(report, "ingest", known.counts.into, "rows", reused=known.counts.into)
        work = Work(shards_reused=len(shards_of(store, known)), seconds=time.monotonic() - started)
        return replace(known, work=work)
    inputs = inputs_digest(config)
    with tempfile.TemporaryDirectory() as folder:
        prompts, quarantine = _read(config, store, Path(folder), Meter(report, "ingest", 0, "rows"))
        if inputs_digest(config) != inputs:
            raise RunError(f"ingest.source {config.source!r} changed while it was read; run again")
        store.create_file(f"prompts/sources/{inputs}.quarantine.parquet", quarantine)
    counts = {"into": prompts.counts.into, "out": prompts.counts.out, "dropped": prompts.counts.dropped}
    store.create_json(pointer(inputs), {"set": prompts.digest, "counts": counts, "source": config.source})
    return replace(prompts, work=Work(prompts.work.shards_made, seconds=time.monotonic() - started))


def known_prompts(config: IngestConfig, store: Store) -> PromptSet | None:
    """The prompt set of a source that was read before, with the same content and settings, if it is all there."""
    inputs = inputs_digest(config)
    if not store.exists(pointer(inputs)):
        return None
    known = store.read_object(pointer(inputs), "set", "counts")
    try:
        counts = Counts(**known["counts"])
    except (AttributeError, TypeError) as error:
        raise store.damaged(pointer(inputs)) from error
    check_share(config, counts, lambda: examples_of(store, inputs))
    prompts = PromptSet(known["set"], counts)
    return prompts if all_there(store, prompts) else None


def all_there(store: Store, prompts: PromptSet) -> bool:
    """Whether nobody removed a file of a prompt set, as is advised for damaged ones."""
    if not store.exists(_manifest(prompts.digest)):
        return False
    there = set(store.list("prompts/shards"))
    return all(shard_path(shard["digest"]) in there for shard in shards_of(store, prompts))


def inputs_digest(config: SourceConfig) -> str:
    """Of a source's content and all settings that decide what is made of it."""
    settings = config.model_dump(exclude={"source", "max_quarantined"})
    return digest({"schema": SCHEMA_VERSION, "stage": config.stage, "content": source_digest(config), **settings})


def pointer(inputs: str) -> str:
    return f"prompts/sources/{inputs}.json"


def _manifest(prompt_set: str) -> str:
    return f"prompts/{prompt_set}/manifest.json"


def shards_of(store: Store, prompts: PromptSet) -> list[dict[str, Any]]:
    """The shards of a prompt set in order: [{"digest": of its rows, "prompts": of its prompt ids, "rows": how many}].

    Completions depend on the prompts alone: they stand under `prompts`, so that another source label or a further kept
    column does not pay for them again.
    """
    path = _manifest(prompts.digest)
    shards = store.read_object(path, "shards")["shards"]
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise store.damaged(path)
    return shards


def _is_shard(told: Any) -> bool:
    kinds = {"digest": str, "prompts": str, "rows": int}
    return isinstance(told, dict) and all(isinstance(told.get(key), kind) for key, kind in kinds.items())


def read_shard(store: Store, shard: str, columns: list[str] | None = None) -> pa.Table:
    """One shard's rows (records.PROMPTS)."""
    return store.read_table(shard_path(shard), columns)


def shard_path(shard: str) -> str:
    return f"prompts/shards/{shard}.parquet"


def _read(config: IngestConfig, store: Store, folder: Path, meter: Meter) -> tuple[PromptSet, Path]:
    """Read everything; the prompt set, and a local file with the quarantined rows."""
    writer = ShardWriter(store, config.shard_size)
    seen = _Seen(folder / "seen.sqlite")
    quarantine = Quarantine(folder / "quarantine.parquet")
    dropped: Counter[str] = Counter()
    examples: list[str] = []
    into = 0
    for row, into in read_rows(config):
        try:
            prompt = to_prompt(row, config)
        except BadRow as bad:
            dropped[bad.reason] += 1
            quarantine.add(into, bad)
            if len(examples) < 3:
                examples.append(example(into, bad.reason, bad.excerpt))
        else:
            if seen.add(prompt["prompt_id"]):
                writer.add(prompt)
            else:
                dropped["duplicate"] += 1
        if into % _BLOCK == 0:
            meter.add(_BLOCK)
    meter.add(into % _BLOCK)
    counts = Counts(into, writer.rows, dict(dropped))
    set_digest = writer.close()
    check_share(config, counts, lambda: examples)
    return PromptSet(set_digest, counts, Work(shards_made=len(writer.shards))), quarantine.close()


def check_share(config: SourceConfig, counts: Counts, examples: Callable[[], list[str]], unit: str = "rows") -> None:
    """Duplicates are no fault; everything else dropped counts against max_quarantined."""
    if counts.out == 0:
        why = f"; dropped: {dict(counts.dropped)}. {' | '.join(examples())}" if counts.into else ""
        raise ConfigError(f"{config.stage}.source {config.source!r} holds no usable prompt ({counts.into} {unit}{why})")
    bad = counts.into - counts.out - counts.dropped.get("duplicate", 0)
    if bad > math.floor(config.max_quarantined * counts.into):
        raise RunError(
            f"{config.stage}: {bad} of {counts.into} {unit} are bad, more than max_quarantined "
            f"{config.max_quarantined:.0%}: {dict(counts.dropped)}. {' | '.join(examples())}"
        )


def examples_of(store: Store, inputs: str) -> list[str]:
    """The first rows that were quarantined when a source was read."""
    rows = store.read_table(f"prompts/sources/{inputs}.quarantine.parquet").slice(0, 3).to_pylist()
    return [example(row["row"], row["reason"], row["excerpt"]) for row in rows]


def example(row: int, reason: str, excerpt: str) -> str:
    return f"row {row}: {reason}: {excerpt[:80]}"


class ShardWriter:
    """Cuts rows into shards: where they were cut before, as late as possible, and otherwise at shard_size.

    Every shard leaves a mark, an empty file prompts/cuts/<first key>.<rows>.<name>, where the name is a digest of its
    rows' keys: what generators and scorers depend on, so that another source label or a further kept column does not
    pay for them again.
    """

    def __init__(self, store: Store, shard_size: int) -> None:
        self.store, self.shard_size = store, shard_size
        self.cuts: dict[str, list[tuple[int, str]]] = defaultdict(list)  # first key -> rows, digest of all keys
        for mark in store.list("prompts/cuts"):
            if named := _MARK.fullmatch(mark):
                self.cuts[named["first"]].append((int(named["rows"]), named["name"]))
        self.shards: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.rows = 0

    def key(self, row: dict[str, Any]) -> str:
        return row["prompt_id"]

    def beside(self, shard: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write what belongs to a shard beside its prompts; for those that import more than prompts."""

    def add(self, row: dict[str, Any]) -> None:
        self.open.append(row)
        self.rows += 1
        if len(self.open) == self.shard_size:
            self._cut()

    def close(self) -> str:
        """Write what is left and the manifest; returns the prompt set's digest."""
        while self.open:
            self._cut()
        set_digest = digest(self.shards)
        self.store.create_json(_manifest(set_digest), {"shards": self.shards})
        return set_digest

    def _cut(self) -> None:
        keys = [self.key(row) for row in self.open]
        known = [(n, name) for n, name in self.cuts.get(keys[0], []) if n <= len(keys) and digest(keys[:n]) == name]
        number, name = max(known, default=(len(keys), digest(keys)))
        rows, self.open = self.open[:number], self.open[number:]
        prompts = [{column: row[column] for column in PROMPTS.names} for row in rows]
        shard: dict[str, Any] = {"digest": digest(prompts), "prompts": name, "rows": number}
        self.beside(shard, rows)
        self.store.create_table(shard_path(shard["digest"]), pa.Table.from_pylist(prompts, schema=PROMPTS))
        if not known:
            self.store.create(f"prompts/cuts/{keys[0]}.{number}.{name}", b"")
        self.shards.append(shard)


class _Seen:
    """Which prompt ids were there; on disk, so that memory stays flat."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536;")
        self.db.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self.db.execute("BEGIN")

    def add(self, prompt_id: str) -> bool:
        """True when it is new."""
        return self.db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (bytes.fromhex(prompt_id),)).rowcount == 1


class Quarantine:
    """Bad rows, written to a local file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer = pq.ParquetWriter(path, QUARANTINE, compression="zstd")
        self.open: list[dict[str, Any]] = []

    def add(self, row: int, bad: BadRow) -> None:
        self.open.append({"row": row, "reason": bad.reason, "excerpt": bad.excerpt[:500]})
        if len(self.open) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.open, schema=QUARANTINE))
        self.open = []

    def close(self) -> Path:
        self._flush()
        self.writer.close()
        return self.path
