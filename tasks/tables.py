"""Rows of tables: a Parquet file, or a data set that `datasets` has loaded.

Texts stay in the dictionaries that the file has of them until a row is taken, since a few hundred bytes can name one
long text a thousand times. Images, sounds and the like stay the bytes and paths that they are: nothing is decoded or
opened because data says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.rows import MAX_ROW, BadRow

_ROWS = 512  # at once
_MOST, _FOLDED = 8 * MAX_ROW, 200  # bytes of a row group; how many times a file's own size it may be, beyond that
_UNREADABLE = (ValueError, OverflowError, KeyError, ImportError)  # of a date in the year 300,000, a repeated field ...


def parquet_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    about = pq.read_metadata(file)
    columns = [about.schema.column(i) for i in range(about.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    table = pq.ParquetFile(file, metadata=about, read_dictionary=texts)
    most = max(_MOST, _FOLDED * file.seek(0, os.SEEK_END))
    for i in range(about.num_row_groups):
        # Not by its columns' sizes: of some damaged footers pyarrow ends the process over these.
        whole, rows = about.row_group(i).total_byte_size, about.row_group(i).num_rows
        if whole > most:
            raise pa.ArrowInvalid(f"it unfolds to {whole >> 20:,} MiB; write it anew in smaller row groups")
        at_once = max(1, min(_ROWS, MAX_ROW * rows // max(1, whole)))
        for batch in table.iter_batches(at_once, row_groups=[i]):
            yield from _rows(batch)


def dataset_rows(loaded: Any) -> Iterator[dict[str, Any] | BadRow]:
    """Of a Dataset or an IterableDataset."""
    import datasets

    kept = datasets.Features(_undecoded(loaded.features.copy())) if loaded.features else None
    rows: Iterable[dict[str, Any] | BadRow]
    if isinstance(loaded, datasets.IterableDataset):
        rows = loaded.decode(False) if loaded.features else loaded
    else:
        tables = loaded.with_format("arrow").iter(_ROWS)  # in which nothing is decoded
        rows = (row for table in tables for batch in table.to_batches() for row in _rows(batch))
    for row in rows:
        yield _decoded(row, kept) if kept and isinstance(row, dict) else row


def _undecoded(feature: Any) -> Any:
    """Without the decoding of images, sounds and the like, in place; columns of JSON keep theirs."""
    parts = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else []
    for part in [*parts, *([feature.feature] if hasattr(feature, "feature") else [])]:
        _undecoded(part)
    if hasattr(feature, "decode") and type(feature).__name__ != "Json":
        feature.decode = False
    return feature


def _decoded(row: dict[str, Any], features: Any) -> dict[str, Any] | BadRow:
    try:
        return features.decode_example(row)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", str(error))


def _rows(batch: pa.RecordBatch) -> Iterable[dict[str, Any] | BadRow]:
    if _size(batch.columns) <= MAX_ROW:
        try:
            return batch.to_pylist()
        except _UNREADABLE:
            pass
    return (_row(batch.slice(row, 1)) for row in range(batch.num_rows))


def _row(batch: pa.RecordBatch) -> dict[str, Any] | BadRow:
    if (size := _size(batch.columns)) > MAX_ROW:
        return BadRow("row too long", f"{size:,} bytes")
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", repr(error.object[:500]))
    except _UNREADABLE as error:
        return BadRow("no value that Python has", str(error))


def _size(arrays: Iterable[pa.Array]) -> int:
    """Bytes of all values, each written out: one of a dictionary counts as often as it is named."""
    return sum(map(_array_size, arrays))


def _array_size(array: pa.Array) -> int:
    if isinstance(array, pa.ExtensionArray):
        return _array_size(array.storage)
    if isinstance(array, pa.DictionaryArray):
        if not _is_text(array.dictionary.type):
            return len(array) * array.dictionary.nbytes
        return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    if pa.types.is_struct(array.type):
        return _size(array.flatten())
    if isinstance(array, pa.MapArray):
        first, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return _size(part.slice(first, end - first) for part in (array.keys, array.items))
    if hasattr(array, "flatten") and pa.types.is_nested(array.type):
        return 8 * len(array) + _array_size(array.flatten())
    return (pc.sum(pc.binary_length(array)).as_py() or 0) if _is_text(array.type) else array.nbytes


def _is_text(kind: pa.DataType) -> bool:
    kinds = pa.types
    return any(
        is_kind(kind) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)
    )
