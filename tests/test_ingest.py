"""ingest: every format, every kind of bad row, shards that survive growth, and memory that does not grow."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.errors import ConfigError, RunError
from tasks.ingest import ingest, read_shard, shards_of
from tasks.records import PROMPTS, PromptSet, digest
from tasks.sections import IngestConfig
from tasks.store import Store
from tests.conftest import files_below, prompts, python, write_jsonl


def take(source: Path | str, store: Store, **changes: Any) -> PromptSet:
    return ingest(IngestConfig.model_validate({"source": str(source), "max_quarantined": 1, **changes}), store)


def rows_of(store: Store, found: PromptSet) -> list[dict[str, Any]]:
    tables = [read_shard(store, shard["digest"]) for shard in shards_of(store, found)]
    assert all(table.schema.equals(PROMPTS) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def texts_of(store: Store, found: PromptSet) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows_of(store, found)]


def quarantine_of(store: Store) -> list[dict[str, Any]]:
    (path,) = [path for path in store.list("prompts/sources") if path.endswith(".quarantine.parquet")]
    return store.read_table(path).to_pylist()


# --- formats

ROWS = [
    {"prompt": 'a "quoted", text', "source": "one"},
    {"prompt": "two\nlines", "source": "two"},
    {"prompt": "ünïcode \u2028 \U0001f9ca", "source": ""},
]


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark, as spreadsheets write it
        writer = csv.DictWriter(file, ["prompt", "source"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_disk(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def write_splits(path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.ndjson": lambda path: path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "bom.jsonl": lambda path: path.write_text(
        "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS), encoding="utf-8"
    ),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "bom.json": lambda path: path.write_text("\ufeff \n" + json.dumps(ROWS), encoding="utf-8"),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "saved": write_disk,
    "splits": write_splits,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_prompts(name: str, tmp_path: Path, store: Store) -> None:
    WRITERS[name](tmp_path / name)
    found = take(tmp_path / name, store)
    assert found.counts.into == found.counts.out == 3
    assert found.digest == take(write_jsonl(tmp_path / "reference.jsonl", ROWS), store).digest
    rows = rows_of(store, found)
    assert [row["messages"] for row in rows] == [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
    assert [row["source"] for row in rows] == ["one", "two", "unknown"]
    assert [row["prompt_id"] for row in rows] == [digest(row["messages"]) for row in rows]


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "many"
    write_jsonl(folder / "b" / "2.jsonl", [{"prompt": "second"}])
    write_jsonl(folder / "a" / "1.jsonl", [{"prompt": "first"}])
    write_jsonl(folder / "_unfinished.jsonl", [{"prompt": "not this"}])
    (folder / "README.md").write_text("about the data")
    assert texts_of(store, take(folder, store)) == ["first", "second"]
    assert texts_of(store, take(f"{folder}/*/?.jsonl", store)) == ["first", "second"]
    assert texts_of(store, take(f"file://{folder}/b/2.jsonl", store)) == ["second"]
    assert texts_of(store, take(folder / "_unfinished.jsonl", store)) == ["not this"]


def test_a_folder_of_several_formats_is_refused(tmp_path: Path, store: Store) -> None:
    write_jsonl(tmp_path / "d" / "a.jsonl", [{"prompt": "x"}])
    (tmp_path / "d" / "b.csv").write_text("prompt\ny\n")
    with pytest.raises(ConfigError, match=r"several formats \(csv, jsonl\).*such as"):
        take(tmp_path / "d", store)


def test_a_file_with_the_letters_of_a_glob_in_its_name_is_found(tmp_path: Path, store: Store) -> None:
    assert take(write_jsonl(tmp_path / "run[1].jsonl", ROWS), store).counts.out == 3


def test_chat_messages_are_kept_with_their_roles(tmp_path: Path, store: Store) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and now?"},
    ]
    rows = [{"prompt": messages}, {"prompt": "plain"}, {"prompt": [{"role": "user", "content": "plain", "extra": 1}]}]
    found = take(write_jsonl(tmp_path / "chat.jsonl", rows), store)
    assert rows_of(store, found)[0]["messages"] == messages
    assert found.counts.dropped == {"duplicate": 1}


def test_columns_are_mapped_and_kept_for_function_scorers(tmp_path: Path, store: Store) -> None:
    rows = [{"question": "q", "from": "exam", "answer": 4, "meta": {"x": [1]}, "other": "dropped"}]
    columns = {"prompt": "question", "source": "from", "keep": ["answer", "meta"]}
    (row,) = rows_of(store, take(write_jsonl(tmp_path / "p.jsonl", rows), store, columns=columns))
    assert row["source"] == "exam"
    assert json.loads(row["fields"]) == {"answer": 4, "meta": {"x": [1]}}


def test_the_first_of_equal_prompts_is_kept(tmp_path: Path, store: Store) -> None:
    rows = [{"prompt": "a", "source": "first"}, {"prompt": "b"}, {"prompt": "a", "source": "second"}]
    found = take(write_jsonl(tmp_path / "p.jsonl", rows), store, max_quarantined=0)
    assert [row["source"] for row in rows_of(store, found)] == ["first", "unknown"]
    assert (found.counts.into, found.counts.out, found.counts.dropped) == (3, 2, {"duplicate": 1})


def test_a_limit_takes_the_first_rows(tmp_path: Path, store: Store) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(50))
    assert take(source, store, limit=7).counts.into == 7
    assert texts_of(store, take(source, store, limit=2)) == ["what is 0 plus 0", "what is 1 plus 1"]


# --- bad rows


def test_every_kind_of_bad_row_is_quarantined_with_its_reason(tmp_path: Path, store: Store) -> None:
    def message(**changes: Any) -> bytes:
        return json.dumps({"prompt": [{"role": "user", "content": "x", **changes}]}).encode()

    lines: list[tuple[bytes, str | None]] = [
        (b'{"prompt": "good"}', None),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        (b'{"prompt": "\\ud83d alone"}', "not UTF-8"),
        (b'{"prompt": "x", "source": "\\udc00"}', "not UTF-8"),
        (b'{"prompt": "half', "not JSON"),
        (b'{"prompt": ' + b"[" * 20_000, "nested too deeply"),
        (b'"just a text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"promt": "x"}', "no prompt column"),
        (b'{"prompt": null}', "no prompt"),
        (b'{"prompt": []}', "no prompt"),
        (b'{"prompt": ""}', "empty prompt"),
        (b'{"prompt": " \\n\\t"}', "empty prompt"),
        (b'{"prompt": 7}', "prompt is neither text nor messages"),
        (b'{"prompt": {"role": "user", "content": "x"}}', "prompt is neither text nor messages"),
        (b'{"prompt": ["x"]}', "malformed message"),
        (message(content=None), "malformed message"),
        (message(content=[{"type": "text", "text": "x"}]), "malformed message"),
        (message(role="bot"), "unknown role"),
        (message(role=[]), "unknown role"),
        (message(role=None), "unknown role"),
        (message(role="assistant"), "last message is the assistant's"),
        (b'{"prompt": "nul \\u0000 here"}', "NUL character"),
        (b'{"prompt": "' + b"x" * 101 + b'"}', "prompt too long"),
        (b'{"prompt": "good"}', "duplicate"),
        (b'{"prompt": "also good"}', None),
    ]
    source = tmp_path / "p.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line, _ in lines))
    found = take(source, store, max_chars=100)
    assert texts_of(store, found) == ["good", "also good"]
    expected = [reason for _, reason in lines if reason]
    assert found.counts.into == len(lines)
    assert found.counts.out == 2
    assert found.counts.dropped == {reason: expected.count(reason) for reason in expected}
    quarantined = quarantine_of(store)
    numbers = [number for number, (_, reason) in enumerate(lines, 1) if reason and reason != "duplicate"]
    assert [row["row"] for row in quarantined] == numbers
    assert [row["reason"] for row in quarantined] == [lines[number - 1][1] for number in numbers]
    assert all(len(row["excerpt"]) <= 500 for row in quarantined)


def test_a_missing_kept_column_or_one_that_is_not_json_is_a_bad_row(tmp_path: Path, store: Store) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": NaN}\n{"prompt": "c", "answer": null}\n')
    found = take(source, store, columns={"keep": ["answer"]})
    assert found.counts.dropped == {"missing column": 1, "kept column is not JSON": 1}


def test_bad_rows_of_a_csv_file_are_quarantined(tmp_path: Path, store: Store) -> None:
    source = tmp_path / "p.csv"
    source.write_bytes(b"source,prompt\nx,good\nx,\xff\xfe\n\xff,bad source\nx\nx,a,b\n\nx,also good\n")
    found = take(source, store)
    assert texts_of(store, found) == ["good", "also good"]
    assert found.counts.dropped == {"not UTF-8": 2, "no prompt": 1, "more fields than columns": 1}


def test_bad_rows_of_a_parquet_file_are_quarantined(tmp_path: Path, store: Store) -> None:
    offsets, values = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 6, 0, 0, 0])), pa.py_buffer(b"\xff\xfegood")
    pq.write_table(pa.table({"prompt": pa.StringArray.from_buffers(2, offsets, values)}), tmp_path / "p.parquet")
    found = take(tmp_path / "p.parquet", store)
    assert texts_of(store, found) == ["good"]
    assert found.counts.dropped == {"not UTF-8": 1}


def test_rows_of_a_json_array_that_are_no_objects_are_quarantined(tmp_path: Path, store: Store) -> None:
    (tmp_path / "p.json").write_text('[{"prompt": "good"}, 1, null, [{"prompt": "nested"}]]')
    assert take(tmp_path / "p.json", store).counts.dropped == {"not a JSON object": 3}


DEEP = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from tasks.sections import IngestConfig
from tasks.rows import BadRow
from tasks.sources import read_rows
for row, number in read_rows(IngestConfig(source=sys.argv[1])):
    print(number, f"{row.reason}: {row.excerpt[:20]}" if isinstance(row, BadRow) else row)
"""


