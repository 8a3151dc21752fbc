"""Sources of prompts and completions: files of text or tables, a save_to_disk folder, or a hub data set, row by row.

A row that cannot be read comes out as a BadRow in its place, so that it is counted and quarantined instead of ending
the run. Where it cannot be known how many rows are lost (a file that is cut off, a quote that is never closed) the run
ends. Compressed files (.gz, .zip ...) and any fsspec URL are read as they are.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import ijson
import pyarrow as pa

from tasks.errors import ConfigError, RunError, is_network_fault
from tasks.rows import BadRow, csv_rows, json_rows, jsonl_rows
from tasks.sections import SourceConfig
from tasks.tables import dataset_rows, parquet_rows
from tasks.urls import shown

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".lzma", ".zip"}
_PACKED = {".zst", ".lz4", ".br", ".7z", ".rar", ".tgz", ".tar"}  # would be read as if their bytes were the rows
_READERS = {"jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "parquet": parquet_rows}
_BROKEN = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    pa.ArrowException,
    ijson.JSONError,
    csv.Error,
    UnicodeDecodeError,  # of a column's name
)


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
    suffixes = [suffix for suffix in file.suffixes if suffix.lower() not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1].lower()) if suffixes else None


def _all_rows(config: SourceConfig) -> Iterator[dict[str, Any] | BadRow]:
    kind = format_of(config)
    if kind in ("disk", "hub"):
        yield from _datasets_rows(config, kind)
        return
    for fs, path in _data_files(config):
        try:
            with _opened(fs, path, kind) as file:
                yield from _READERS[kind](file)
        except PermissionError as error:
            raise RunError(f"{config.stage}.source {path!r} cannot be read: permission denied") from error
        except (*_BROKEN, OSError) as error:
            if getattr(error, "errno", None) is not None or is_network_fault(error):  # with a number it is the disk's
                raise
            raise RunError(
                f"{config.stage}.source {path!r} is damaged or no {kind} file: {_first_line(error)}"
            ) from error


@contextlib.contextmanager
def _opened(fs: Any, path: str, kind: str) -> Iterator[Any]:
    """A file's content, unpacked."""
    compression = None if kind == "parquet" else fsspec.utils.infer_compression(path)
    if compression != "zip":
        with fsspec.core.OpenFile(fs, path, "rb", compression=compression) as file:
            yield file
        return
    with fs.open(path, "rb") as packed, zipfile.ZipFile(packed) as archive:
        inside = [one for one in archive.infolist() if not one.is_dir()]
        if len(inside) != 1:
            raise zipfile.BadZipFile(f"it holds {len(inside)} files instead of one; unpack it and name the folder")
        try:
            file = archive.open(inside[0])
        except RuntimeError as error:  # a password, or a way of packing that Python does not know
            raise zipfile.BadZipFile(f"{error}; unpack it") from error
        with file:
            yield file


def _datasets_rows(config: SourceConfig, kind: str) -> Iterator[dict[str, Any] | BadRow]:
    try:
        yield from dataset_rows(_from_disk(config) if kind == "disk" else _from_hub(config))
    except (ConfigError, RunError):
        raise
    except Exception as error:  # whatever is amiss in data of somebody's, `datasets` raises another kind
        if is_network_fault(error):
            raise
        wrong = "is damaged or no save_to_disk folder" if kind == "disk" else "cannot be read"
        raise RunError(f"{config.stage}.source {config.source!r} {wrong}: {_first_line(error)}") from error


def _from_disk(config: SourceConfig) -> Any:
    import datasets

    loaded = datasets.load_from_disk(os.path.expanduser(config.source))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if config.split not in loaded:
        raise ConfigError(f"{config.stage}.split: {config.source} has no split {config.split!r}: {', '.join(loaded)}")
    return loaded[config.split]


def _from_hub(config: SourceConfig) -> Any:
    import datasets

    revision = _hub_commit(config).rpartition("@")[2]  # the one that went into the digest
    try:
        return datasets.load_dataset(config.source, split=config.split, revision=revision, streaming=True)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{config.stage}.source {config.source!r}, split {config.split!r}: {error}") from error


def _data_files(config: SourceConfig, missing_ok: bool = False) -> list[tuple[Any, str]]:
    """Without those that lie beside data, such as a README, unless a format is given or nothing else is there."""
    files = _files(config, missing_ok)
    for _, path in files:
        if Path(path).suffix.lower() in _PACKED:
            raise ConfigError(f"{config.stage}.source: {path!r} cannot be unpacked here; unpack it, or pack it as .gz")
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
