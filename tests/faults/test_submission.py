"""Runs on a cluster: its dashboard is away for a while, a submitter is killed, and runs are cancelled in every way.

All runs are of one configuration, on one cluster of a head that runs nothing and a node for the engines. The store of
those that are cancelled is one, too: each goes on where the one before was ended, the last one ends well.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import httpx
import pytest
import yaml

from tasks.store import Store
from tests.conftest import curate_values, generator, prompts, scorer, write_jsonl
from tests.faults.relay import relay
from tests.faults.runs import ENGINE, asked, kill, left_on, processes, report, wait_for
from tests.services import (
    PATIENCE,
    ROOT,
    RayHead,
    environment,
    prefect_worker,
    prefsieve,
    ray_head,
    ray_node,
    unlocked,
)

PROMPTS, SHARD = 160, 8
SHARDS = PROMPTS // SHARD
AWAY = 30.0  # seconds
WHERE = """
import json, os
from pathlib import Path
import tasks

seen = Path(__file__).with_name("seen")
seen.mkdir(exist_ok=True)
(seen / str(os.getpid())).write_text(json.dumps({"tasks": tasks.__file__, "node": os.environ.get("MARK")}))

def score(prompt, completion):
    return 0.0
"""


class Cluster(NamedTuple):
    head: RayHead
    marks: dict[str, str]  # what the processes of head and node can be told by

    def ask(self, path: str) -> Any:
        """The dashboard's answer."""
        headers = {"Authorization": f"Bearer {self.head.token}"}
        with urlopen(Request(f"{self.head.address}{path}", headers=headers), timeout=20) as answer:
            return json.loads(answer.read())

    def left(self) -> list[Any]:
        """What runs leave behind when they do not end as they should."""
        engines = processes(self.marks["node"], ENGINE)
        drivers = processes(self.marks["head"], f"{sys.executable} -m flows.cli")
        return [*left_on(self.head, 0), *engines, *drivers]


class Work(NamedTuple):
    folder: Path
    configuration: Path
    env: dict[str, str]

    @property
    def store(self) -> Store:
        """Of all that is cancelled."""
        return Store(self.folder / "store")

    def slow(self) -> None:
        """Every request takes three tenths of a second from now on."""
        (self.folder / "faults.json").write_text(json.dumps({"": "sleep 0.3"}))

    def fast(self) -> None:
        (self.folder / "faults.json").write_text("{}")

    def start(self, *arguments: str | Path, log: str = "") -> subprocess.Popen[str]:
        """The command line, in a folder that is no source tree."""
        stderr = (self.folder / log).open("w") if log else subprocess.PIPE
        command = [sys.executable, "-m", "flows.cli", *map(str, arguments), "--json"]
        return subprocess.Popen(
            command, env=self.env, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=stderr
        )

    def submit(self, store: Path | str, address: str, log: str = "") -> subprocess.Popen[str]:
        return self.start("submit", "curate", self.configuration, "--store", store, "--address", address, log=log)


@pytest.fixture(scope="module")
def cluster(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    marks = {"head": secrets.token_hex(8), "node": secrets.token_hex(8)}
    about = {"PREFECT_API_URL": prefect_api, "PYTHONPATH": ""}  # of a source tree they know nothing
    with (
        ray_head(folder / "head", cpus=0, MARK=marks["head"], **about) as head,
        ray_node(head, folder / "node", "127.0.0.2", cpus=4, MARK=marks["node"], **about),
    ):
        yield Cluster(head, marks)
        for mark in marks.values():
            kill(processes(mark))


@pytest.fixture(scope="module")
def work(cluster: Cluster, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))
    (folder / "where.py").write_text(WHERE)
    faults = {"engine_args": {"faults": str(folder / "faults.json"), "log": str(folder / "log")}}
    values = curate_values(
        source,
        ingest={"source": str(source), "shard_size": SHARD},
        generate={"samples": 2, "generators": [generator(**faults)]},
        score={
            "scorers": [
                scorer(**faults),
                {"name": "where", "type": "function", "function": str(folder / "where.py") + ":score"},
            ]
        },
        pair=[{"name": "pairs", "scorer": "reward"}],
    )
    configuration = folder / "curate.yaml"
    configuration.write_text(yaml.safe_dump(values))
    about = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    return Work(folder, configuration, environment(**about, **cluster.head.environment))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, work: Work) -> dict[str, Any]:
    """The report of a run that nothing happened to: of a process here that joined the cluster."""
    work.fast()
    joining = ("--set", f"ray_address={cluster.head.gcs}")
    return report(work.start("curate", work.configuration, "--store", work.folder / "undisturbed", *joining))


def test_a_run_that_joins_a_cluster_from_a_source_tree_takes_its_code_to_the_nodes(
    cluster: Cluster, work: Work, undisturbed: dict[str, Any]
) -> None:
    assert shipped(cluster, work)