def test_a_row_that_is_nested_endlessly_is_quarantined_before_it_takes_the_memory(tmp_path: Path) -> None:
    """The others are read. Paths to 100,000 levels would take 24 GB."""
    rows = [
        "[" * 100_000 + "]" * 100_000,
        '{"prompt": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        "[" * 500 + "]" * 500,
    ]
    text = f'[{{"prompt": "one"}}, {", ".join(rows)}, {{"prompt": "two"}}]'
    (tmp_path / "p.json").write_text(text)
    done = python(DEEP, tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 {'prompt': 'one'}",
        "2 nested too deeply: 100,000 levels",
        "3 nested too deeply: 100,001 levels",
        "4 not a JSON object: [[[[[[[[[[[[[[[[[[[[",
        "5 {'prompt': 'two'}",
    ]


def test_more_bad_rows_than_allowed_end_the_run_with_examples(tmp_path: Path, store: Store) -> None:
    bad = [{"prompt": f"bad {i}", "oops": 1} for i in range(11)]
    rows = [*prompts(89), *({"question": row["prompt"]} for row in bad)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(RunError) as caught:
        take(source, store, max_quarantined=0.1)
    message = str(caught.value)
    assert "11 of 100 rows are bad, more than max_quarantined 10%" in message
    assert "row 90: no prompt column: columns: question" in message
    take(source, store, max_quarantined=0.11)
    with pytest.raises(RunError, match="row 90: no prompt column"):  # also when nothing has to be read again
        take(source, store, max_quarantined=0.1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 5000)[:-30]),
        ("no.jsonl.gz", b'{"prompt": "x"}\n'),
        ("no.parquet", b"this is no parquet file at all"),
        ("cut.json", b'[{"prompt": "a"}, {"prompt": "b"'),
        ("lines.json", b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("open.csv", b'prompt\ngood\n"never closed\nlost\nlost too\n'),
    ],
)
def test_a_file_whose_rows_cannot_be_counted_ends_the_run(
    name: str, content: bytes, tmp_path: Path, store: Store
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match="is damaged or no") as caught:
        take(tmp_path / name, store)
    assert name in str(caught.value)
    assert not [path for path in store.list("prompts") if path.endswith(".json")]


