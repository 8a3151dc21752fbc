"""Readers of prompt sources: JSON lines, JSON, CSV, Parquet, a save_to_disk folder, or a hub data set, row by row.

A row that cannot be read comes out as a BadRow in its place, so that it is counted and quarantined instead of ending
the run. Where it cannot be known how many rows are lost (a file that is cut off, a quote that is never closed) the run
ends. Compressed files (.gz, .zst ...) and any fsspec URL are read as they are.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import ConfigError, RunError
from tasks.sections import SourceConfig
from tasks.urls import shown

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4"}
_MAX_FIELD = 64 * 2**20
_DEEPEST = 500  # levels of a JSON row: as many as Python's own functions can walk through
_OPENING, _CLOSING = {"start_map", "start_array"}, {"end_map", "end_array"}
_BOM = b"\xef\xbb\xbf"
_UNREADABLE = (ValueError, OverflowError, KeyError, ImportError)  # of a date in the year 300,000, a repeated field ...
_BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pa.ArrowInvalid, ijson.JSONError, csv.Error)


class BadRow(ValueError):
    """A row that cannot be used: why, and how it begins."""

    def __init__(self, reason: str, excerpt: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = excerpt[:500].encode(errors="backslashreplace").decode()


def read_rows(config: SourceConfig) -> Iterator[tuple[dict[str, Any] | BadRow, int]]:
    """(row, its number from 1) of everything the source holds, up to the limit."""
    for number, row in enumerate(_all_rows(config), start=1):
        yield row, number
        if number == config.limit:
            return


def find_source(config: SourceConfig) -> str:
    """What the source is, in words, from its first row; raises when it cannot be read or holds nothing."""
    kind = format_of(config)
    if kind == "hub":
        return _hub_commit(config)
    if kind != "disk" and next(iter(read_rows(config)), None) is None:
        raise ConfigError(f"{config.stage}.source {config.source!r} holds no rows")
    return f"format {kind}"


def source_digest(config: SourceConfig) -> str:
    """Digest of the source's content: of local bytes, of a remote file's checksum, of a hub data set's commit."""
    kind = format_of(config)
    if kind == "hub":
        return _hub_commit(config)
    hasher = hashlib.sha256(kind.encode())
    for fs, path in _files(config) if kind == "disk" else _data_files(config):
        if fs.protocol in ("file", ("file", "local")):
            with open(path, "rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
        else:
            hasher.update(_remote_digest(fs, path))
    return hasher.hexdigest()


def _remote_digest(fs: Any, path: str) -> bytes:
    """By the checksum that the server tells, so that a large file is read once only; else by the bytes."""
    told = fs.info(path)
    checksums = [str(told[name]) for name in ("ETag", "Content-MD5", "Digest") if told.get(name)]
    if checksums:
        return f"{path} {checksums}".encode()
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def format_of(config: SourceConfig) -> str:
    """The format asked for, or the one that the source's name tells."""
    if config.format != "auto":
        return config.format
    folder = os.path.expanduser(config.source)
    if any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "dataset_dict.json")):
        return "disk"
    files = [Path(file) for _, file in _data_files(config, missing_ok=True)]
    if not files:
        if config.source.count("/") <= 1 and "." not in config.source.rsplit("/", 1)[-1] and "*" not in config.source:
            return "hub"
        raise ConfigError(f"{config.stage}.source: {config.source!r} does not exist; check the path")
    kinds = {_named_format(file): file for file in files}
    if None in kinds:
        name = kinds[None].name
        raise ConfigError(f"{config.stage}.format: cannot tell the format of {name!r}; set it to jsonl, json, csv ...")
    if len(kinds) > 1:
        raise ConfigError(
            f"{config.stage}.source: {config.source!r} holds files of several formats "
            f"({', '.join(sorted(map(str, kinds)))}); name "
            f"those of one format, such as {config.source.rstrip('/*')}/*{files[0].suffix}"
        )
    return str(next(iter(kinds)))


