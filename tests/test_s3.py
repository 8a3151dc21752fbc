"""A real S3 server over HTTP, with signatures checked: the store's promises, and the whole way by command line."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from examples.tinyworld.build import build
from flows.demo import WORLD
from tasks.store import Store
from tests.services import ROOT, SeaweedFS, environment, prefsieve, seaweedfs


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def store(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Store]:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield Store(f"s3://{s3.bucket}/{request.node.name}")
    fsspec.filesystem("s3").clear_instance_cache()


def test_the_server_is_found_to_honour_conditional_writes(store: Store) -> None:
    assert "conditional" in store.check()
    assert store.list("") == []


def test_one_of_many_writers_wins_and_the_others_see_its_bytes(store: Store) -> None:
    won: list[int] = []
    barrier = threading.Barrier(12)

    def write(number: int) -> None:
        barrier.wait()
        if store.create("race/file", f"writer {number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("race/file") == f"writer {won[0]}".encode()


def test_large_files_go_up_in_parts_and_only_once(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(bytes(range(256)) * 4096 * 120)  # 120 MiB: more than two parts
    assert store.create_file("large", source)
    assert not store.create_file("large", source)
    assert store.fetch("large", tmp_path / "back").read_bytes() == source.read_bytes()


def test_listings_are_never_stale(store: Store) -> None:
    other = Store(store.url)
    assert store.list("a") == [] and not store.exists("a/1")
    other.create("a/1", b"x")
    assert store.list("a") == ["a/1"] and store.exists("a/1")


def test_a_listing_has_all_that_lies_below_its_folder_and_nothing_beside(store: Store) -> None:
    names = [f"a/{number:04}" for number in range(1005)]  # more than a server lists at once
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda name: store.create(name, b"x"), [*names, "ab/1", "b"]))
    assert store.list("a") == names
    assert store.list("b") == [] and store.exists("b") and not store.exists("a")
    assert store.list("") == [*names, "ab/1", "b"]
    store.remove_file("a/0000")
    store.remove_file("a/0000")
    assert store.list("a") == names[1:]
    store.remove("a")
    store.remove("a")  # another was first
    assert store.list("") == ["ab/1", "b"]


def test_a_wrong_key_is_said_clearly(s3: SeaweedFS) -> None:
    wrong = {**s3.environment(), "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = prefsieve("doctor", "--store", f"s3://{s3.bucket}/x", env=environment(**wrong))
    assert done.returncode == 1
    assert "AWS_SECRET_ACCESS_KEY" in done.stdout
    assert "Traceback" not in done.stderr


def test_curate_train_and_verify_on_s3(s3: SeaweedFS, prefect_api: str, tmp_path: Path) -> None:
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "prefect"), **s3.environment())
    world = build(ROOT / WORLD)
    url = f"s3://{s3.bucket}/whole"
    model = {"model": str(world / "policy"), "batch_size": 512, "sampling": {"temperature": 1.0, "max_tokens": 16}}
    columns = {"prompt": "prompt", "source": "source", "keep": ["answer", "difficulty"]}
    verifier = {"name": "verifier", "type": "function", "function": "examples/tinyworld/verifier.py:score"}
    curate = {
        "ingest": {"source": str(world / "prompts.jsonl"), "columns": columns, "limit": 192, "shard_size": 64},
        "generate": {"samples": 4, "generators": [{"name": "policy", **model}]},
        "score": {"scorers": [verifier]},
        "subset": [{"name": "top", "steps": [{"rank": "pvar", "fraction": 0.5}], "controls": ["bottom"]}],
    }
    train = {"name": "tuned", "subset": "top", "policy": {"model": model["model"]}, "train": {"max_steps": 6}}
    curated = run("curate", curate, url, env, tmp_path)
    assert [subset["name"] for subset in curated["subsets"]] == ["top", "top-bottom"]
    trained = run("train", train, url, env, tmp_path)
    assert trained["steps"] == 6 and abs(trained["first"]["loss"] - 0.6931) < 1e-3
    assert prefsieve("verify", "top", "--store", url, env=env).returncode == 0
    again = run("curate", curate, url, env, tmp_path)
    assert again["subsets"] == curated["subsets"]
    assert sum(stage["engine_starts"] + stage["requests"] for stage in again["stages"]) == 0


def run(flow: str, values: dict[str, Any], store: str, env: dict[str, str], folder: Path) -> dict[str, Any]:
    config = folder / f"{flow}.yaml"
    config.write_text(yaml.safe_dump(values))
    done = prefsieve(flow, config, "--store", store, "--json", env=env, timeout=500)
    print(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
