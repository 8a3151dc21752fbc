"""Processes that are killed while they work: an engine's, the run's own, all of a machine's."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.store import Store
from tests.faults.proxy import Proxy
from tests.faults.runs import ENGINE, SHARDS, ended, finished, kill, made, next_file, processes, report, start, wait_for
from tests.services import SeaweedFS, environment


@pytest.fixture
def env(prefect_api: str, tmp_path: Path, mark: str) -> dict[str, str]:
    return environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "prefect"), MARK=mark)


@pytest.mark.parametrize("stage", ["completions", "rewards"])
def test_an_engine_that_is_killed_in_mid_shard_costs_that_shard(
    stage: str,
    configuration: Path,
    env: dict[str, str],
    mark: str,
    undisturbed: dict[str, Any],
    store: Store,
    measured: dict[str, Any],
) -> None:
    run = start(configuration, store.url, env)
    wait_for(lambda: len(store.list(stage)) >= 2, run)
    before = finished(store, stage)
    time.sleep(0.3)
    engines = processes(mark, ENGINE)
    assert len(engines) >= 1
    kill(engines)
    measured["next shard after seconds"] = next_file(store, stage, run)
    found, log = ended(run)
    assert found["subsets"] == undisturbed["subsets"]
    after = finished(store, stage)
    measured["finished shards made again"] = sum(after[path] != before[path] for path in before)
    assert {path: after[path] for path in before} == before
    assert store.list("faults") == []
    assert "what it had in hand goes to a fresh one" in log and "(raylet)" not in log


def test_a_run_that_is_killed_goes_on_and_computes_only_what_is_missing(
    configuration: Path,
    env: dict[str, str],
    mark: str,
    undisturbed: dict[str, Any],
    store: Store,
    measured: dict[str, Any],
) -> None:
    run = start(configuration, store.url, env)
    wait_for(lambda: len(store.list("completions")) >= 3, run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    # Ray ends what it started when nobody is there any more; its agents first try for a minute to tell who is gone.
    deadline = time.monotonic() + 120
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [Path(f"/proc/{pid}/cmdline").read_text()[:200] for pid in processes(mark)] == []
    there = len(store.list("completions"))
    again = start(configuration, store.url, env)
    measured["next shard after seconds"] = next_file(store, "completions", again)
    found = report(again)
    assert found["subsets"] == undisturbed["subsets"]
    assert made(found, "generate") == SHARDS - there
    measured["finished shards made again"] = made(found, "generate") + there - SHARDS


STOPS = [  # in which write, and in the how manieth of a run
    ("/completions/", 3),
    ("/rewards/", 2),
    ("/pairs.parquet", 1),
    ("/subsets/top/", 2),  # between data and manifest
    ("/latest.json", 1),
]


def test_a_machine_that_stops_in_mid_write_again_and_again_leaves_nothing_half_done_and_makes_nothing_twice(
    configuration: Path,
    env: dict[str, str],
    mark: str,
    undisturbed: dict[str, Any],
    s3: SeaweedFS,
    between: Proxy,
) -> None:
    env = {**env, **s3.environment(), "AWS_ENDPOINT_URL": between.url}
    store = f"s3://{s3.bucket}/stopped"
    for what, number in STOPS:
        writes = 0

        def stop(method: str, path: str, what: str = what, number: int = number) -> str | None:
            nonlocal writes
            writes += method == "PUT" and what in path
            if writes < number or what not in path:
                return None
            kill(processes(mark))
            return "reset"

        between.rule = stop
        run = start(configuration, store, env)
        _, log = run.communicate(timeout=200)
        assert run.returncode == -signal.SIGKILL, (what, log[-2000:])
    between.rule = lambda method, path: None
    found = report(start(configuration, store, env))
    assert found["subsets"] == undisturbed["subsets"]
    done = Counter(path for method, path in between.seen if method == "PUT")
    done -= Counter(path for method, path in between.failed if method == "PUT")
    made = [times for path, times in done.items() if "/completions/" in path or "/rewards/" in path]
    assert made == [1] * 2 * SHARDS