def _named_format(file: Path) -> str | None:
    """By the ending, before that of a compression."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1].lower()) if suffixes else None


def _all_rows(config: SourceConfig) -> Iterator[dict[str, Any] | BadRow]:
    kind = format_of(config)
    if kind in ("disk", "hub"):
        yield from _datasets_rows(config, kind)
        return
    read = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}[kind]
    for fs, path in _data_files(config):
        compression = None if kind == "parquet" else "infer"
        try:
            with fsspec.core.OpenFile(fs, path, "rb", compression=_infer(path, compression)) as file:
                yield from read(file)
        except _BROKEN as error:
            raise RunError(
                f"{config.stage}.source {path!r} is damaged or no {kind} file: {_first_line(error)}"
            ) from error
        except PermissionError as error:
            raise RunError(f"{config.stage}.source {path!r} cannot be read: permission denied") from error


def _jsonl_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    for number, line in enumerate(_lines(file)):
        if number == 0:
            line = line.removeprefix(_BOM)
        if len(line) > _MAX_FIELD:
            yield BadRow("row too long", line[:2000].decode(errors="replace"))
        elif line.strip():
            yield _json_row(line)


def _lines(file: Any) -> Iterator[bytes]:
    """Lines without their ends; of one that does not end, its beginning: a small compressed file may hold gigabytes."""
    rest, cut = b"", False
    while piece := file.read(1 << 20):
        *lines, last = piece.split(b"\n")
        for line in lines:
            if not cut:
                yield rest + line
            rest, cut = b"", False
        rest = b"" if cut else rest + last
        if len(rest) > _MAX_FIELD:
            yield rest
            rest, cut = b"", True
    if rest:
        yield rest


def _json_row(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        return BadRow("not UTF-8", line.decode(errors="replace"))
    except _Twice as twice:
        return BadRow(str(twice), line.decode(errors="replace"))
    except ValueError:
        return BadRow("not JSON", line.decode(errors="replace"))
    except RecursionError:
        return BadRow("nested too deeply", line.decode(errors="replace"))
    return row if isinstance(row, dict) else BadRow("not a JSON object", line.decode(errors="replace"))


def _json_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    """Of an array of objects, which is never held as a whole."""
    rest = _Rest(file)
    if rest.head and rest.head[:1] != b"[":
        raise ijson.JSONError("it holds no array; where each line is an object, set ingest.format to jsonl")
    if not rest.head:
        return
    depth, deepest, row, twice = 0, 0, ijson.ObjectBuilder(_Once), ""
    # Not ijson.items: it keeps the path to every open level, 24 GB for an array nested 100,000 deep.
    for event, value in ijson.basic_parse(rest, use_float=True):
        depth += (event in _OPENING) - (event in _CLOSING)
        if depth == 0 or (depth == 1 and event in _OPENING):  # the end and the beginning of the array of rows
            continue
        deepest = max(deepest, depth - 1)
        if deepest <= _DEEPEST and not twice:
            try:
                row.event(event, value)
            except _Twice as error:
                twice = str(error)
        if depth == 1:
            if deepest > _DEEPEST:
                yield BadRow("nested too deeply", f"{deepest:,} levels")
            else:
                yield BadRow(twice, repr(row.value)) if twice else _object(row.value)
            deepest, row, twice = 0, ijson.ObjectBuilder(_Once), ""


class _Twice(ValueError):
    def __init__(self) -> None:
        super().__init__("a key stands twice")


class _Once(dict[str, Any]):
    """Refuses a key that it has."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise _Twice
        super().__setitem__(key, value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Twice
    return row


def _object(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow("not a JSON object", repr(value))


class _Rest:
    """A file from its first byte that is neither a byte order mark nor white space."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.head = b""
        while not self.head and (piece := file.read(1 << 16)):
            self.head = piece.removeprefix(_BOM).lstrip()

    def read(self, size: int = -1) -> bytes:
        if not self.head or size == 0:
            return self.file.read(size)
        head, self.head = self.head, b""
        return head


def _csv_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    csv.field_size_limit(_MAX_FIELD)
    # Undecodable bytes become lone surrogates, which ingest refuses row by row.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    end = uuid.uuid4().hex  # a last line of our own: a quote that is never closed would swallow it
    reader = csv.reader(itertools.chain(text, [end]))
    columns: list[str] | None = None
    for row in reader:
        if row == [end]:
            return
        if columns is None:
            columns = row
            if twice := [name for name in columns if name and columns.count(name) > 1]:
                raise csv.Error(f"two columns are called {twice[0][:100]!r}")
        elif len(row) > len(columns):
            yield BadRow("more fields than columns", repr(row[len(columns) :]))
        elif row:
            yield dict(itertools.zip_longest(columns, row))
    raise csv.Error("a quote is never closed, so its last rows cannot be told apart")


def _parquet_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=512):
        try:
            rows = batch.to_pylist()
        except _UNREADABLE:
            rows = [_parquet_row(batch.slice(row, 1)) for row in range(batch.num_rows)]
        yield from rows


def _parquet_row(batch: pa.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", repr(error.object))
    except _UNREADABLE as error:
        return BadRow("no value that Python has", str(error))


def _datasets_rows(config: SourceConfig, kind: str) -> Iterator[dict[str, Any] | BadRow]:
    import datasets

    if kind == "disk":
        try:
            loaded = datasets.load_from_disk(os.path.expanduser(config.source))
        except Exception as error:  # whatever is amiss in a folder of somebody's, it raises another kind
            raise RunError(
                f"{config.stage}.source {config.source!r} is damaged or no save_to_disk folder: {_first_line(error)}"
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            if config.split not in loaded:
                raise ConfigError(
                    f"{config.stage}.split: {config.source} has no split {config.split!r}: {', '.join(loaded)}"
                )
            loaded = loaded[config.split]
        yield from loaded
        return
    revision = _hub_commit(config).rpartition("@")[2]  # the one that went into the digest
    try:
        loaded = datasets.load_dataset(config.source, split=config.split, revision=revision, streaming=True)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{config.stage}.source {config.source!r}, split {config.split!r}: {error}") from error
    yield from loaded


def _data_files(config: SourceConfig, missing_ok: bool = False) -> list[tuple[Any, str]]:
    """Without those that lie beside data, such as a README, unless a format is given or nothing else is there."""
    files = _files(config, missing_ok)
    known = [(fs, path) for fs, path in files if _named_format(Path(path))]
    return known if known and config.format == "auto" else files


def _files(config: SourceConfig, missing_ok: bool = False) -> list[tuple[Any, str]]:
    """(filesystem, path) of every file that the source names, sorted."""
    try:
        source = config.source if "://" in config.source else os.path.expanduser(config.source)
        fs, path = fsspec.core.url_to_fs(source)
        fs.invalidate_cache()  # a listing from before would hide that a file has changed
        if fs.isfile(path):
            return [(fs, path)]
        if any(letter in path for letter in "*?["):
            found = [file for file in fs.glob(path) if fs.isfile(file)]
        else:
            found = fs.find(path) if fs.isdir(path) else []
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{config.stage}.source: {config.source!r} cannot be opened: {error}") from error
    except Exception as error:  # s3fs, aiohttp and botocore have no common base
        told = shown(_first_line(error))  # with what it was redirected to
        raise RunError(f"{config.stage}.source {config.source!r} cannot be reached: {told}") from error
    found = sorted(file for file in found if not Path(file).name.startswith((".", "_")))
    if not found and not missing_ok:
        raise ConfigError(f"{config.stage}.source: {config.source!r} does not exist or holds no files; check the path")
    return [(fs, file) for file in found]


def _first_line(error: BaseException) -> str:
    told = error.args[0] if error.args else ""
    text = told.decode(errors="replace") if isinstance(told, bytes) else str(error)
    return next(iter(text.splitlines()), type(error).__name__)


def _infer(path: str, compression: str | None) -> str | None:
    return fsspec.utils.infer_compression(path) if compression == "infer" else None


def _hub_commit(config: SourceConfig) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    name = config.source
    try:
        return f"{name}@{HfApi().dataset_info(name, timeout=20).sha}"
    except (HFValidationError, HTTPError, OSError) as error:
        raise ConfigError(
            f"{config.stage}.source: {name!r} is no file here, and the hub cannot be reached or has no such data set; "
            "check the path, or the network and HF_TOKEN"
        ) from error
