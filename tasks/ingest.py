"""ingest: prompts from files into a prompt set of immutable shards.

The input streams: rows are read, checked, de-duplicated (on disk, by digest) and cut into shards one after the other,
so memory stays flat however long the input is. A bad row is quarantined with its reason. Prompts that were cut into
shards before are cut alike in every later source, so that what was paid for them is found again.
"""

from __future__ import annotations

import json
import math
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

from tasks.config import ColumnsConfig, IngestConfig
from tasks.errors import ConfigError, RunError
from tasks.progress import Meter, Report, silent
from tasks.records import PROMPTS, QUARANTINE, SCHEMA_VERSION, Counts, PromptSet, Work, digest
from tasks.sources import BadRow, read_rows, source_digest
from tasks.store import Store

_ROLES = {"system", "user", "assistant", "tool"}
_BLOCK = 1000  # rows between two progress reports


def ingest(config: IngestConfig, store: Store, report: Report = silent) -> PromptSet:
    """The prompt set of a source. A source that was read before with the same settings is not read again."""
    started = time.monotonic()
    known = known_prompts(config, store)
    if known:
        Meter(report, "ingest", known.counts.into, "rows", reused=known.counts.into)
        work = Work(shards_reused=len(shards_of(store, known)), seconds=time.monotonic() - started)
        return replace(known, work=work)
    inputs = _inputs(config)
    with tempfile.TemporaryDirectory() as folder:
        prompts, quarantine = _read(config, store, Path(folder), Meter(report, "ingest", 0, "rows"))
        if _inputs(config) != inputs:
            raise RunError(f"ingest.source {config.source!r} changed while it was read; run again")
        store.create_file(f"prompts/sources/{inputs}.quarantine.parquet", quarantine)
    counts = {"into": prompts.counts.into, "out": prompts.counts.out, "dropped": prompts.counts.dropped}
    store.create_json(_pointer(inputs), {"set": prompts.digest, "counts": counts, "source": config.source})
    return replace(prompts, work=Work(prompts.work.shards_made, seconds=time.monotonic() - started))


def known_prompts(config: IngestConfig, store: Store) -> PromptSet | None:
    """The prompt set of a source that was read before, with the same content and settings."""
    inputs = _inputs(config)
    if not store.exists(_pointer(inputs)):
        return None
    known = store.read_json(_pointer(inputs))
    counts = Counts(**known["counts"])
    _check_share(config, counts, lambda: _examples(store, inputs))
    return PromptSet(known["set"], counts)


def _inputs(config: IngestConfig) -> str:
    settings = config.model_dump(exclude={"source", "max_quarantined"})
    return digest({"schema": SCHEMA_VERSION, "content": source_digest(config), **settings})


def _pointer(inputs: str) -> str:
    return f"prompts/sources/{inputs}.json"


def shards_of(store: Store, prompts: PromptSet) -> list[dict[str, Any]]:
    """The shards of a prompt set in order: [{"digest": of its rows, "prompts": of its prompt ids, "rows": how many}].

    Completions depend on the prompts alone: they stand under `prompts`, so that another source label or a further kept
    column does not pay for them again.
    """
    return store.read_json(f"prompts/{prompts.digest}/manifest.json")["shards"]


def read_shard(store: Store, shard: str, columns: list[str] | None = None) -> pa.Table:
    """One shard's rows (records.PROMPTS)."""
    return store.read_table(shard_path(shard), columns)


def shard_path(shard: str) -> str:
    return f"prompts/shards/{shard}.parquet"


def _read(config: IngestConfig, store: Store, folder: Path, meter: Meter) -> tuple[PromptSet, Path]:
    """Read everything; the prompt set, and a local file with the quarantined rows."""
    writer = _ShardWriter(store, config.shard_size)
    seen = _Seen(folder / "seen.sqlite")
    quarantine = _Quarantine(folder / "quarantine.parquet")
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
                examples.append(_example(into, bad.reason, bad.excerpt))
        else:
            if seen.add(prompt["prompt_id"]):
                writer.add(prompt)
            else:
                dropped["duplicate"] += 1
        if into % _BLOCK == 0:
            meter.add(_BLOCK)
    meter.add(into % _BLOCK)
    writer.close()
    counts = Counts(into, writer.rows, dict(dropped))
    _check_share(config, counts, lambda: examples)
    set_digest = digest(writer.shards)
    store.create_json(f"prompts/{set_digest}/manifest.json", {"shards": writer.shards})
    return PromptSet(set_digest, counts, Work(shards_made=len(writer.shards))), quarantine.close()


