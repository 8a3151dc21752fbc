"""A store over real S3 that refuses, resets, stalls, is gone, or is written by two runs at once."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.store import Store
from tests.conftest import curate_values, generator, prompts, scorer, write_jsonl
from tests.faults.proxy import Proxy
from tests.faults.runs import asked, report, start, wait_for
from tests.services import SeaweedFS, environment

PROMPTS, SHARD = 32, 8
SHARDS = PROMPTS // SHARD
MADE = ("completions", "rewards")


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    noted = {"engine_args": {"faults": str(folder / "faults.json"), "log": str(folder / "log")}}
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": SHARD},
        generate={"samples": 4, "generators": [generator(**noted)]},
        score={"scorers": [scorer(**noted)]},
    )
    path = folder / "curate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def env(s3: SeaweedFS, between: Proxy, prefect_api: str, tmp_path: Path) -> dict[str, str]:
    """The store's server is the proxy."""
    return environment(
        **{**s3.environment(), "AWS_ENDPOINT_URL": between.url},
        PREFECT_API_URL=prefect_api,
        PREFECT_HOME=str(tmp_path / "prefect"),
    )


@pytest.fixture(scope="module")
def undisturbed(configuration: Path, s3: SeaweedFS, prefect_api: str, tmp_path_factory: Any) -> dict[str, Any]:
    home = str(tmp_path_factory.mktemp("prefect"))
    direct = environment(**s3.environment(), PREFECT_API_URL=prefect_api, PREFECT_HOME=home)
    return report(start(configuration, f"s3://{s3.bucket}/undisturbed", direct))


def now_and_then(**faults: Any) -> Callable[[str, str], Any]:
    """Each fault for about one request in so many; which ones is drawn."""
    rng = random.Random(0)

    def rule(method: str, path: str) -> Any:
        drawn = (name for name, number in faults.items() if rng.random() < 1 / number)
        return next((FAULTS[name] for name in drawn if name != "conflict" or method == "PUT"), None)

    return rule


FAULTS = {"conflict": 409, "error": 500, "slow_down": 503, "reset": "reset", "lost": "lost", "slow": 0.5}


@pytest.mark.parametrize(
    "rule",
    [now_and_then(error=12, slow_down=12, conflict=12), now_and_then(reset=10, lost=10, slow=5)],
    ids=["500, 503 SlowDown, 409 of two at once", "reset, answer lost, slow"],
)
def test_a_server_that_fails_now_and_then_changes_nothing(
    rule: Any,
    configuration: Path,
    between: Proxy,
    buckets: str,
    env: dict[str, str],
    undisturbed: Any,
    log: Path,
    request: Any,
) -> None:
    """No engine is asked for anything twice."""
    between.rule = rule
    store = Store(f"{buckets}/{request.node.callspec.id[:3]}")
    found = report(start(configuration, store.url, env))
    assert len(between.failed) > 5
    assert found["subsets"] == undisturbed["subsets"]
    assert [stage["dropped"] for stage in found["stages"]] == [stage["dropped"] for stage in undisturbed["stages"]]
    assert [sorted(asked(store, stage, log).values()) for stage in MADE] == [[1] * SHARDS] * 2
    assert [written.count(200) for written in between.puts(*MADE).values()] == [1] * 2 * SHARDS


def test_a_server_that_ignores_conditions_is_said_when_a_run_starts(
    configuration: Path, between: Proxy, s3: SeaweedFS, env: dict[str, str], undisturbed: Any
) -> None:
    between.rule = lambda method, path: "deaf"
    run = start(configuration, f"s3://{s3.bucket}/deaf", env)
    out, log = run.communicate(timeout=300)
    assert json.loads(out)["subsets"] == undisturbed["subsets"]
    (said,) = [line for line in log.splitlines() if "ignores If-None-Match: let one run at a time write" in line]
    assert "WARNING" in said and "INFO    | Task run 'ingest'" not in log[: log.index(said)]


def test_a_server_that_is_gone_for_a_minute_is_waited_for_or_a_rerun_goes_on(
    configuration: Path, between: Proxy, s3: SeaweedFS, env: dict[str, str], undisturbed: Any, measured: dict[str, Any]
) -> None:
    store = f"s3://{s3.bucket}/gone"
    run = start(configuration, store, env)
    wait_for(lambda: any(method == "PUT" and "/completions/" in path for method, path in between.seen), run)
    s3.stop(force=True)
    time.sleep(60)
    s3.start()
    back = time.monotonic()
    out, said = run.communicate(timeout=300)
    if run.returncode:
        assert "Traceback" not in said and said.splitlines()[-1].startswith("prefsieve: ")
    measured["went on by itself"] = run.returncode == 0
    found = json.loads(out) if run.returncode == 0 else report(start(configuration, store, env))
    measured["published after seconds"] = round(time.monotonic() - back, 1)
    assert found["subsets"] == undisturbed["subsets"]
    assert max(written.count(200) for written in between.puts(*MADE).values()) == 1


def test_two_runs_on_one_store_at_once_publish_the_same(
    configuration: Path, between: Proxy, s3: SeaweedFS, env: dict[str, str], undisturbed: Any, log: Path
) -> None:
    """Engines take their time until both runs have asked for the same: both then write it, and one is too late."""
    store, faults = f"s3://{s3.bucket}/both", configuration.with_name("faults.json")
    faults.write_text(json.dumps({"": "sleep 1"}))
    runs = [start(configuration, store, env), start(configuration, store, env)]
    wait_for(lambda: 2 in Counter(log.read_text().splitlines()).values(), runs[0])
    faults.unlink()
    assert [report(run)["subsets"] for run in runs] == [undisturbed["subsets"]] * 2
    written = between.puts(*MADE)
    assert [statuses.count(200) for statuses in written.values()] == [1] * 2 * SHARDS
    assert any(sorted(statuses) == [200, 412] for statuses in written.values())
