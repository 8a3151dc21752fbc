"""The local store: files appear whole or not at all, and what exists never changes."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from tasks.errors import ConfigError, RunError
from tasks.store import Store, to_json


def test_what_is_created_is_read_back_and_is_not_created_again(store: Store) -> None:
    assert store.create("a/b/c.bin", b"first")
    assert not store.create("a/b/c.bin", b"second")
    assert store.read("a/b/c.bin") == b"first"
    assert store.exists("a/b/c.bin")
    assert not store.exists("a/b")
    assert not store.exists("a/b/d.bin")


def test_a_local_file_is_copied_once_and_fetched_back(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3_000_000))
    assert store.create_file("files/x.bin", source)
    assert not store.create_file("files/x.bin", source)
    fetched = store.fetch("files/x.bin", tmp_path / "new" / "folder" / "x.bin")
    assert fetched.read_bytes() == source.read_bytes()


def test_json_and_tables_survive_the_way_there_and_back(store: Store) -> None:
    value = {"b": [1, None, "ü\u2028"], "a": {"x": 0.1}}
    assert store.create_json("v.json", value)
    assert list(store.read_json("v.json")) == ["b", "a"]
    assert store.read_json("v.json") == value
    table = pa.table({"x": [1, 2], "y": ["a", None]})
    assert store.create_table("t.parquet", table)
    assert store.read_table("t.parquet").equals(table)
    assert store.read_table("t.parquet", ["y"]).column_names == ["y"]


def test_json_without_a_number_for_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("nan")})


def test_the_digest_of_a_file_is_that_of_its_bytes(store: Store) -> None:
    import hashlib

    data = os.urandom(20_000_000)
    store.create("big.bin", data)
    assert store.sha256("big.bin") == hashlib.sha256(data).hexdigest()


def test_remove_takes_a_file_or_what_lies_below_a_path(store: Store) -> None:
    for path in ("a/one", "a/b/two", "a/b/c/three", "ab/four"):
        store.create(path, b"1")
    store.remove("a/b")
    assert store.list("") == ["a/one", "ab/four"]
    store.remove_file("a/one")
    store.remove_file("a/one")
    assert store.list("") == ["ab/four"]
    store.remove("ab/four")
    assert store.list("") == []


def test_replace_writes_over_what_was_there(store: Store) -> None:
    store.replace("latest.json", b"1")
    store.replace("latest.json", b"2")
    assert store.read("latest.json") == b"2"
    assert store.list("") == ["latest.json"]


def test_listing_is_sorted_below_a_prefix_and_ignores_unfinished_files(store: Store) -> None:
    for path in ("b/2", "b/1", "b/c/3", "bb/4", "a/5"):
        store.create(path, b"x")
    (Path(store.url) / "b" / ".tmp-0123").write_bytes(b"half")
    assert store.list("b") == ["b/1", "b/2", "b/c/3"]
    assert store.list("absent") == []
    assert len(store.list("")) == 5


def test_exactly_one_of_many_racing_writers_wins_and_no_reader_sees_a_part(store: Store) -> None:
    size, writers = 2_000_000, 24
    barrier, done = threading.Barrier(writers + 1), threading.Event()
    wrong: list[int] = []

    def write(i: int) -> bool:
        barrier.wait()
        return store.create("races/key", bytes([i]) * size)

    def read() -> int:
        barrier.wait()
        seen = 0
        while not done.is_set() or not seen:
            if store.exists("races/key"):
                data = store.read("races/key")
                seen += 1
                if len(data) != size or len(set(data)) != 1:
                    wrong.append(len(data))
        return seen

    with ThreadPoolExecutor(writers + 1) as pool:
        reader = pool.submit(read)
        won = list(pool.map(write, range(writers)))
        done.set()
        assert reader.result() > 0
    assert sum(won) == 1
    assert not wrong
    assert set(store.read("races/key")) == {won.index(True)}
    assert store.list("races") == ["races/key"]
    assert os.listdir(Path(store.url) / "races") == ["key"]


def test_replacing_never_shows_a_reader_a_part(store: Store) -> None:
    store.replace("pointer", b"\x00" * 500_000)
    stop = threading.Event()

    def replace(i: int) -> None:
        while not stop.is_set():
            store.replace("pointer", bytes([i]) * 500_000)

    writers = [threading.Thread(target=replace, args=(i,)) for i in range(2)]
    for writer in writers:
        writer.start()
    seen = [store.read("pointer") for _ in range(80)]
    stop.set()
    for writer in writers:
        writer.join()
    assert all(len(data) == 500_000 and len(set(data)) == 1 for data in seen)


def test_a_write_that_fails_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.create_file("x/y.bin", tmp_path / "absent.bin")
    assert not store.exists("x/y.bin")
    assert os.listdir(Path(store.url) / "x") == []


def test_a_relative_or_linked_store_lists_paths_relative_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for url in ("here", "./dot/", "link", "real/../up", f"file://{tmp_path}/scheme", "with space [1]"):
        here = Store(url)
        assert here.create("a/b", b"1")
        assert here.list("a") == ["a/b"], url
        assert here.list("") == ["a/b"], url
        monkeypatch.chdir("/")
        assert here.read("a/b") == b"1", "a change of folder must not move the store"
        monkeypatch.chdir(tmp_path)


def test_a_store_in_the_home_folder_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/store").url == str(tmp_path / "store")


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://host/x", "s3://", "s3:///prefix", "S3://bucket"])
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="store") as caught:
        Store(url)
    assert repr(url.rstrip("/")) in str(caught.value) or repr(url) in str(caught.value)


def test_check_says_that_a_local_store_is_safe_to_share(store: Store) -> None:
    assert "two runs may share this store" in store.check()
    assert store.list("") == []


def test_a_store_whose_place_is_taken_by_a_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("I am a file")
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            RunError, match=r"cannot be used.*Check that the folder can be created and written"
        ) as caught:
            Store(url).check()
        assert str(url) in str(caught.value)


def test_a_store_that_cannot_be_written_is_refused_with_a_hint(tmp_path: Path) -> None:
    folder = Path("/proc/prefsieve")  # even root cannot make it
    if os.geteuid():
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    with pytest.raises(RunError, match=r"cannot be used.*Check that the folder can be created and written"):
        Store(folder).check()
