"""Hostile rows through ingest and import: kept as the text they are, or quarantined with a reason."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, DatasetInfo, Features, Image, Json, List, Value

from flows.cli import main
from tasks.errors import ConfigError, RunError
from tasks.imports import import_
from tasks.ingest import ingest, read_shard, shards_of
from tasks.records import PromptSet, Rewards
from tasks.rows import BadRow
from tasks.sections import ImportConfig, IngestConfig
from tasks.sources import read_rows
from tasks.store import Store
from tasks.tables import dataset_rows
from tests.conftest import python
from tests.hostile.corpus import (
    TEXTS,
    HostileFile,
    HostileRow,
    hostile_configurations,
    hostile_files,
    hostile_imports,
    hostile_pairs,
    hostile_rows,
)

GOOD = b'{"prompt": "the good one", "source": "here", "answer": 1}\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder; at the end nothing but the source and the store may be in it, and nothing beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    written = {path.name for path in folder.iterdir()} | {path.name for path in tmp_path.iterdir()}
    assert {name.partition(".")[0] for name in written} <= {"here", "store", "source", "p"}


def take(place: Path, content: bytes, name: str = "p.jsonl", **changes: Any) -> tuple[PromptSet, Store]:
    (place / name).write_bytes(content)
    store = Store(place / "store")
    values = {"source": name, "max_quarantined": 1, "columns": {"keep": ["answer"]}, **changes}
    return ingest(IngestConfig.model_validate(values), store), store


def quarantined(store: Store) -> list[dict[str, Any]]:
    [path] = [path for path in store.list("prompts/sources") if path.endswith(".quarantine.parquet")]
    return store.read_table(path).to_pylist()


def test_the_corpus_is_as_large_as_it_says() -> None:
    rows = [*hostile_rows(), *hostile_imports(), *hostile_pairs()]
    assert len(rows) + len(hostile_files()) + len(hostile_configurations()) > 600
    assert len({row.name for row in hostile_rows()}) == len(hostile_rows())
    assert len({one.name for one in hostile_configurations()}) == len(hostile_configurations())


@pytest.mark.parametrize("row", hostile_rows(), ids=lambda row: row.name)
def test_a_hostile_row_is_kept_as_it_is_or_quarantined_with_a_reason(row: HostileRow, place: Path) -> None:
    found, store = take(place, row.line + b"\n" + GOOD)
    assert found.counts.into == 2 and found.counts.out >= 1
    bad = quarantined(store)
    assert [one["reason"] for one in bad] in [[reason] if reason else [] for reason in row.reasons]
    assert all(len(one["excerpt"]) <= 500 for one in bad)
    if not bad and found.counts.out == 2:
        given = json.loads(row.line)
        [shard] = shards_of(store, found)
        kept = read_shard(store, shard["digest"]).to_pylist()[0]
        expected = (
            [{"role": "user", "content": given["prompt"]}] if isinstance(given["prompt"], str) else given["prompt"]
        )
        assert kept["messages"] == [{"role": one["role"], "content": one["content"]} for one in expected]
        assert kept["source"] == str(given.get("source") or "unknown")
        assert json.loads(kept["fields"]) == {"answer": given["answer"]}


def test_all_hostile_rows_in_one_file_are_counted_one_by_one(place: Path) -> None:
    rows = [row for row in hostile_rows() if len(row.line) < 10_000]
    found, store = take(place, b"\n".join(row.line for row in rows) + b"\n" + GOOD)
    bad = [row for row in rows if "" not in row.reasons]
    assert found.counts.into == len(rows) + 1
    assert len(quarantined(store)) >= len(bad)


def imported(store: Store, found: Rewards) -> Iterator[tuple[str, str, str, float | None, str | None]]:
    """Prompt, author, text, rating and why there is none, of each completion."""
    [shard] = shards_of(store, found.completions.prompts)
    [texts] = [store.read_table(path).to_pylist() for path in store.list("completions")]
    rated = [row for path in store.list("rewards") for row in store.read_table(path).to_pylist()]
    for i, (prompt, row) in enumerate(zip(read_shard(store, shard["digest"]).to_pylist(), texts, strict=True)):
        none = {"rewards": [None] * len(row["texts"]), "reasons": ["of no row"] * len(row["texts"])}
        by = rated[i] if rated else none
        for one in zip(row["generators"], row["texts"], by["rewards"], by["reasons"], strict=True):
            yield prompt["messages"][-1]["content"], *one


def leaves(value: Any) -> list[Any]:
    """All values inside one that are neither lists nor mappings; also of one that is nested too deeply to recurse."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, list | dict):
            left += one if isinstance(one, list) else one.values()
        else:
            found.append(one)
    return found


