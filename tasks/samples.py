"""Which samples of a prompt shard there are, in which files, and which are missing.

A file of completions or rewards is named <shard>.<first>-<last>.parquet and holds samples first..last-1 of every prompt
of the shard, or, with .<part> before the ending, of those rows that prompts/rows/<part>.json lists: an adaptive round
asks for more samples of some prompts only. What a run wants is a number of samples per row, the same for all rows, or
its allotment.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.ingest import shards_of
from tasks.records import Completions, PromptSet, digest
from tasks.store import Store

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Held(NamedTuple):
    """What one file holds of a shard."""

    first: int
    last: int  # + 1
    part: str = ""  # of the shard's rows; empty: all

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" + (f".{self.part}" if self.part else "")


RowsOf = Callable[[Held], Ints | None]  # the rows a file has; None: all of the shard


def held_by(path: str) -> Held:
    """What a file of completions or rewards holds, by its name."""
    _, samples, *part = path.rsplit("/", 1)[-1].removesuffix(".parquet").split(".")
    first, _, last = samples.partition("-")
    return Held(int(first), int(last), *part)


def existing(store: Store, below: str) -> dict[str, list[Held]]:
    """Shard -> what its files below a prefix hold, in order."""
    found = defaultdict(list)
    for path in store.list(below):
        found[path.rsplit("/", 1)[-1].partition(".")[0]].append(held_by(path))
    return {shard: sorted(held) for shard, held in found.items()}


def rows_of(store: Store) -> RowsOf:
    """Looks up the rows of parts, each once."""

    @lru_cache(maxsize=4096)
    def look_up(part: str) -> Ints:
        path = f"prompts/rows/{part}.json"
        rows = store.read_json(path)
        whole = isinstance(rows, list) and all(type(row) is int and 0 <= row < 2**63 for row in rows)
        if not whole or digest(rows) != part:
            raise store.damaged(path)
        return np.array(rows, np.int64)

    return lambda held: look_up(held.part) if held.part else None


def cover(held: Sequence[Held], wanted: Ints, rows: RowsOf) -> tuple[list[tuple[Held, Mask]], Ints]:
    """Which files to read, and of each which samples [rows of the file, samples of the file]; no sample twice.

    held: sorted; wanted: samples per row of the shard. Also how many samples each row then has from its first on.
    """
    reached = np.zeros(len(wanted), np.int64)
    parts = []
    for one in held:
        mine = rows(one)
        at = slice(None) if mine is None else mine
        before, sample = reached[at], np.arange(one.first, one.last)[:, None]
        until = np.where(before >= one.first, wanted[at], 0)
        take = ((sample >= before) & (sample < until)).T  # sample by sample: long rows are compared fast
        if take.any():
            parts.append((one, take))
            reached[at] = np.maximum(before, np.where(take.any(axis=1), np.minimum(one.last, wanted[at]), 0))
    return parts, reached


def missing(held: Sequence[Held], wanted: Ints, rows: RowsOf) -> Iterator[tuple[int, int, Ints]]:
    """What is to be made: (first sample, last + 1, rows), so that with it every row has what is wanted."""
    _, reached = cover(held, wanted, rows)
    while (short := reached < wanted).any():
        end = wanted.copy()  # or where a file goes on that begins later
        for one in held:
            mine = rows(one)
            later = np.zeros(len(wanted), np.bool_)
            later[slice(None) if mine is None else mine] = True
            end = np.where(later & (reached < one.first), np.minimum(end, one.first), end)
        for first, last in sorted({(int(a), int(b)) for a, b in zip(reached[short], end[short], strict=True)}):
            group = np.flatnonzero(short & (reached == first) & (end == last))
            yield first, last, group
        made = np.where(short, end, reached)
        for one in held:  # what begins there leads further
            mine = rows(one)
            at = slice(None) if mine is None else mine
            inside = (made[at] >= one.first) & (made[at] < one.last)
            made[at] = np.where(inside, np.minimum(one.last, wanted[at]), made[at])
        reached = made


def name_part(store: Store, group: Ints, rows: int) -> str:
    """The name of a group of rows of a shard, which is kept; empty for all of them."""
    if len(group) == rows:
        return ""
    numbers = group.tolist()
    part = digest(numbers)
    store.create(f"prompts/rows/{part}.json", json.dumps(numbers).encode())
    return part


def allot(store: Store, samples: Ints) -> str:
    """Keep how many samples each prompt of a set is to have; returns its name."""
    table = pa.table({"samples": samples.astype(np.int32)})
    name = digest(samples.tolist())
    store.create_table(f"prompts/allotments/{name}.parquet", table)
    return name


def wanted(
    store: Store, prompts: PromptSet, samples: int, allotment: str = ""
) -> Iterator[tuple[dict[str, Any], Ints]]:
    """Each shard with the number of samples wanted per row. An imported shard has as many as it has."""
    shards = shards_of(store, prompts)
    if not allotment:
        for shard in shards:
            yield shard, np.full(shard["rows"], shard.get("samples", samples), np.int64)
        return
    allotted = store.read_table(f"prompts/allotments/{allotment}.parquet")["samples"].to_numpy().astype(np.int64)
    start = 0
    for shard in shards:
        yield shard, allotted[start : start + shard["rows"]]
        start += shard["rows"]


def wanted_of(store: Store, completions: Completions) -> Iterator[tuple[dict[str, Any], Ints]]:
    return wanted(store, completions.prompts, completions.samples, completions.allotment)
