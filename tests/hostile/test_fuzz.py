"""Fuzzing: whatever comes in, the readers end in data, in a bad row or in one of the two errors that have words."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.cli import FLOWS, parse
from flows.values import load_values
from tasks import rubric
from tasks.errors import ConfigError, RunError
from tasks.imports import import_, preview
from tasks.ingest import ingest
from tasks.sections import ImportConfig, IngestConfig, JudgeConfig
from tasks.store import Store, inside, to_json
from tasks.versions import damage, find_version, list_versions
from tests.conftest import curate_values
from tests.hostile.corpus import TEXTS

texts = st.text(max_size=20) | st.sampled_from(sorted(TEXTS.values()))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10**40, "user", "x"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
keys = st.sampled_from(
    [
        "prompt",
        "source",
        "messages",
        "role",
        "content",
        "text",
        "generator",
        "score",
        "chosen",
        "rejected",
        "completions",
    ]
)
rows = st.dictionaries(keys, values | st.lists(st.dictionaries(keys, values, max_size=3), max_size=3), max_size=6)
lines = rows.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=60)
GOOD = [b'{"prompt": "good", "text": "a", "score": 1}', b'{"prompt": "good", "text": "b", "score": 2}']


@settings(max_examples=100)
@given(
    st.lists(lines, max_size=6),
    st.sampled_from(["p.jsonl", "p.json", "p.csv", "p.parquet", "p.jsonl.gz", "p.jsonl.zst"]),
)
def test_ingest_and_import_end_in_counts_that_add_up_or_in_words(content: list[bytes], name: str) -> None:
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        (folder / name).write_bytes(b"\n".join([*content, *GOOD]))
        store = Store(folder / "store")
        for take in (
            lambda: ingest(IngestConfig(source=str(folder / name), max_quarantined=1), store).counts,
            lambda: (
                import_(
                    ImportConfig(source=str(folder / name), max_quarantined=1, ratings=[{"name": "score"}]), store
                ).counts
            ),
            lambda: preview(ImportConfig(source=str(folder / name))),
        ):
            try:
                counts = take()
            except (ConfigError, RunError) as error:
                assert str(error).strip()
            else:
                assert counts
        assert {path.name for path in folder.iterdir()} <= {name, "store"}
        assert not [path for path in store.list("") if ".." in path]


@settings(max_examples=150)
@given(st.binary(max_size=200) | values.map(lambda value: yaml.dump(value).encode()))
def test_any_file_is_a_configuration_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "c.yaml"
        path.write_bytes(content)
        for flow in FLOWS:
            with pytest.raises(ConfigError) as caught:
                parse(flow, load_values(path, [], ""), path)
            assert str(path) in str(caught.value) and len(str(caught.value)) < 8000


places = st.sampled_from(
    [
        "ingest",
        "ingest.source",
        "ingest.columns",
        "ingest.columns.keep",
        "ingest.shard_size",
        "generate",
        "generate.samples",
        "generate.generators",
        "generate.generators.0",
        "generate.generators.0.engine_args",
        "generate.generators.0.sampling",
        "generate.adaptive",
        "score.scorers.0.judge",
        "score.max_missing",
        "ensembles",
        "pair",
        "subset.0.name",
        "subset.0.steps",
        "subset.0.steps.0",
        "subset.0.controls",
        "publish",
        "store",
    ]
)


@settings(max_examples=300)
@given(places, values)
def test_a_value_anywhere_in_a_configuration_is_taken_or_refused_by_its_place(place: str, value: Any) -> None:
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "c.yaml"
        values: Any = curate_values("p.jsonl", ensembles=[], store="s", publish={}, pair=[{}])
        *parents, last = place.split(".")
        target = values
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
        target[int(last) if isinstance(target, list) else last] = value
        path.write_text(yaml.safe_dump(values))
        try:
            config = parse("curate", load_values(path, [], ""), path)
        except ConfigError as error:
            assert len(str(error)) < 8000
        else:
            json.dumps(config.model_dump(mode="json"), allow_nan=False)


@given(st.text(max_size=60))
def test_any_change_by_set_is_made_or_refused(change: str) -> None:
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "c.yaml"
        path.write_text(yaml.safe_dump(curate_values("p.jsonl")))
        try:
            parse("curate", load_values(path, [change, f"ingest.source={change}"], ""), path)
        except ConfigError as error:
            assert "\x00" not in str(error)


@settings(max_examples=150)
@given(st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()), values)
def test_any_manifest_is_whole_or_damaged(content: bytes, inner: Any) -> None:
    with tempfile.TemporaryDirectory() as room:
        store = Store(Path(room) / "store")
        try:
            whole = to_json({"version": "0" * 16, "content": inner, "sha256": "x"})
        except ValueError:
            whole = b"NaN"
        for name, raw in (("one", content), ("two", whole)):
            store.create(f"subsets/{name}/{'0' * 16}/manifest.json", raw)
            store.replace(f"subsets/{name}/latest.json", raw)
            with pytest.raises((RunError, ConfigError)):
                version = find_version(store, name)
                assert damage(store, version)
            with pytest.raises(RunError):
                list_versions(store)
        assert [path.name for path in Path(room).iterdir()] == ["store"]


@given(st.text(max_size=40) | st.lists(st.sampled_from(["a", "..", ".", "", "\\", "b"]), max_size=5).map("/".join))
def test_what_is_inside_of_a_folder_stays_there(path: str) -> None:
    if inside(path):
        assert Path("/folder", path).resolve().is_relative_to("/folder") and path
    else:
        assert (
            not path or set(path.split("/")) & {"", ".", ".."} or any(c in path for c in "\\\x00") or not path.isascii()
        )


_MARKS = ("<|", "<turn|>", "</s>", "<s>", "<start_of_turn", "<end_of_turn", "<role>", "</role>", "<seed:")
_MARKS += ("[INST", "[/INST", "[SYSTEM", "]~", "[e~")


@given(texts, texts)
def test_what_a_judge_is_shown_is_the_texts_and_no_mark_of_a_template(prompt: str, response: str) -> None:
    messages = [{"role": "user", "content": prompt}]
    data = rubric.rating_messages(JudgeConfig(), messages, response)[1]["content"]
    assert json.loads(data) == {"prompt": messages, "response": response}
    assert not [mark for mark in _MARKS if mark in data]