@pytest.mark.parametrize(
    ("name", "content"), [("p.jsonl", b""), ("p.csv", b""), ("p.csv", b"prompt\n"), ("p.json", b"[]"), ("p.json", b"")]
)
def test_a_source_without_a_usable_prompt_is_refused(name: str, content: bytes, tmp_path: Path, store: Store) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds no usable prompt \(0 rows\)"):
        take(tmp_path / name, store)


def test_a_source_with_nothing_but_bad_rows_is_refused_with_examples(tmp_path: Path, store: Store) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"question": "x"}])
    with pytest.raises(ConfigError, match=r"1 rows; dropped: \{'no prompt column': 1\}. row 1: .*columns: question"):
        take(source, store)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent.jsonl", "does not exist; check the path"),
        ("absent/*.jsonl", "does not exist; check the path"),
        ("someone/absent-dataset", "no file here, and the hub cannot be reached"),
        ("nowhere://x/y.jsonl", "cannot be opened"),
        (".", "does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_a_mistake_in_the_configuration(
    source: str, words: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        take(source, store)
    assert repr(source) in str(caught.value)


def test_an_unknown_ending_needs_a_format(tmp_path: Path, store: Store) -> None:
    source = write_jsonl(tmp_path / "p.txt", ROWS)
    with pytest.raises(ConfigError, match=r"ingest\.format: cannot tell the format of 'p.txt'"):
        take(source, store)
    assert take(source, store, format="jsonl").counts.out == 3


def test_an_absent_split_is_refused_with_those_that_are_there(tmp_path: Path, store: Store) -> None:
    write_splits(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"ingest\.split: .* has no split 'test': train"):
        take(tmp_path / "saved", store, split="test")


# --- again, and more


def test_the_same_content_is_found_again_at_another_path(tmp_path: Path, store: Store) -> None:
    first = take(write_jsonl(tmp_path / "p.jsonl", [*prompts(40), {"bad": 1}]), store, shard_size=16)
    before = files_below(Path(store.url))
    (tmp_path / "p.jsonl").rename(tmp_path / "moved.jsonl")
    again = take(tmp_path / "moved.jsonl", store, shard_size=16)
    assert (again.digest, again.counts) == (first.digest, first.counts)
    assert (first.work.shards_made, again.work.shards_made, again.work.shards_reused) == (3, 0, 3)
    assert files_below(Path(store.url)) == before


def test_other_settings_are_not_mistaken_for_the_same_source(tmp_path: Path, store: Store) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x", "question": "y"}])
    digests = {
        take(source, store).digest,
        take(source, store, columns={"prompt": "question"}).digest,
        take(source, store, columns={"keep": ["question"]}).digest,
    }
    assert len(digests) == 3


def test_the_same_bytes_in_several_files_are_not_the_same_source(tmp_path: Path, store: Store) -> None:
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "1.csv").write_text("prompt\na\n")
    (tmp_path / "split" / "2.csv").write_text("prompt\nb\n")
    (tmp_path / "one.csv").write_text("prompt\na\nprompt\nb\n")
    assert texts_of(store, take(tmp_path / "split", store)) == ["a", "b"]
    assert texts_of(store, take(tmp_path / "one.csv", store)) == ["a", "prompt", "b"]