def test_a_dashboard_that_is_away_for_half_a_minute_and_a_submitter_that_is_killed(
    cluster: Cluster, work: Work, undisturbed: dict[str, Any]
) -> None:
    """One follower's requests hang, the other's are refused; before that, who submitted the job is gone."""
    work.slow()
    store, address = Store(work.folder / "away"), cluster.head.address
    submitter = work.submit(store.url, address)
    wait_for(lambda: len(store.list("completions")) >= 1, submitter)
    submitter.kill()
    dashboard = [pid for pid in processes(cluster.marks["head"]) if b"dashboard.py" in command(pid)]
    assert dashboard
    with relay(int(address.rpartition(":")[2])) as between:
        logs = {"silent": address, "refusing": f"http://127.0.0.1:{between.port}"}
        followers = {log: work.submit(store.url, there, log) for log, there in logs.items()}
        for log, follower in followers.items():
            wait_for(lambda log=log: "Running entrypoint" in (work.folder / log).read_text(), follower)
        before = len(store.list("completions"))
        for pid in dashboard:
            os.kill(pid, signal.SIGSTOP)
        between.close()
        time.sleep(AWAY)
        assert [follower.poll() for follower in followers.values()] == [None, None]
        assert len(store.list("completions")) > before, "the job goes on meanwhile"
        for pid in dashboard:
            os.kill(pid, signal.SIGCONT)
        between.open()
        work.fast()
        found = []
        for log, follower in followers.items():
            out, _ = follower.communicate(timeout=120)
            assert follower.returncode == 0, (work.folder / log).read_text()[-4000:]
            found.append(json.loads(out))
    assert found[0] == found[1]
    assert found[0]["subsets"] == undisturbed["subsets"]
    told = {log: (work.folder / log).read_text().splitlines() for log in logs}
    (job,) = {line.split()[1] for lines in told.values() for line in lines if "is already running" in line}
    jobs = [row["submission_id"] for row in cluster.ask("/api/jobs/") if row["submission_id"]]
    assert [name for name in jobs if name.startswith(job)] == [job], "it was started once"
    printed = cluster.ask(f"/api/jobs/{job}/logs")["logs"].splitlines()
    for lines in told.values():
        assert [line for line in lines if not line.startswith("job ")] == [
            line for line in printed if not line.startswith('{"')
        ]
    assert shipped(cluster, work), "the code of a job travels with it"


# --- cancelling


def test_a_job_that_is_cancelled_by_command_leaves_nothing_behind(
    cluster: Cluster, work: Work, prefect_api: str
) -> None:
    work.slow()
    with going_on(work):
        run = work.submit(work.store.url, cluster.head.address)
        begun(work, run)
        which = ("curate", work.configuration, "--store", work.store.url, "--address", cluster.head.address)
        done = prefsieve("cancel", *which, "--json", env=work.env, cwd=work.folder)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["status"] == "stopped"
        _, log = run.communicate(timeout=60)
        assert run.returncode == 1
        assert f"job {told['job']} stopped" in log
        assert "the run was told to end" in log
        nothing_is_left(cluster)
        assert running(prefect_api, work.store.url) == []


def test_a_job_whose_run_is_cancelled_in_prefect_leaves_nothing_behind(
    cluster: Cluster, work: Work, prefect_api: str
) -> None:
    work.slow()
    with going_on(work):
        run = work.submit(work.store.url, cluster.head.address)
        begun(work, run)
        cancelled(prefect_api, running(prefect_api, work.store.url)[0])
        _, log = run.communicate(timeout=60)
        assert run.returncode == 1
        assert "the run was cancelled" in log
        nothing_is_left(cluster)


@pytest.fixture(scope="module")
def deployed(prefect_api: str, work: Work) -> str:
    """The id of a deployment whose runs wait in the pool `faults`."""
    entry = {"name": "faults", "entrypoint": "flows.curate.curate", "work_pool": {"name": "faults"}}
    file = work.folder / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [entry]}))
    done = prefsieve("deploy", "--file", file, env=work.env)
    assert done.returncode == 0, done.stderr
    return str(httpx.get(f"{prefect_api}/deployments/name/curate/faults", timeout=PATIENCE).json()["id"])


@pytest.fixture(scope="module")
def worker(prefect_api: str, deployed: str, work: Work) -> Iterator[str]:
    """A process worker of the pool `faults`: what its processes can be told by."""
    mark = secrets.token_hex(8)
    about = {name: value for name, value in work.env.items() if name.startswith(("RAY_", "PYTHONPATH"))}
    with prefect_worker(prefect_api, "faults", work.folder / "worker", work.folder, MARK=mark, **about):
        yield mark
    kill(processes(mark))


