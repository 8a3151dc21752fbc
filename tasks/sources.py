"""Readers of prompt sources: JSON lines, JSON, CSV, Parquet, a save_to_disk folder, or a hub data set, row by row.

A row that cannot be read comes out as a BadRow in its place, so that it is counted and quarantined instead of ending
the run. Compressed files (.gz, .zst ...) and any fsspec URL are read as they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import ijson
import pyarrow.parquet as pq

from tasks.config import IngestConfig
from tasks.errors import ConfigError, RunError

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


class BadRow(ValueError):
    """A row that cannot be used: why, and how it begins."""

    def __init__(self, reason: str, excerpt: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = excerpt[:500].encode(errors="backslashreplace").decode()


def read_rows(config: IngestConfig) -> Iterator[tuple[dict[str, Any] | BadRow, int]]:
    """(row, its number from 1) of everything the source holds, up to the limit."""
    for number, row in enumerate(_all_rows(config), start=1):
        yield row, number
        if number == config.limit:
            return


def source_digest(config: IngestConfig) -> str:
    """Digest of the source's content: of local bytes, of a remote file's checksum, of a hub data set's commit."""
    if format_of(config) == "hub":
        return _hub_commit(config.source)
    hasher = hashlib.sha256()
    for fs, path in _files(config):
        if fs.protocol in ("file", ("file", "local")):
            with open(path, "rb") as file:
                while piece := file.read(8 << 20):
                    hasher.update(piece)
        else:
            hasher.update(f"{path} {fs.ukey(path)}".encode())
    return hasher.hexdigest()


def format_of(config: IngestConfig) -> str:
    """The format asked for, or the one that the source's name tells."""
    if config.format != "auto":
        return config.format
    path = Path(config.source)
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        return "disk"
    files = [Path(file) for _, file in _files(config, missing_ok=True)]
    if not files:
        if config.source.count("/") <= 1 and "." not in config.source.rsplit("/", 1)[-1] and "*" not in config.source:
            return "hub"
        raise ConfigError(f"ingest.source: {config.source!r} does not exist; check the path")
    suffixes = [suffix for suffix in files[0].suffixes if suffix not in _COMPRESSED]
    known = _FORMATS.get(suffixes[-1].lower() if suffixes else "")
    if not known:
        raise ConfigError(f"ingest.format: cannot tell the format of {files[0].name!r}; set it to jsonl, json, csv ...")
    return known


def _all_rows(config: IngestConfig) -> Iterator[dict[str, Any] | BadRow]:
    kind = format_of(config)
    if kind in ("disk", "hub"):
        yield from _datasets_rows(config, kind)
        return
    read = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}[kind]
    for fs, path in _files(config):
        compression = None if kind == "parquet" else "infer"
        with fsspec.core.OpenFile(fs, path, "rb", compression=_infer(path, compression)) as file:
            yield from read(file)


def _jsonl_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    for line in file:
        if line.strip():
            yield _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8", line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return BadRow("not JSON", line.decode(errors="replace"))
    return row if isinstance(row, dict) else BadRow("not a JSON object", line.decode(errors="replace"))


def _json_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    try:
        for row in ijson.items(file, "item", use_float=True):
            yield row if isinstance(row, dict) else BadRow("not a JSON object", repr(row))
    except ijson.JSONError as error:  # what follows cannot be found again
        yield BadRow("not JSON", str(error))


def _csv_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    csv.field_size_limit(_MAX_FIELD)
    # Undecodable bytes become lone surrogates, which ingest refuses row by row.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, restkey="")
    for row in reader:
        yield BadRow("more fields than columns", repr(row[""])) if "" in row else row


def _parquet_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=512):
        yield from batch.to_pylist()


def _datasets_rows(config: IngestConfig, kind: str) -> Iterator[dict[str, Any] | BadRow]:
    import datasets

    if kind == "disk":
        loaded = datasets.load_from_disk(config.source)
        if isinstance(loaded, datasets.DatasetDict):
            if config.split not in loaded:
                raise ConfigError(f"ingest.split: {config.source} has no split {config.split!r}: {', '.join(loaded)}")
            loaded = loaded[config.split]
        yield from loaded
        return
    yield from datasets.load_dataset(config.source, split=config.split, streaming=True)


def _files(config: IngestConfig, missing_ok: bool = False) -> list[tuple[Any, str]]:
    """(filesystem, path) of every file that the source names, sorted."""
    try:
        source = config.source if "://" in config.source else str(Path(config.source).expanduser())
        fs, path = fsspec.core.url_to_fs(source)
        if any(letter in path for letter in "*?["):
            found = fs.glob(path)
        elif fs.isdir(path):
            found = fs.find(path)
        else:
            found = [path] if fs.exists(path) else []
    except (ImportError, ValueError) as error:
        raise ConfigError(f"ingest.source: {config.source!r} cannot be opened: {error}") from error
    except Exception as error:  # s3fs, aiohttp and botocore have no common base
        raise RunError(f"ingest.source {config.source!r} cannot be reached: {str(error).splitlines()[0]}") from error
    found = sorted(file for file in found if not Path(file).name.startswith((".", "_")))
    if not found and not missing_ok:
        raise ConfigError(f"ingest.source: {config.source!r} does not exist or holds no files; check the path")
    return [(fs, file) for file in found]


def _infer(path: str, compression: str | None) -> str | None:
    return fsspec.utils.infer_compression(path) if compression == "infer" else None


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        return f"{name}@{HfApi().dataset_info(name, timeout=20).sha}"
    except (HFValidationError, OSError) as error:
        raise ConfigError(
            f"ingest.source: {name!r} is no file here, and the hub cannot be reached or has no such data set; "
            "check the path, or the network and HF_TOKEN"
        ) from error
