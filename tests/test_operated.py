"""A night without anybody: a schedule fires, what it publishes is trained on, and a run that fails is told.

On a real Prefect server with SQLite, and with PostgreSQL where Debian's package is installed.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import TinyModels, curate_values, prompts, write_jsonl
from tests.services import (
    PATIENCE,
    ROOT,
    environment,
    postgresql,
    postgresql_programs,
    prefect_server,
    prefect_worker,
    prefsieve,
    unlocked,
)

SHIPPED = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
TRAIN = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 256}
LONGEST = 300.0  # seconds for a run to begin and end; it takes about 40 on two idle cores
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[httpx.Client]:
    if request.param == "postgresql" and not postgresql_programs():
        pytest.skip("PostgreSQL is not installed; apt-get install postgresql")
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgresql()) if request.param == "postgresql" else ""
        url = stack.enter_context(prefect_server(tmp_path / "server", database))
        yield stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE))


def test_a_schedule_fires_what_it_published_is_trained_on_and_a_failure_is_told(
    api: httpx.Client, tiny_models: TinyModels, tmp_path: Path
) -> None:
    url, store = str(api.base_url).rstrip("/"), tmp_path / "store"
    env = environment(PREFECT_API_URL=url, PREFECT_HOME=str(tmp_path / "home"))
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump(deployments(tmp_path, store, tiny_models)))

    first = prefsieve("deploy", "--file", file, env=env)
    assert first.returncode == 0, first.stderr
    assert "left out, for there is no block 'prefsieve-alerts'" in first.stdout
    with listener() as (address, heard):
        save_block(api, address)
        again = prefsieve("deploy", "--file", file, env=env)
        assert again.returncode == 0, again.stderr
        assert "automation  prefsieve-run-failed (created)" in again.stdout
        assert "on prefsieve.subset.published" in again.stdout
        with prefect_worker(url, "prefsieve", tmp_path / "worker"):
            night = wait_for(lambda: next(iter(runs(api, "curate")), None))
            stop_schedule(api)
            night = ended(api, night["id"])
            assert night["auto_scheduled"] and night["state"]["type"] == "COMPLETED", night["state"]
            [version] = json.loads(prefsieve("subsets", "--store", store, "--json", env=env).stdout)["subsets"]

            training = ended(api, wait_for(lambda: next(iter(runs(api, "train")), None))["id"])
            assert training["state"]["type"] == "COMPLETED", training["state"]
            assert training["parameters"]["subset"] == f"nightly@{version['version']}"
            assert training["parameters"]["store"] == str(store), "the worker's own is another"
            assert training["parameters"]["name"] == "tiny"

            once_more = ended(api, start(api, "curate", {})["id"])
            assert once_more["state"]["type"] == "COMPLETED", once_more["state"]

            failed = ended(api, start(api, "curate", {"ingest": {"source": str(tmp_path / "gone.jsonl")}})["id"])
            assert failed["state"]["type"] == "FAILED"
            told = heard.get(timeout=60)
    assert told["subject"] == f"curate failed: {failed['name']}"
    assert "gone.jsonl" in told["body"] and failed["id"] in told["body"]
    assert heard.empty(), "who completed is not told of"
    assert len(runs(api, "train")) == 1, "what was published before is not trained on again"


def test_deployments_are_registered_for_kubernetes_by_naming_that_pool(prefect_api: str, tmp_path: Path) -> None:
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path))
    done = prefsieve("deploy", "--pool", "prefsieve-kubernetes", env=env)
    assert done.returncode == 0, done.stderr
    pool = httpx.get(f"{prefect_api}/work_pools/prefsieve-kubernetes", timeout=PATIENCE).json()
    template = json.loads((ROOT / "infra" / "prefect" / "base-job-template.json").read_text())
    assert (pool["type"], pool["base_job_template"]) == ("kubernetes", template)
    for flow in ("curate", "train", "evaluate", "experiment"):
        deployed = httpx.get(f"{prefect_api}/deployments/name/{flow}/{flow}", timeout=PATIENCE).json()
        assert deployed["work_pool_name"] == "prefsieve-kubernetes"
        assert deployed["job_variables"] == {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}}


def test_a_wrong_automation_is_refused_before_anything_is_registered(prefect_api: str, tmp_path: Path) -> None:
    automation = SHIPPED["automations"][-1]
    entry = {"name": "untouched", "entrypoint": "flows.curate.curate", "work_pool": {"name": "untouched"}}
    wrong = {**automation, "trigger": {**automation["trigger"], "posture": "Sideways"}}
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [entry], "automations": [wrong]}))
    done = prefsieve("deploy", "--file", file, env=environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path)))
    assert done.returncode == 2
    assert "'prefsieve-run-failed': trigger.event.posture" in done.stderr
    assert httpx.get(f"{prefect_api}/work_pools/untouched", timeout=PATIENCE).status_code == 404


# --- what is deployed, and who listens


def deployments(folder: Path, store: Path, models: TinyModels) -> dict[str, Any]:
    """The shipped file's, with small parameters and a schedule that does not wait for the night."""
    source = write_jsonl(folder / "prompts.jsonl", prompts(12))
    subset = [{"name": "nightly", "steps": [{"rank": "pvar", "fraction": 0.5}]}]
    values = curate_values(source, subset=subset, ingest={"source": str(source)})
    training = {"name": "tiny", "subset": "nightly", "policy": {"model": str(models.generator), "cpus": 1}}
    parameters = {"curate": {**values, "store": str(store)}, "train": {**training, "train": TRAIN}}
    soon = {"slug": "nightly", "interval": 20}
    entries = [entry for entry in SHIPPED["deployments"] if entry["name"] in parameters]
    for entry in entries:
        entry |= {"parameters": parameters[entry["name"]]}
        entry |= {"schedules": [soon]} if entry["schedules"] else {}
    return {"deployments": entries, "automations": SHIPPED["automations"]}