def to_prompt(row: Any, config: IngestConfig) -> dict[str, Any]:
    """One row of the input as a row of PROMPTS; BadRow says what is wrong with it."""
    if isinstance(row, BadRow):
        raise row
    columns = config.columns
    if columns.prompt not in row:
        raise BadRow("no prompt column", f"columns: {', '.join(map(str, row))}")
    messages = _messages(row[columns.prompt])
    size = sum(len(message["content"]) for message in messages)
    if size > config.max_chars:
        raise BadRow("prompt too long", f"{size} characters")
    source = str(row.get(columns.source) or "unknown")
    _check_unicode("".join([*(message["content"] for message in messages), source]))
    return {
        "prompt_id": digest(messages),
        "messages": messages,
        "source": source,
        "fields": _fields(row, columns),
    }


def _messages(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow("no prompt" if value in (None, "", []) else "prompt is neither text nor messages", repr(value))
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("malformed message", repr(message))
        if not isinstance(message.get("role"), str) or message["role"] not in _ROLES:
            raise BadRow("unknown role", repr(message.get("role")))
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages[-1]["content"].strip():
        raise BadRow("empty prompt", "")
    if messages[-1]["role"] == "assistant":
        raise BadRow("last message is the assistant's", messages[-1]["content"])
    return messages


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("not UTF-8", text.encode(errors="replace").decode()) from None
    if "\x00" in text:
        raise BadRow("NUL character", text.replace("\x00", "\\0"))


def _fields(row: dict[str, Any], columns: ColumnsConfig) -> str:
    missing = [name for name in columns.keep if name not in row]
    if missing:
        raise BadRow("missing column", ", ".join(missing))
    try:
        return json.dumps({name: row[name] for name in columns.keep}, allow_nan=False, default=str)
    except (ValueError, RecursionError) as error:
        raise BadRow("kept column is not JSON", str(error)) from None


def _check_share(config: IngestConfig, counts: Counts, examples: Callable[[], list[str]]) -> None:
    """Duplicates are no fault; everything else dropped counts against max_quarantined."""
    if counts.out == 0:
        why = f"; dropped: {dict(counts.dropped)}. {' | '.join(examples())}" if counts.into else ""
        raise ConfigError(f"ingest.source {config.source!r} holds no usable prompt ({counts.into} rows{why})")
    bad = counts.into - counts.out - counts.dropped.get("duplicate", 0)
    if bad > math.floor(config.max_quarantined * counts.into):
        raise RunError(
            f"ingest: {bad} of {counts.into} rows are bad, more than max_quarantined {config.max_quarantined:.0%}: "
            f"{dict(counts.dropped)}. {' | '.join(examples())}"
        )


def _examples(store: Store, inputs: str) -> list[str]:
    """The first rows that were quarantined when a source was read."""
    rows = store.read_table(f"prompts/sources/{inputs}.quarantine.parquet").slice(0, 3).to_pylist()
    return [_example(row["row"], row["reason"], row["excerpt"]) for row in rows]


def _example(row: int, reason: str, excerpt: str) -> str:
    return f"row {row}: {reason}: {excerpt[:80]}"


class _ShardWriter:
    """Cuts rows into shards: where they were cut before, as late as possible, and otherwise at shard_size.

    Every shard leaves a mark, an empty file prompts/cuts/<first prompt>.<rows>.<prompts>.
    """

    def __init__(self, store: Store, shard_size: int) -> None:
        self.store, self.shard_size = store, shard_size
        self.cuts: dict[str, list[tuple[int, str]]] = defaultdict(list)  # first prompt id -> rows, digest of all ids
        for mark in store.list("prompts/cuts"):
            first, rows, prompts = mark.removeprefix("prompts/cuts/").split(".")
            self.cuts[first].append((int(rows), prompts))
        self.shards: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.rows = 0

    def add(self, row: dict[str, Any]) -> None:
        self.open.append(row)
        self.rows += 1
        if len(self.open) == self.shard_size:
            self._cut()

    def close(self) -> None:
        while self.open:
            self._cut()

    def _cut(self) -> None:
        ids = [row["prompt_id"] for row in self.open]
        known = [(n, name) for n, name in self.cuts.get(ids[0], []) if n <= len(ids) and digest(ids[:n]) == name]
        rows, prompts = max(known, default=(len(ids), digest(ids)))
        taken, self.open = self.open[:rows], self.open[rows:]
        shard: dict[str, Any] = {"digest": digest(taken), "prompts": prompts, "rows": rows}
        self.store.create_table(shard_path(shard["digest"]), pa.Table.from_pylist(taken, schema=PROMPTS))
        if not known:
            self.store.create(f"prompts/cuts/{ids[0]}.{rows}.{prompts}", b"")
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


class _Quarantine:
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
