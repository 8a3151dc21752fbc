"""Processes that are killed while they work: an engine's, the run's own, all of a machine's."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.cluster import IN_FLIGHT
from tasks.store import Store
from tests.faults.proxy import Proxy
from tests.faults.runs import ENGINE, SHARDS, asked, ended, kill, made, next_file, processes, report, start, wait_for
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
    log: Path,
    s3: SeaweedFS,
    buckets: str,
    between: Proxy,
    measured: dict[str, Any],
) -> None:
    """It is killed when it has written a third file and does not know yet: that one is in hand, and finished."""
    store = Store(f"{buckets}/killed-{stage}")
    written: list[str] = []
    before: list[str] = []
    engines: list[int] = []

    def rule(method: str, path: str) -> str | None:
        if method != "PUT" or f"/{stage}/" not in path or engines:
            return None
        if path not in written:
            written.append(path)
            return "lost" if len(written) == 3 else None
        before.extend(store.list(stage))
        engines.extend(processes(mark, ENGINE))
        kill(engines)
        return "reset"

    between.rule = rule
    run = start(configuration, store.url, {**env, **s3.environment(), "AWS_ENDPOINT_URL": between.url})
    wait_for(lambda: bool(engines), run)
    measured["next shard after seconds"] = next_file(store, stage, run)
    found, said = ended(run)
    assert len(before) >= 3
    assert found["subsets"] == undisturbed["subsets"]
    times = asked(store, stage, log)
    measured["shards made again"] = sum(number > 1 for number in times.values())
    measured["finished shards made again"] = sum(times[path] > 1 for path in before)
    assert len(times) == SHARDS and [times[path] for path in before] == [1] * len(before)
    assert max(times.values()) <= 2 and 1 <= measured["shards made again"] <= IN_FLIGHT * len(engines)
    assert store.list("faults") == []
    assert "what it had in hand goes to a fresh one" in said and "(raylet)" not in said


def test_a_run_that_is_killed_goes_on_and_computes_only_what_is_missing(
    configuration: Path,
    env: dict[str, str],
    mark: str,
    undisturbed: dict[str, Any],
    log: Path,
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
    there = store.list("completions")
    log.write_text("")
    again = start(configuration, store.url, env)
    measured["next shard after seconds"] = next_file(store, "completions", again)
    found = report(again)
    assert found["subsets"] == undisturbed["subsets"]
    assert made(found, "generate") == SHARDS - len(there)
    times = asked(store, "completions", log)
    measured["finished shards made again"] = sum(times[path] for path in there)
    assert times == {path: int(path not in there) for path in times} and len(times) == SHARDS


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
    log: Path,
    s3: SeaweedFS,
    buckets: str,
    between: Proxy,
) -> None:
    env = {**env, **s3.environment(), "AWS_ENDPOINT_URL": between.url}
    store = Store(f"{buckets}/stopped")
    there: list[str] = []

    def none_again() -> None:
        times = asked(store, "completions", log) | asked(store, "rewards", log)
        assert {path: times[path] for path in there} == dict.fromkeys(there, 0)
        there[:] = times
        log.write_text("")

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
        run = start(configuration, store.url, env)
        _, said = run.communicate(timeout=200)
        assert run.returncode == -signal.SIGKILL, (what, said[-2000:])
        none_again()
    between.rule = lambda method, path: None
    found = report(start(configuration, store.url, env))
    none_again()
    assert found["subsets"] == undisturbed["subsets"]
    done = Counter(path for method, path in between.seen if method == "PUT")
    done -= Counter(path for method, path in between.failed if method == "PUT")
    made = [times for path, times in done.items() if "/completions/" in path or "/rewards/" in path]
    assert made == [1] * 2 * SHARDS