def shard_digests(store: Store, found: PromptSet) -> list[str]:
    return [shard["digest"] for shard in shards_of(store, found)]


def test_a_grown_file_keeps_every_old_shard_also_the_partial_last_one(tmp_path: Path, store: Store) -> None:
    source = tmp_path / "p.jsonl"
    sets = [take(write_jsonl(source, prompts(number)), store, shard_size=16) for number in (32, 40, 41, 80)]
    shards = [shard_digests(store, found) for found in sets]
    assert [len(names) for names in shards] == [2, 3, 4, 7]  # 16 16 | 8 | 1 | 16 16 7
    for old, new in itertools.pairwise(shards):
        assert new[: len(old)] == old
    before = files_below(Path(store.url) / "prompts" / "shards")
    take(write_jsonl(source, prompts(81)), store, shard_size=16)
    after = files_below(Path(store.url) / "prompts" / "shards")
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1
    assert texts_of(store, sets[-1]) == [row["prompt"] for row in prompts(80)]


def test_a_try_on_a_few_rows_is_part_of_the_whole_later(tmp_path: Path, store: Store) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(40))
    tried = shard_digests(store, take(source, store, shard_size=16, limit=10))
    whole = shard_digests(store, take(source, store, shard_size=16))
    assert whole[:1] == tried and len(whole) == 3  # 10 | 16 | 14
    again = shard_digests(store, take(source, store, shard_size=16, limit=12))
    assert again[:1] == tried and len(again) == 2  # 10 | 2
    grown = shard_digests(store, take(write_jsonl(source, prompts(50)), store, shard_size=16))
    assert grown[:3] == whole and len(grown) == 4  # 10 | 16 | 14 | 10, though one was cut at 12 meanwhile


def test_a_grown_source_finds_its_old_shards_under_another_name(tmp_path: Path, store: Store) -> None:
    old = shard_digests(store, take(write_jsonl(tmp_path / "monday.jsonl", prompts(40)), store, shard_size=16))
    new = shard_digests(store, take(write_jsonl(tmp_path / "tuesday.jsonl", prompts(60)), store, shard_size=16))
    assert new[: len(old)] == old


def test_a_changed_row_changes_its_shard_and_not_those_before(tmp_path: Path, store: Store) -> None:
    source = tmp_path / "p.jsonl"
    rows = prompts(48)
    old = shard_digests(store, take(write_jsonl(source, rows), store, shard_size=16))
    rows[20] = {"prompt": "changed"}
    new = shard_digests(store, take(write_jsonl(source, rows), store, shard_size=16))
    assert [a == b for a, b in zip(old, new, strict=True)] == [True, False, True]


def test_two_stores_cut_the_same_source_alike(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(40))
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert shard_digests(one, take(source, one)) == shard_digests(two, take(source, two))


# --- memory

PEAK = """
import resource, sys
from tasks.sections import IngestConfig
from tasks.ingest import ingest
from tasks.store import Store

found = ingest(IngestConfig(source=sys.argv[1]), Store(sys.argv[2]))
print(found.counts.out, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    peaks = []
    for number in (20_000, 200_000):
        source = tmp_path / f"{number}.jsonl"
        with source.open("w") as file:
            file.writelines(f'{{"prompt": "prompt number {i} {"x" * 60}"}}\n' for i in range(number))
        done = python(PEAK, source, tmp_path / f"store-{number}")
        assert done.returncode == 0, done.stderr
        out, peak = map(int, done.stdout.split())
        assert out == number
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40, f"MiB at the peak: {peaks}"
