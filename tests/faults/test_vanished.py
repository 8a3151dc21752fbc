"""A run whose machine is gone, with the worker that started it: who is left to tell, and whose turn it is then.

Prefect's worker tells what became of its runs. Where both are killed nobody does, and the run would be shown as running
until somebody looked. Runs of the shipped deployments send a sign of life; an automation notices when it stops.
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from tasks.store import Store
from tests.conftest import curate_values, generator, prompts, write_jsonl
from tests.faults.runs import kill, processes
from tests.services import PATIENCE, ROOT, environment, prefect_worker, prefsieve, unlocked

SHIPPED = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
SHARD, SHARDS = 4, 4
SILENCE = 180.0  # seconds: 90 without a sign of life, and what it takes the server to look


def test_a_run_whose_machine_is_gone_is_shown_as_crashed_and_the_next_goes_on(
    prefect_api: str, tmp_path: Path, measured: dict[str, Any]
) -> None:
    store, faults = Store(tmp_path / "store"), tmp_path / "faults.json"
    deployed(prefect_api, tmp_path, store, faults)
    faults.write_text(json.dumps({"": "sleep 0.5"}))
    with httpx.Client(base_url=prefect_api, timeout=PATIENCE) as api:
        mark = secrets.token_hex(8)
        with prefect_worker(prefect_api, "vanished", tmp_path / "worker", MARK=mark):
            first = started(api)
            wait_until(lambda: len(store.list("completions")) > 0)
            kill(processes(mark))
        assert state(api, first) == "RUNNING", "nobody is left to tell"
        gone = time.monotonic()
        there = len(store.list("completions"))
        assert there < SHARDS
        wait_until(lambda: state(api, first) != "RUNNING", SILENCE)
        assert state(api, first) == "CRASHED"
        measured["seconds until it is told"] = round(time.monotonic() - gone)
        faults.write_text("{}")
        with prefect_worker(prefect_api, "vanished", tmp_path / "worker"):
            second = started(api)
            wait_until(lambda: state(api, second) not in ("SCHEDULED", "PENDING", "RUNNING"), SILENCE)
        assert state(api, second) == "COMPLETED"
        assert len(store.list("completions")) == SHARDS


def deployed(api: str, folder: Path, store: Store, faults: Path) -> None:
    """The shipped deployment of curate and the shipped automations, with slow engines and a pool of its own."""
    source = write_jsonl(folder / "prompts.jsonl", prompts(SHARD * SHARDS))
    [curate] = [entry for entry in SHIPPED["deployments"] if entry["name"] == "curate"]
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": SHARD},
        generate={"samples": 2, "generators": [generator("one", engine_args={"faults": str(faults)})]},
        store=store.url,
    )
    pool = {**curate["work_pool"], "name": "vanished"}
    entry = {**curate, "name": "vanished", "schedules": [], "work_pool": pool, "parameters": values}
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [entry], "automations": SHIPPED["automations"]}))
    done = prefsieve("deploy", "--file", file, env=environment(PREFECT_API_URL=api, PREFECT_HOME=str(folder / "home")))
    assert done.returncode == 0, done.stderr


def started(api: httpx.Client) -> str:
    deployment = unlocked(lambda: api.get("/deployments/name/curate/vanished")).json()["id"]
    made = unlocked(lambda: api.post(f"/deployments/{deployment}/create_flow_run", json={}))
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def state(api: httpx.Client, run: str) -> str:
    return str(unlocked(lambda: api.get(f"/flow_runs/{run}")).json()["state"]["type"])


def wait_until(ready: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)