def number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@pytest.mark.parametrize(
    ("rows", "config"),
    [(hostile_imports(), {"ratings": [{"name": "score"}]}), (hostile_pairs(), {})],
    ids=["rated completions", "pairs"],
)
def test_hostile_completions_are_imported_as_they_are_or_quarantined(
    rows: list[HostileRow], config: dict[str, Any], tmp_path: Path
) -> None:
    """One by one, behind a good row of the same form, each into a store of its own."""
    forms = {
        "text": (b'{"prompt": "q", "generator": "g", "text": "good", "score": 2}\n', ["good"]),
        "completion": (b'{"prompt": "q", "completions": [{"text": "good", "score": 3}]}\n', ["good"]),
        "chosen": (b'{"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 1}\n', ["good", "bad"]),
    }
    for i, row in enumerate(rows):
        kind = "completion" if b"completions" in row.line else "chosen" if b"chosen" in row.line else "text"
        good, texts = forms[kind]
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "p.jsonl").write_bytes(good + row.line + b"\n")
        store = Store(folder / "store")
        values = {"source": str(folder / "p.jsonl"), "max_quarantined": 1, **config}
        found = import_(ImportConfig.model_validate(values), store)
        kept, bad = list(imported(store, found)), quarantined(store)
        assert [text for prompt, _, text, *_ in kept if prompt == "q"] == texts, row.name
        mine = [one for one in kept if one[0] != "q"]
        assert all(one["row"] == 2 and one["reason"] for one in bad), row.name
        assert mine or bad, row.name
        if mine:
            values = json.loads(row.line)
            several = values.get("completions", values.get("text"))
            number_of = len(several) if isinstance(several, list) else 2 if kind == "chosen" else 1
            assert bad or len(mine) == number_of, row.name
            given = leaves(values)
            names = {"unknown", "chosen", "rejected", *map(str, given)}
            for prompt, author, text, rating, reason in mine:
                assert (prompt == "p" and text in given) or prompt + text in given, row.name
                assert author in names, row.name
                assert rating in map(number, given) if reason is None else rating is None and reason, row.name
        assert sorted(path.name for path in folder.iterdir()) == ["p.jsonl", "store"], row.name


@pytest.mark.parametrize("file", hostile_files(), ids=lambda file: file.name)
def test_a_hostile_file_ends_in_words_or_in_rows_that_are_counted(file: HostileFile, place: Path) -> None:
    started = time.monotonic()
    try:
        found, _ = take(place, file.content, file.file, columns={})
    except (ConfigError, RunError) as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)
        assert file.file in str(error)
    else:
        assert found.counts.into >= 1
    assert time.monotonic() - started < 10


