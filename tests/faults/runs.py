"""Runs of the command line in processes of their own, and ways to end them and what they started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.store import Store
from tests.services import ROOT, RayHead

ENGINE = "ray::MapWorker"  # how the process of an engine calls itself

PROMPTS, SHARD = 48, 8  # of the configuration that tests share
SHARDS = PROMPTS // SHARD


def start(
    configuration: Path, store: str | Path, env: dict[str, str], *more: str, flow: str = "curate", cwd: Path = ROOT
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.cli", flow, str(configuration), "--store", str(store), "--json", *more]
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def report(run: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run printed when it had ended well."""
    return ended(run)[0]


def ended(run: subprocess.Popen[str], timeout: float = 300) -> tuple[dict[str, Any], str]:
    """The same, with the log."""
    out, log = run.communicate(timeout=timeout)
    assert run.returncode == 0, log[-4000:]
    return json.loads(out), log


def wait_for(ready: Callable[[], bool], run: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def asked(store: Store, stage: str, log: Path) -> dict[str, int]:
    """Each file of completions or of rewards, and how often engines were asked for what is in it.

    log: of the fake engines, one per stage (tasks/engines/fake.py). That a file stays as it is would say nothing: the
    store keeps the first that was written.
    """
    engine = {"completions": "policy", "rewards": "reward"}[stage]
    requests = Counter(log.read_text().splitlines() if log.exists() else [])
    times: Counter[str] = Counter()  # of a prompt: of that of its requests that was asked most often
    for line, number in requests.items():
        name, prompt, _ = json.loads(line)
        if name == engine:
            times[prompt] = max(times[prompt], number)
    prompts = {
        row["prompt_id"]: times[row["messages"][-1]["content"]]
        for shard in store.list("prompts/shards")
        for row in store.read_table(shard, ["prompt_id", "messages"]).to_pylist()
    }
    ids = {path: store.read_table(path, ["prompt_id"])["prompt_id"].to_pylist() for path in store.list(stage)}
    return {path: max(prompts[one] for one in of) for path, of in ids.items()}


def left_on(head: RayHead, seconds: float = 30) -> list[Any]:
    """Actors and placement groups of a cluster that are not gone; Ray takes a moment to tell."""
    deadline = time.monotonic() + seconds
    while (found := [*_there(head, "actors"), *_there(head, "placement_groups")]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _there(head: RayHead, what: str) -> list[Any]:
    url = f"{head.address}/api/v0/{what}?limit=1000&detail=1"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    return [one for one in found if one["state"] not in ("DEAD", "REMOVED") and not _of_the_cluster(one)]


def _of_the_cluster(actor: dict[str, Any]) -> bool:
    """Ray Data keeps three detached actors per cluster, however many runs there are; a job's supervisor is another."""
    return bool(actor.get("is_detached")) and not actor["name"].startswith("_ray_internal_job_actor")


def next_file(store: Store, stage: str, run: subprocess.Popen[str]) -> float:
    """Seconds until one more file of a stage is there, or the run has ended; waits for it."""
    began, before = time.monotonic(), len(store.list(stage))
    while len(store.list(stage)) <= before and run.poll() is None:
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def processes(mark: str, name: str = "") -> list[int]:
    """Those that inherited an environment variable with this value, and whose command begins with a name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has just ended, or is another user's
                continue
            if f"={mark}\0".encode() in environment and command.startswith(name):
                found.append(int(entry.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def made(found: dict[str, Any], stage: str) -> int:
    (row,) = [row for row in found["stages"] if row["stage"] == stage]
    return int(row["shards_made"])