@contextlib.contextmanager
def listener() -> Iterator[tuple[str, queue.SimpleQueue[Any]]]:
    """An HTTP server on loopback; what is posted to it."""
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Listening(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *about: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listening) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", heard
        server.shutdown()


def save_block(api: httpx.Client, address: str) -> None:
    """As the UI does, of the type Custom Webhook."""
    kind = api.get("/block_types/slug/custom-webhook").raise_for_status().json()
    found = api.post("/block_schemas/filter", json={"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}).json()
    data = {
        "name": "alerts",
        "url": address,
        "method": "POST",
        "json_data": {"subject": "{{subject}}", "body": "{{body}}"},
    }
    block = {
        "name": "prefsieve-alerts",
        "data": data,
        "block_schema_id": found[0]["id"],
        "block_type_id": kind["id"],
    }
    api.post("/block_documents/", json=block).raise_for_status()


# --- runs


def runs(api: httpx.Client, flow: str) -> list[dict[str, Any]]:
    """Those of a deployment that have begun."""
    wanted = {
        "deployments": {"name": {"any_": [flow]}},
        "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED", "PENDING"]}}},
    }
    return list(unlocked(lambda: api.post("/flow_runs/filter", json=wanted)).raise_for_status().json())


def start(api: httpx.Client, flow: str, parameters: dict[str, Any]) -> dict[str, Any]:
    deployment = api.get(f"/deployments/name/{flow}/{flow}").raise_for_status().json()
    whole = {**deployment["parameters"], **parameters}
    place = f"/deployments/{deployment['id']}/create_flow_run"
    return dict(unlocked(lambda: api.post(place, json={"parameters": whole})).raise_for_status().json())


def stop_schedule(api: httpx.Client) -> None:
    deployment = api.get("/deployments/name/curate/curate").json()
    [schedule] = deployment["schedules"]
    place, about = f"/deployments/{deployment['id']}/schedules/{schedule['id']}", {"active": False}
    unlocked(lambda: api.patch(place, json=about)).raise_for_status()


def ended(api: httpx.Client, run: str) -> dict[str, Any]:
    def final() -> dict[str, Any] | None:
        found = unlocked(lambda: api.get(f"/flow_runs/{run}")).raise_for_status().json()
        return found if found["state"]["type"] in FINAL else None

    return wait_for(final)


def wait_for(found: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    deadline = time.monotonic() + LONGEST
    while (result := found()) is None:
        assert time.monotonic() < deadline, "in vain"
        time.sleep(1)
    return result