PEAK = """
import re, sys
from pathlib import Path
from tasks.errors import ConfigError, RunError
from tasks.ingest import ingest
from tasks.sections import IngestConfig
from tasks.store import Store

columns = {"keep": sys.argv[2:]}
try:
    ingest(IngestConfig(source=sys.argv[1], max_quarantined=1, columns=columns), Store("store"))
except (ConfigError, RunError):
    pass
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""
UNFOLDING = [file for file in hostile_files() if re.search(r"[16]00 MB|one long text", file.name)]


@pytest.mark.parametrize("file", UNFOLDING, ids=lambda file: file.name)
def test_a_small_file_that_unfolds_to_gigabytes_does_not_take_the_memory(file: HostileFile, place: Path) -> None:
    (place / file.file).write_bytes(file.content)
    done = python(PEAK, file.file, cwd=place)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 450, "MiB at the peak"


def test_kept_columns_that_are_long_are_quarantined_and_not_held_in_memory(place: Path) -> None:
    with gzip.open(place / "p.jsonl.gz", "wb", 1) as file:
        for i in range(20):
            file.write(b'{"prompt": "p %d", "answer": "%s"}\n' % (i, b"x" * (30 * 2**20)))
        file.write(b'{"prompt": "good", "answer": "%s"}\n' % (b"x" * 900_000))
    done = python(PEAK, "p.jsonl.gz", "answer", cwd=place)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600, "MiB at the peak"
    store = Store(place / "store")
    assert [one["reason"] for one in quarantined(store)] == ["kept columns too long"] * 20
    assert len(store.list("prompts/shards")) == 1


def test_a_row_of_a_parquet_that_is_too_long_is_quarantined_and_the_next_one_is_read(place: Path) -> None:
    table = pa.table({"prompt": ["x" * (65 * 2**20), "good"], "answer": [1, 2]})
    pq.write_table(table, place / "source")
    found, store = take(place, (place / "source").read_bytes(), "p.parquet")
    assert found.counts.out == 1
    assert [one["reason"] for one in quarantined(store)] == ["row too long"]


def test_a_zip_of_one_file_is_read_and_what_nothing_unpacks_is_refused(place: Path) -> None:
    with zipfile.ZipFile(place / "source", "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/any name", GOOD)
    found, _ = take(place, (place / "source").read_bytes(), "p.jsonl.zip")
    assert found.counts.out == 1
    for form in ("auto", "jsonl"):
        with pytest.raises(ConfigError, match=r"p\.jsonl\.zst' cannot be unpacked here; unpack it"):
            take(place, GOOD, "p.jsonl.zst", format=form)


def test_broken_text_in_a_saved_data_set_is_quarantined(place: Path) -> None:
    offsets, values = pa.py_buffer(struct.pack("<3i", 0, 2, 6)), pa.py_buffer(b"\xff\xfegood")
    Dataset(pa.table({"prompt": pa.StringArray.from_buffers(2, offsets, values)})).save_to_disk("source")
    bad, good = [row for row, _ in read_rows(IngestConfig(source="source"))]
    assert isinstance(bad, BadRow) and bad.reason == "not UTF-8"
    assert good == {"prompt": "good"}


@pytest.mark.parametrize("streaming", [False, True])
def test_images_and_sounds_beside_a_prompt_are_not_decoded_and_json_is(streaming: bool, place: Path) -> None:
    """Sounds need a library that is not there, and paths are the data's."""
    media = {"bytes": b"nothing that can be decoded", "path": "/etc/hostname"}
    kinds = Features({"prompt": Value("string"), "picture": Image(), "sounds": List(Audio()), "about": Json()})
    table = pa.table(
        {
            "prompt": ["x"],
            "picture": pa.array([media], Image().pa_type),
            "sounds": pa.array([[media]], pa.list_(Audio().pa_type)),
            "about": pa.array(['{"a": [1]}'], pa.json_()),
        }
    )
    loaded = Dataset(table, info=DatasetInfo(features=kinds))
    [row] = dataset_rows(loaded.to_iterable_dataset() if streaming else loaded)
    assert row == {"prompt": "x", "picture": media, "sounds": [media], "about": {"a": [1]}}


def test_a_saved_data_set_that_is_cut_off_ends_in_words(place: Path) -> None:
    Dataset.from_dict({"prompt": ["x" * 1000] * 50}).save_to_disk("source")
    [data] = (place / "source").glob("*.arrow")
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(RunError, match="is damaged or no save_to_disk folder"):
        list(read_rows(IngestConfig(source="source")))


def test_a_parquet_with_a_flipped_bit_anywhere_ends_in_words_or_in_rows(place: Path) -> None:
    rows = pa.table({"prompt": [f"a {i}" for i in range(200)], "n": [[{"a": str(i)}] for i in range(200)]})
    pq.write_table(rows, place / "source", compression="snappy")
    whole = (place / "source").read_bytes()
    for bit in range(5, len(whole) * 8, 41):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (place / "p.parquet").write_bytes(changed)
        with contextlib.suppress(RunError):
            list(read_rows(IngestConfig(source="p.parquet")))


def test_a_row_that_does_not_end_is_quarantined_and_the_next_one_is_read(place: Path) -> None:
    found, store = take(place, b'{"prompt": "' + b"x" * (66 * 2**20) + b'"}\n' + GOOD)
    assert [one["reason"] for one in quarantined(store)] == ["row too long"]
    assert found.counts.out == 1


