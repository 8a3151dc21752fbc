"""The store: the one module that knows where things lie and puts them there.

Any fsspec URL: a local folder or `s3://bucket/prefix` (credentials and endpoint from the usual AWS_* variables).
A file appears whole or not at all, and what exists is never changed: `create` is a link of a finished local file, or
one S3 put with If-None-Match. The first writer wins; the others see that it is there. Only `replace`, for the few
pointers such as `latest.json`, overwrites, and only `remove`, for old checkpoints and for rewards of functions and
endpoints that failed, takes away.

    prompts/<set>/manifest.json                               shards of a prompt set
    prompts/shards/<shard>.parquet                            rows of one shard
    prompts/sources/, prompts/cuts/                           what a source gave; where shards begin and end
    prompts/rows/, prompts/allotments/                        of adaptive rounds: rows of a shard, samples per prompt
    fingerprints/<fingerprint>.json                           what a generator's or scorer's fingerprint stands for
    completions/<generator>/<prompts>.<first>-<last>.parquet  samples first..last-1, one row a prompt of a shard
    rewards/<scorer>/<generator>/<rated>.<first>-<last>.parquet
    duels/<judge>/<one>-<other>/<prompts>.<first>-<last>.parquet
    harness/<digest>.json                                     what a model got in lm-evaluation-harness
    pairs/<digest>/                                           pairs, drops, selections
    subsets/<name>/<version>/                                 what people use
    policies/<name>/<version>/                                what training made; checkpoints beside
    evaluations/<digest>.json                                 comparisons
    faults/<run>/                                             what engines died over, while a run goes on
    costs/<what>/<digest>.json                                seconds that a thing took to be made
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import ConfigError, RunError
from tasks.urls import without_secrets

# Of a lost race on a conditional put s3fs makes a FileExistsError for some servers, a bare OSError for others.
_LOST_RACE = {"PreconditionFailed", "412"}
_RACING = {"ConditionalRequestConflict", "409"}  # two at once, and AWS has not decided: asked again, it has
_ROUNDS = 8

UNCONDITIONAL = "the server ignores If-None-Match: let one run at a time write to this store"

_SCHEMA = b"prefsieve.schema"  # where a table keeps the digest of its columns' names and types


class Store:
    """Whole files under one URL, by path relative to it. Cheap to make: each Ray actor makes its own."""

    def __init__(self, url: str | os.PathLike[str], attempts: int = 8) -> None:
        """attempts: how often a request is tried while a server cannot be reached; 8 take about a minute."""
        protocol, scheme, rest = without_secrets(str(url), "store: ").partition("://")
        if not scheme:
            protocol = "file"
        elif protocol not in ("file", "s3") or (protocol == "s3" and not rest.partition("/")[0]):
            raise ConfigError(f"store: {str(url)[:200]!r} is neither a folder nor an s3://BUCKET URL; use one of these")
        self.url = str(url).rstrip("/")
        self.local = protocol == "file"
        if not _is_name(self.url) or (not self.local and ".." in self.url.split("/")):
            raise ConfigError(f"store: {str(url)[:200]!r} is no name that a folder or bucket can have; choose another")
        if self.local:
            self.url = str(Path(os.path.expanduser(self.url.removeprefix("file://"))).absolute())
            self.fs = fsspec.filesystem("file")
        else:
            self.fs = fsspec.filesystem(
                "s3",
                use_listings_cache=False,
                config_kwargs={"retries": {"mode": "adaptive", "max_attempts": attempts}, "connect_timeout": 10},
            )
        self.root = self.url if self.local else self.url.removeprefix("s3://")

    def __repr__(self) -> str:
        return f"Store({self.url})"

    def full(self, path: str) -> str:
        return f"{self.root}/{path}"

    # --- whole files

    def read(self, path: str) -> bytes:
        if self.local:
            return self.fs.cat_file(self.full(path))
        return self.fs.cat_file(self.full(path), max_concurrency=1)  # more would first ask how long it is

    def sha256(self, path: str) -> str:
        """Of a file of any size, read in pieces."""
        hasher = hashlib.sha256()
        with self.fs.open(self.full(path), "rb", cache_type="readahead") as file:
            while piece := file.read(8 << 20):
                hasher.update(piece)
        return hasher.hexdigest()

    def exists(self, path: str) -> bool:
        if self.local:
            return self.fs.isfile(self.full(path))
        bucket, _, key = self.full(path).partition("/")
        try:
            self.fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Sequence[str]:
        """Paths of all files below a folder, sorted; empty when there are none."""
        found = self.fs.find(self.full(prefix)) if self.local else self._keys(prefix)
        below = self.root + "/"
        names = (name.removeprefix(below) for name in found if name.startswith(below))
        return sorted(name for name in names if "/.tmp-" not in f"/{name}")

    def _keys(self, prefix: str) -> Iterator[str]:
        """One request per thousand; `find` takes three where there is nothing."""
        bucket, _, key = self.full(prefix).strip("/").partition("/")
        more: dict[str, str] = {"Prefix": f"{key}/" if key else ""}
        while more:
            page = self.fs.call_s3("list_objects_v2", Bucket=bucket, **more)
            yield from (f"{bucket}/{file['Key']}" for file in page.get("Contents", []) if file["Key"][-1] != "/")
            token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
            more = {"Prefix": more["Prefix"], "ContinuationToken": token} if token else {}

    def create(self, path: str, data: bytes) -> bool:
        """Write a new file; False when it was already there (then nothing is written)."""
        if self.local:
            with self._beside(path) as temporary:
                temporary.write_bytes(data)
                return self._link(temporary, path)
        return self._conditional(self.fs.pipe_file, self.full(path), data)

    def create_file(self, path: str, source: Path) -> bool:
        """Keep a finished local file at a new path; False when it was already there.

        From `room` of a local store the file itself is kept, without a copy: do not change it afterwards.
        """
        if self.local:
            with self._beside(path) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:  # on another disk
                    shutil.copyfile(source, temporary)
                return self._link(temporary, path)
        return self._conditional(self.fs.put_file, str(source), self.full(path))

    @contextlib.contextmanager
    def room(self) -> Iterator[Path]:
        """A local folder for files on their way into the store, gone afterwards; on a local store's own disk."""
        if self.local:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.root if self.local else None) as folder:
            yield Path(folder)

    def replace(self, path: str, data: bytes) -> None:
        """Write a pointer, over what was there."""
        if self.local:
            with self._beside(path) as temporary:
                temporary.write_bytes(data)
                os.replace(temporary, self.full(path))
        else:
            self.fs.pipe_file(self.full(path), data)

    def fetch(self, path: str, target: Path) -> Path:
        """Copy a file to a local path."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self.full(path), str(target))
        return target

    def at_hand(self, path: str, room: Path) -> Path:
        """A local path to a file's content, for reading: the file itself, or a copy of it below `room`."""
        return Path(self.full(path)) if self.local else self.fetch(path, room / path)

    def remove_file(self, path: str) -> None:
        """Remove one file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.full(path))

    def remove(self, path: str) -> None:
        """Remove a file, or all files below a path, if there are any. For what nothing refers to."""
        try:
            self.fs.rm(self.full(path), recursive=True)
        except FileNotFoundError:  # another run was first; on S3 it has no number
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # another run writes there
                raise

    # --- JSON and tables

    def read_json(self, path: str) -> Any:
        """RunError when the file is damaged."""
        try:
            return unsealed(self.read(path))
        except (ValueError, RecursionError) as error:
            raise self.damaged(path) from error

    def read_object(self, path: str, *keys: str) -> dict[str, Any]:
        """A JSON object that has these keys. RunError when the file is damaged, or another's."""
        found = self.read_json(path)
        if not isinstance(found, dict) or any(key not in found for key in keys):
            raise self.damaged(path)
        return found

    def damaged(self, path: str) -> RunError:
        """To raise for a file that holds something else than what was written there.

        What else was made of completions, Columns, Texts and duels find out where it is read.
        """
        rated = path.removeprefix("completions/")
        made = f", and what was made of it, rewards/*/{rated}," if rated != path else ""  # an engine may answer anew
        return RunError(f"{path} in {self.url} is damaged; remove it{made} and run again: only what is missing is made")

    def create_json(self, path: str, value: Any) -> bool:
        return self.create(path, sealed(value))

    def read_table(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """RunError when the file is damaged."""
        with self.open_table(path) as file:
            if not set(columns or []) <= set(file.schema_arrow.names):
                raise self.damaged(path)
            return file.read(columns)

    def columns(self, path: str) -> Sequence[str]:
        """Names of a table's columns."""
        with self.open_table(path) as file:
            return file.schema_arrow.names

    @contextlib.contextmanager
    def open_table(self, path: str, at_hand: Path | None = None) -> Iterator[pq.ParquetFile]:
        """A table to be read in the block, checked as it is read; at_hand: where its bytes are already.

        RunError when the file is damaged.
        """
        source = at_hand or (self.full(path) if self.local else pa.BufferReader(self.read(path)))
        try:
            with pq.ParquetFile(source, memory_map=at_hand is not None, page_checksum_verification=True) as file:
                if not _sound(file):
                    raise self.damaged(path)
                yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None) is None:  # with a number it is the disk's or the network's
                raise self.damaged(path) from error
            raise

    def create_table(self, path: str, table: pa.Table) -> bool:
        sink = io.BytesIO()
        pq.write_table(table.cast(signed(table.schema)), sink, **parquet_options(table.schema))
        return self.create(path, sink.getvalue())

    # --- the server's promises

    def check(self) -> str:
        """Write, read back and delete a probe. Returns what was found out, in words.

        Raises RunError when the store cannot be used. A server that ignores If-None-Match is said, not refused: with
        one writer at a time nothing is at stake, since equal paths hold equal content.
        """
        probe = f".probe/{uuid.uuid4().hex}"
        store = self if self.local else Store(self.url, attempts=1)  # what cannot be reached should be said at once
        with store._told():
            first = store.create(probe, b"1")
            second = store.create(probe, b"2")
            kept = store.read(probe)
            store.fs.rm_file(store.full(probe))
        if first and not second and kept == b"1":
            return "writes are conditional: two runs may share this store"
        return UNCONDITIONAL

    def reach(self) -> str:
        """What was found out; RunError, at once, when the store cannot be read. A folder that is not there is empty."""
        if not self.local:
            bucket, _, prefix = self.root.partition("/")
            store = Store(self.url, attempts=1)
            with store._told():
                store.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return "can be read"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # fsspec, botocore and aiohttp share no base class below this
            raise RunError(f"store {self.url} cannot be used: {_first_line(error)}. {self._hint()}") from error

    def _hint(self) -> str:
        if self.local:
            return "Check that the folder can be created and written."
        return (
            "Check that the bucket exists and the AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL "
            "of this environment (for a server other than AWS)."
        )

    # --- how

    @contextlib.contextmanager
    def _beside(self, path: str) -> Iterator[Path]:
        """A temporary path in the target's folder, gone afterwards."""
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: str) -> bool:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(temporary, self.full(path))  # fails when the target exists, unlike a rename
        except FileExistsError:
            return False
        return True

    def _conditional(self, put: Any, *arguments: Any) -> bool:
        for left in reversed(range(_ROUNDS)):
            try:
                put(*arguments, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                code = (getattr(error.__cause__, "response", None) or {}).get("Error", {}).get("Code")
                if code in _LOST_RACE:
                    return False
                if code not in _RACING or not left:
                    raise
                time.sleep(random.random())
            else:
                break
        return True


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How tables are written: texts with a dictionary, numbers and ids without, floats split by bytes, pages with CRCs.

    Without CRCs one flipped bit in three gives other data and no error (tests/faults/test_damage.py). Read back three
    times as fast as with a dictionary for everything, and no larger (benchmarks/select.py).
    """
    leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    ids = [path for path, kind in leaves if path == "prompt_id" and kind == pa.string()]
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        "use_dictionary": [path for path, kind in leaves if not pa.types.is_primitive(kind) and path not in ids],
        "column_encoding": dict.fromkeys(ids, "DELTA_LENGTH_BYTE_ARRAY"),  # no two are equal, all are of one length
        "use_byte_stream_split": [path for path, kind in leaves if pa.types.is_floating(kind)],
    }


def _leaves(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """The columns that Parquet keeps of a nested one."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    else:
        yield path, kind


def signed(schema: pa.Schema) -> pa.Schema:
    """The schema with its own digest: pages have checksums, names and types have none."""
    return schema.with_metadata({**(schema.metadata or {}), _SCHEMA: _schema_digest(schema)})


def _schema_digest(schema: pa.Schema) -> bytes:
    told = "\n".join(f"{path}: {kind}" for field in schema for path, kind in _leaves(field.name, field.type))
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest().encode()


def _sound(file: pq.ParquetFile) -> bool:
    """Whether a table's description is as it was written; others' tables have no digest."""
    told, about = file.schema_arrow, file.metadata
    digest = (told.metadata or {}).get(_SCHEMA, _schema_digest(told))
    rows = sum(about.row_group(i).num_rows for i in range(about.num_row_groups))
    return bool(digest == _schema_digest(told) and rows == about.num_rows)


def inside(path: Any) -> bool:
    """Whether a relative path that a file of the store names stays in the folder that it is relative to."""
    parts = path.split("/") if isinstance(path, str) and _is_name(path) else [""]
    return not any(part in ("", ".", "..") for part in parts) and "\\" not in path


def _is_name(path: str) -> bool:
    return "\x00" not in path and not any("\ud800" <= letter <= "\udfff" for letter in path)


def to_json(value: Any) -> bytes:
    """JSON as the store keeps it: readable, keys in the order given, ending in a newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sealed(value: Any) -> bytes:
    """JSON as the store keeps it; an object ends in the digest of all the rest."""
    return to_json({**value, "sha256": _seal(value)} if isinstance(value, dict) else value)


def unsealed(raw: bytes) -> Any:
    """What was sealed. ValueError when it was changed since; what was written by others has no seal."""
    value = json.loads(raw)
    if isinstance(value, dict) and "sha256" in value:
        del value["sha256"]
        if sealed(value) != raw:
            raise ValueError("was changed: its digest differs")
    return value


def _seal(value: Any) -> str:
    return hashlib.sha256(to_json(value)).hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
