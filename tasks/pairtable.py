"""A table of pairs by column: what subsets and explanations read, one column at a time.

A column of numbers takes 8 bytes a pair, so ten million pairs fit in memory by the column, not by the row.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.config import FIELD
from tasks.errors import ConfigError
from tasks.ingest import read_shard, shards_of
from tasks.records import PAIRED, Pairs
from tasks.store import Store, unsealed

_PLACES = {"id_bits", "shard", "row", "chosen_sample", "rejected_sample"}  # integers that measure nothing
_BATCH = 65_536


@contextlib.contextmanager
def open_pairs(store: Store, pairs: Pairs) -> Iterator[PairTable]:
    """The table, from a local copy where the store is not local. RunError, also in the block, when it is damaged."""
    path = f"pairs/{pairs.digest}/pairs.parquet"
    with tempfile.TemporaryDirectory() as room, store.open_table(path, store.at_hand(path, Path(room))) as file:
        yield PairTable(store, pairs, file)


class PairTable:
    def __init__(self, store: Store, pairs: Pairs, file: pq.ParquetFile) -> None:
        self.store, self.pairs, self.file = store, pairs, file
        self.schema = self.file.schema_arrow
        self.rows: int = self.file.metadata.num_rows

    @property
    def seals(self) -> dict[str, str] | None:
        """Of the texts that the pairs were made of, by file of completions; tables of earlier versions have none."""
        try:
            return dict(unsealed(found)) if (found := (self.file.metadata.metadata or {}).get(PAIRED)) else None
        except (TypeError, ValueError) as error:
            raise self.store.damaged(f"pairs/{self.pairs.digest}/pairs.parquet") from error

    @property
    def metrics(self) -> list[str]:
        """Names of all columns that measure something."""
        numeric = [f.name for f in self.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
        return [name for name in numeric if name not in _PLACES]

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        yield from self.file.iter_batches(batch_size=_BATCH, columns=columns)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A metric, or a kept field that holds numbers; NaN where there is none."""
        if name.startswith(FIELD):
            return np.array([_number(value) for value in self._field(name)], np.float64)
        self._check(name)
        values = np.empty(self.rows)
        start = 0
        for batch in self.batches([name]):
            values[start : start + batch.num_rows] = batch[0].cast(pa.float64()).to_numpy(zero_copy_only=False)
            start += batch.num_rows
        return values

    def texts(self, name: str) -> tuple[NDArray[np.int32], list[str]]:
        """A text column, or a kept field: number of each pair's value, and the values."""
        if name.startswith(FIELD):
            column = pa.array([_text(value) for value in self._field(name)], pa.string()).dictionary_encode()
        else:
            self._check(name)
            column = self.file.read([name])[name].cast(pa.string()).combine_chunks().dictionary_encode()
        return column.indices.to_numpy(), column.dictionary.to_pylist()

    def ids(self) -> NDArray[np.uint64]:
        """64 bits of each pair's prompt id."""
        return self.file.read(["id_bits"])["id_bits"].to_numpy()

    def rows_at(self, places: list[int]) -> dict[int, dict[str, Any]]:
        """Whole rows, by their number; places: rising."""
        found: dict[int, dict[str, Any]] = {}
        start = 0
        for batch in self.batches() if places else ():
            here = [place for place in places if start <= place < start + batch.num_rows]
            if here:
                rows = batch.take(pa.array([place - start for place in here])).to_pylist()
                found.update(zip(here, rows, strict=True))
            start += batch.num_rows
            if len(found) == len(places):
                break
        return found

    def _check(self, name: str) -> None:
        if name not in self.schema.names:
            known = ", ".join([*self.metrics, "source", "chosen_generator", "rejected_generator"])
            raise ConfigError(f"pairs {self.pairs.name!r} have no column {name!r}; there are: {known}")

    def _field(self, name: str) -> Iterator[Any]:
        """A kept column of the prompts, pair by pair."""
        shards = shards_of(self.store, self.pairs.rewards.completions.prompts)
        at, fields = -1, []
        for batch in self.batches(["shard", "row"]):
            for shard, row in zip(batch["shard"].to_pylist(), batch["row"].to_pylist(), strict=True):
                if shard != at:
                    column = read_shard(self.store, shards[shard]["digest"], ["fields"])["fields"]
                    at, fields = shard, column.to_pylist()
                found = json.loads(fields[row])
                if name.removeprefix(FIELD) not in found:
                    kept = ", ".join(f"{FIELD}{column}" for column in found) or "none"
                    raise ConfigError(f"pairs {self.pairs.name!r} have no {name!r}; kept columns are: {kept}")
                yield found[name.removeprefix(FIELD)]


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
