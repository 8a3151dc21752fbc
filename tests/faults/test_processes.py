"""Processes that are killed while they work: an engine's, the run's own, all of a machine's."""

from __future__ import annotations

import json
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.store import Store
from tests.conftest import curate_values, files_below, generator, prompts, scorer, write_jsonl
from tests.faults.proxy import proxy
from tests.faults.runs import ENGINE, kill, processes, report, start, wait_for
from tests.services import environment, seaweedfs

PROMPTS, SHARD = 48, 8
SHARDS = PROMPTS // SHARD


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines that take a tenth of a second per request."""
    folder = tmp_path_factory.mktemp("processes")
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    (folder / "faults.json").write_text(json.dumps({"": "sleep 0.1"}))
    slow = {"engine_args": {"faults": str(folder / "faults.json")}}
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": SHARD},
        generate={"samples": 2, "generators": [generator(**slow)]},
        score={"scorers": [scorer(**slow)]},
    )
    path = folder / "curate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def mark() -> Iterator[str]:
    """What all processes of a run can be told by; none is left behind."""
    value = secrets.token_hex(8)
    yield value
    kill(processes(value))


@pytest.fixture
def env(prefect_api: str, tmp_path: Path, mark: str) -> dict[str, str]:
    return environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "prefect"), MARK=mark)


@pytest.fixture(scope="module")
def undisturbed(configuration: Path, prefect_api: str, tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    plain = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(folder / "prefect"))
    return report(start(configuration, folder / "store", plain))


def made(found: dict[str, Any], stage: str) -> int:
    (row,) = [row for row in found["stages"] if row["stage"] == stage]
    return int(row["shards_made"])


@pytest.mark.parametrize("stage", ["completions", "rewards"])
def test_an_engine_that_is_killed_in_mid_shard_costs_that_shard(
    stage: str, configuration: Path, env: dict[str, str], mark: str, undisturbed: dict[str, Any], store: Store
) -> None:
    run = start(configuration, store.url, env)
    wait_for(lambda: len(store.list(stage)) >= 2, run)
    before = {path: about for path, about in files_below(Path(store.url)).items() if path.startswith(stage)}
    time.sleep(0.3)
    engines = processes(mark, ENGINE)
    assert len(engines) >= 1
    kill(engines)
    found = report(run)
    assert found["subsets"] == undisturbed["subsets"]
    after = files_below(Path(store.url))
    assert {path: after[path] for path in before} == before
    assert store.list("faults") == []


def test_a_run_that_is_killed_goes_on_and_computes_only_what_is_missing(
    configuration: Path, env: dict[str, str], mark: str, undisturbed: dict[str, Any], store: Store
) -> None:
    run = start(configuration, store.url, env)
    wait_for(lambda: len(store.list("completions")) >= 3, run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 30
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes(mark) == []  # Ray ends what it started when nobody is there any more
    there = len(store.list("completions"))
    found = report(start(configuration, store.url, env))
    assert found["subsets"] == undisturbed["subsets"]
    assert made(found, "generate") == SHARDS - there


@pytest.mark.parametrize(
    ("what", "number"),
    [("/completions/", 3), ("/rewards/", 2), ("/pairs.parquet", 1), ("/subsets/top/", 2), ("/latest.json", 1)],
    ids=["completions", "rewards", "pairs", "between data and manifest", "latest"],
)
def test_a_machine_that_stops_in_mid_write_leaves_nothing_half_done(
    what: str,
    number: int,
    configuration: Path,
    env: dict[str, str],
    mark: str,
    undisturbed: dict[str, Any],
    tmp_path_factory: Any,
    request: Any,
) -> None:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server, proxy(server.endpoint) as between:
        env = {**env, **server.environment(), "AWS_ENDPOINT_URL": between.url}
        store = f"s3://{server.bucket}/stopped"

        def stop(method: str, path: str) -> str | None:
            wanted = [seen for kind, seen in between.seen if kind == "PUT" and what in seen]
            if method == "PUT" and what in path and len(wanted) == number:
                kill(processes(mark))
                return "reset"
            return None

        between.rule = stop
        run = start(configuration, store, env)
        _, log = run.communicate(timeout=200)
        assert run.returncode == -signal.SIGKILL, log[-2000:]
        between.rule = lambda method, path: None
        done = {path for method, path in between.seen if method == "PUT"} - {path for _, path in between.failed}
        found = report(start(configuration, store, env))
    assert found["subsets"] == undisturbed["subsets"]
    finished = {path for path in done if "/completions/" in path}
    assert made(found, "generate") == SHARDS - len({path.partition("?")[0] for path in finished})