@pytest.mark.parametrize("ray_address", ["local", "dashboard"])
def test_a_workers_run_that_is_cancelled_leaves_nothing_behind(
    ray_address: str, cluster: Cluster, work: Work, deployed: str, worker: str, prefect_api: str
) -> None:
    work.slow()
    (itself,) = processes(worker)
    with going_on(work):
        run = started(prefect_api, deployed, work, "local" if ray_address == "local" else cluster.head.address)
        begun(work)
        cancelled(prefect_api, run)
        wait_until(lambda: processes(worker) == [itself])
        nothing_is_left(cluster)


def test_a_workers_run_that_is_killed_ends_the_job_that_it_follows(
    cluster: Cluster, work: Work, deployed: str, worker: str, prefect_api: str
) -> None:
    """As a worker kills its runs when it ends."""
    work.slow()
    (itself,) = processes(worker)
    with going_on(work):
        started(prefect_api, deployed, work, cluster.head.address)
        begun(work)
        kill([pid for pid in processes(worker) if pid != itself and b"guard.py" not in command(pid)])
        wait_until(lambda: processes(worker) == [itself])
        nothing_is_left(cluster)


def test_a_worker_that_its_service_ends_ends_the_job_that_its_run_follows(
    cluster: Cluster, work: Work, deployed: str, worker: str, prefect_api: str
) -> None:
    """As systemd does it: all processes are told to end, and those that are still there after a while are killed."""
    work.slow()
    with going_on(work):
        started(prefect_api, deployed, work, cluster.head.address)
        begun(work)
        for pid in processes(worker):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):  # Prefect's worker goes on where its runs are told as well
            wait_until(lambda: not processes(worker), seconds=15)
        kill(processes(worker))
        nothing_is_left(cluster)


def test_after_all_that_the_same_command_does_what_is_missing_and_publishes_the_same_version(
    cluster: Cluster, work: Work, undisturbed: dict[str, Any]
) -> None:
    there = len(work.store.list("completions"))
    work.fast()
    with going_on(work):
        found = report(work.submit(work.store.url, cluster.head.address))
    assert found["subsets"] == undisturbed["subsets"]
    (row,) = [row for row in found["stages"] if row["stage"] == "generate"]
    assert (row["shards_made"], row["shards_reused"]) == (SHARDS - there, there)


# --- readers and helpers


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def shipped(cluster: Cluster, work: Work) -> bool:
    """Whether what ran on the node was a copy of the code that Ray unpacked there; forgets what it saw."""
    seen = [json.loads(file.read_text()) for file in (work.folder / "seen").iterdir()]
    for file in (work.folder / "seen").iterdir():
        file.unlink()
    there = [row["tasks"] for row in seen if row["node"] == cluster.marks["node"]]
    return bool(there) and all("/runtime_resources/py_modules_files/" in path for path in there)


@contextlib.contextmanager
def going_on(work: Work) -> Iterator[None]:
    """What is in the store of runs that are cancelled is not made again: no engine is asked for it."""
    before = work.store.list("completions")
    log = work.folder / "log"
    log.write_text("")
    yield
    times = asked(work.store, "completions", log)
    assert {path: times.get(path) for path in before} == dict.fromkeys(before, 0)
    assert any(times.values())


def begun(work: Work, run: subprocess.Popen[str] | None = None) -> None:
    """Wait until a further shard is done."""
    before = len(work.store.list("completions"))

    def further() -> bool:
        return len(work.store.list("completions")) > before

    if run:
        wait_for(further, run)
    else:
        wait_until(further)


def wait_until(ready: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def nothing_is_left(cluster: Cluster) -> None:
    """No actor, placement group, engine or driver; Ray takes a moment to tell."""
    deadline = time.monotonic() + 30
    while (left := cluster.left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def started(prefect_api: str, deployment: str, work: Work, address: str) -> str:
    """A run of the configuration by button."""
    values = {**yaml.safe_load(work.configuration.read_text()), "store": work.store.url, "ray_address": address}
    place = f"{prefect_api}/deployments/{deployment}/create_flow_run"
    made = unlocked(lambda: httpx.post(place, json={"parameters": values}, timeout=PATIENCE))
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def running(prefect_api: str, store: str) -> list[str]:
    """The runs on a store that Prefect takes for running."""
    wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    runs = unlocked(lambda: httpx.post(f"{prefect_api}/flow_runs/filter", json=wanted, timeout=PATIENCE)).json()
    return [run["id"] for run in runs if run["parameters"].get("store") == store]


def cancelled(prefect_api: str, run: str) -> None:
    """What the button does, and `prefect flow-run cancel`; and that it comes to an end."""
    place, asked = f"{prefect_api}/flow_runs/{run}", {"state": {"type": "CANCELLING"}}
    unlocked(lambda: httpx.post(f"{place}/set_state", json=asked, timeout=PATIENCE)).raise_for_status()

    def state() -> str:
        return str(unlocked(lambda: httpx.get(place, timeout=PATIENCE)).json()["state"]["type"])

    deadline = time.monotonic() + PATIENCE
    while state() == "CANCELLING":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert state() == "CANCELLED"