def test_values_of_parquet_that_python_does_not_have_are_quarantined(place: Path) -> None:
    table = pa.table({"prompt": ["far", "near"], "answer": pa.array([2**50, 0], pa.timestamp("ms"))})
    pq.write_table(table, place / "source")
    found, store = take(place, (place / "source").read_bytes(), "p.parquet")
    assert found.counts.out == 1
    assert [one["reason"] for one in quarantined(store)] == ["no value that Python has"]


def test_fields_of_one_name_in_a_parquet_are_quarantined(place: Path) -> None:
    struct = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["x"])], names=["role", "role"])
    pq.write_table(pa.table({"prompt": struct, "answer": [1]}), place / "source")
    with pytest.raises(ConfigError, match="holds no usable prompt"):
        take(place, (place / "source").read_bytes(), "p.parquet")


@pytest.mark.parametrize(
    "about", [b"{}", b"[]", b'{"_data_files": [{"filename": "../../../etc/passwd"}]}', b"\xff", b"{"]
)
def test_a_folder_of_datasets_that_is_none_ends_in_words(about: bytes, place: Path) -> None:
    folder = place / "source"
    folder.mkdir()
    (folder / "dataset_info.json").write_bytes(about)
    (folder / "state.json").write_bytes(about)
    with pytest.raises((ConfigError, RunError), match="source"):
        list(read_rows(IngestConfig(source="source")))


def test_names_in_data_never_become_paths(place: Path) -> None:
    """Sources, generators and ratings with every hostile text, through pairs and a subset to a published version."""
    rows = [
        {"prompt": f"p {i}", "source": text[:900], "generator": text[:900], "text": f"{text} {j}", "score": j + i / 100}
        for i, text in enumerate(TEXTS.values())
        for j in range(3)
    ]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "store": str(place / "store"),
        "import": {"source": "p.jsonl", "ratings": [{"name": "score"}]},
        "subset": [{"name": "top", "steps": [{"rank": "margin", "fraction": 1.0}]}],
    }
    published = publish_import(config)
    store = Store(place / "store")
    assert all(all(letter.isalnum() or letter in "/._-" for letter in path) for path in store.list(""))
    page = store.read(f"{published}/report.html").decode()
    check_page(page)
    card = re.sub(r"`[^`]*`", "", store.read(f"{published}/README.md").decode())  # code is shown as it is
    assert card.count("---\n") >= 2 and not re.search(r"(?<!\\)<(script|img)", card)


def publish_import(values: dict[str, Any]) -> str:
    """The stages of curate on data that exist already; place of the first version."""
    from tasks.config import CurateConfig
    from tasks.pair import pair
    from tasks.publish import publish
    from tasks.subset import subset

    config = CurateConfig.model_validate(values)
    store = Store(config.store_url)
    assert config.import_
    rewards = import_(config.import_, store)
    pairs = pair(config.pair[0], rewards, store)
    [taken] = subset(config.subset[0], pairs, store)
    return publish(config.publish, config.subset[0], taken, store).place


def check_page(page: str) -> None:
    """A browser finds no script, no handler and nothing to load in it."""
    from html.parser import HTMLParser

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in {"script", "iframe", "object", "embed", "img", "base", "form", "link"}, tag
            for name, value in attributes:
                assert not name.startswith("on"), (tag, name)
                if name in {"href", "src", "action", "srcset"}:
                    assert (value or "").startswith("#"), (tag, name, value)

    Elements(convert_charrefs=True).feed(page)


def test_hostile_texts_are_shown_without_commands_to_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": t, "text": t, "score": 1}) + "\n" for t in TEXTS.values())
    )
    (place / "source").write_text(
        "import: {source: p.jsonl, ratings: [{name: score}]}\nsubset: [{name: t, steps: [{rank: random, count: 1}]}]\n"
    )
    monkeypatch.setattr(sys, "argv", ["prefsieve", "import", "source", "--dry-run"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    out = capfd.readouterr().out
    assert "\x1b]" not in out and "\x1b[2J" not in out and "\x07" not in out
    assert os.listdir(place.parent) == ["here"]
