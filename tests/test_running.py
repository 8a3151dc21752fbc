"""How a run ends before its time: what it says of itself on a real Prefect server, and that it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services import PATIENCE, ROOT, environment, unlocked

WAIT = """
import sys, time
from prefect import flow, runtime
from flows import running

running._EVERY = running._WORKERS_TURN = 0.5

@flow(name="inner")
@running.run_on_ray
def inner(ray_address: str = "local") -> None:
    print(runtime.flow_run.id, flush=True)
    time.sleep(300)

@flow(name="outer")
@running.run_on_ray
def outer(ray_address: str = "local") -> None:
    print(runtime.flow_run.id, flush=True)
    inner()

{"inner": inner, "outer": outer}[sys.argv[1]]()
"""
HAS_WORKER = {"PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS": "false"}


@pytest.mark.parametrize(
    ("flow", "about", "cancelled", "states"),
    [
        ("inner", {}, None, ["CRASHED"]),
        ("outer", {}, None, ["CRASHED", "CRASHED"]),
        ("inner", {}, 0, ["CANCELLED"]),
        ("inner", HAS_WORKER, 0, ["CANCELLED"]),
        ("outer", {}, 0, ["CANCELLED", "CRASHED"]),
        ("outer", {}, 1, ["FAILED", "CANCELLED"]),
    ],
    ids=[
        "told to end",
        "told to end in an inner run",
        "cancelled",
        "cancelled when its worker is gone",
        "cancelled in an inner run",
        "an inner run is cancelled",
    ],
)
def test_a_run_that_is_ended_says_so(
    flow: str, about: dict[str, str], cancelled: int | None, states: list[str], prefect_api: str, tmp_path: Path
) -> None:
    """cancelled: which of the runs; None: its process gets SIGTERM."""
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path), PYTHONPATH=str(ROOT), **about)
    with subprocess.Popen([sys.executable, "-c", WAIT, flow], env=env, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        runs = [process.stdout.readline().strip() for _ in states]
        if cancelled is None:
            os.kill(process.pid, signal.SIGTERM)
        else:
            state = {"state": {"type": "CANCELLING"}}
            place = f"{prefect_api}/flow_runs/{runs[cancelled]}/set_state"
            unlocked(lambda: httpx.post(place, json=state, timeout=PATIENCE)).raise_for_status()
        assert process.wait(60) != 0
    assert [_state(prefect_api, run) for run in runs] == states


def _state(api: str, run: str) -> Any:
    return httpx.get(f"{api}/flow_runs/{run}", timeout=PATIENCE).json()["state"]["type"]
