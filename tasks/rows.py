"""Rows of one open file of text: JSON lines, a JSON array or CSV.

A row that cannot be read comes out as a BadRow in its place. None is held beyond MAX_ROW: a small compressed file may
hold gigabytes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import uuid
from collections.abc import Iterator
from typing import Any

import ijson

MAX_ROW = 64 * 2**20  # bytes; of CSV, characters
_TOO_LONG = (
    f"it holds a row of more than {MAX_ROW >> 20} MiB; take it out, or use JSON lines, whose long rows are skipped"
)
_DEEPEST = 500  # levels of a JSON row: as many as Python's own functions can walk through
_OPENING, _CLOSING = {"start_map", "start_array"}, {"end_map", "end_array"}
_BOM = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """A row that cannot be used: why, and how it begins."""

    def __init__(self, reason: str, excerpt: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = excerpt[:500].encode(errors="backslashreplace").decode()


def jsonl_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    for number, line in enumerate(_lines(file)):
        if number == 0:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_ROW:
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
        if len(rest) > MAX_ROW:
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


def json_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    """Of an array of objects, which is never held as a whole."""
    rest = _Rest(file)
    if rest.head and rest.head[:1] != b"[":
        raise ijson.JSONError("it holds no array; where each line is an object, set ingest.format to jsonl")
    if not rest.head:
        return
    depth, deepest, row, twice = 0, 0, ijson.ObjectBuilder(_Once), ""
    # Not ijson.items: it keeps the path to every open level, 24 GB for an array nested 100,000 deep. In large pieces,
    # since a text that has not ended is gone through once more with each.
    for event, value in ijson.basic_parse(rest, use_float=True, buf_size=1 << 20):
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
            rest.since = 0
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
    """A file from its first byte that is neither a byte order mark nor white space. since: bytes after the last row."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.head = b""
        self.since = 0
        while not self.head and (piece := file.read(1 << 16)):
            self.head = piece.removeprefix(_BOM).lstrip()

    def read(self, size: int = -1) -> bytes:
        if self.since > MAX_ROW:
            raise ijson.JSONError(_TOO_LONG)
        if not self.head or size == 0:
            piece = self.file.read(size)
        else:
            piece, self.head = self.head, b""
        self.since += len(piece)
        return piece


def csv_rows(file: Any) -> Iterator[dict[str, Any] | BadRow]:
    csv.field_size_limit(MAX_ROW)
    # Undecodable bytes become lone surrogates, which ingest refuses row by row.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    end = uuid.uuid4().hex  # a last line of our own: a quote that is never closed would swallow it
    lines = _CsvLines(text)
    reader = csv.reader(itertools.chain(lines, [end]))
    columns: list[str] | None = None
    for row in reader:
        lines.since = 0
        if row == [end]:
            return
        if columns is None:
            columns = row
            if twice := [name for name in columns if name and columns.count(name) > 1]:
                raise csv.Error(f"two columns are called {twice[0][:100]!r}")
        elif len(row) > len(columns):
            yield BadRow("more fields than columns", repr(row[len(columns) :][:9]))
        elif row:
            yield dict(itertools.zip_longest(columns, row))
    raise csv.Error("a quote is never closed, so its last rows cannot be told apart")


class _CsvLines:
    """Lines of a text. since: characters after the last row, of which a quote may hold many lines."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.since = 0

    def __iter__(self) -> Iterator[str]:
        while line := self.text.readline(MAX_ROW + 1):
            self.since += len(line)
            if self.since > MAX_ROW:
                raise csv.Error(_TOO_LONG)
            yield line
