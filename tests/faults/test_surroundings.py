"""What a run depends on beside its store: a disk that is full, a clock that goes backwards, Prefect's server gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.store import Store
from tests.faults.runs import ENGINE, SHARDS, made, report, start, wait_for
from tests.services import ROOT, environment, prefect_server


@pytest.fixture
def env(prefect_api: str, tmp_path: Path) -> dict[str, str]:
    return environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "prefect"))


def test_a_full_disk_ends_the_run_in_words_and_with_room_a_rerun_goes_on(
    configuration: Path, env: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path, measured: dict[str, Any]
) -> None:
    """The store is a disk of its own, of a namespace of its own: it is gone with the last process."""
    store = tmp_path / "store"
    store.mkdir()
    curate = f"{sys.executable} -m flows.cli curate {configuration} --store {store} --json"
    script = f"""
        mount -t tmpfs -o size=96k tmpfs {store} || exit 99
        {curate}; echo "status $?" >&2
        find {store} -path '*completions*.parquet' | wc -l
        mount -o remount,size=64m {store}
        {curate}
    """
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, _, _ = done.stderr.partition("status ")
    assert "status 1" in done.stderr
    assert "No space left on device" in first.splitlines()[-1]
    assert "Traceback" not in first
    there, again = done.stdout.splitlines()
    found = json.loads(again)
    assert found["subsets"] == undisturbed["subsets"]
    assert 0 < int(there) == SHARDS - made(found, "generate")
    measured["finished shards made again"] = int(there) + made(found, "generate") - SHARDS


CLOCK = """
import os, time
from pathlib import Path

_real, _real_ns, _shift = time.time, time.time_ns, Path(os.environ["CLOCK_SHIFT"])
_told = set()

def by():
    seconds = float(_shift.read_text())
    if seconds and os.getpid() not in _told:
        _told.add(os.getpid())
        _shift.with_name(f"told-{os.getpid()}").write_bytes(Path("/proc/self/cmdline").read_bytes())
    return seconds

def shifted():
    return _real() + by()

def shifted_ns():
    return _real_ns() + int(1e9 * by())

time.time, time.time_ns = shifted, shifted_ns
"""


def test_a_clock_that_goes_backwards_changes_nothing_and_no_time_is_negative(
    configuration: Path, env: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path, store: Store
) -> None:
    """By a day, in mid-work, for all Python of a run: its own process, Prefect's and Ray's parts of it, and engines.

    Of what `time` tells alone: no `datetime`, whose class nothing can stand in for, and by which manifests are dated.
    """
    shift = tmp_path / "shift"
    shift.write_text("0")
    (tmp_path / "sitecustomize.py").write_text(CLOCK)  # run by every Python that starts with this path
    run = start(configuration, store.url, {**env, "PYTHONPATH": str(tmp_path), "CLOCK_SHIFT": str(shift)})
    wait_for(lambda: len(store.list("completions")) >= 3, run)
    whole = tmp_path / "whole"
    whole.write_text("-86400")
    whole.replace(shift)
    found = report(run)
    told = [file.read_bytes() for file in tmp_path.glob("told-*")]
    assert any(b"flows.cli" in command for command in told) and any(
        command.startswith(ENGINE.encode()) for command in told
    )
    assert found["subsets"] == undisturbed["subsets"]
    assert all(stage["seconds"] >= 0 for stage in found["stages"])


def test_a_run_whose_prefect_server_is_gone_makes_everything_all_the_same(
    configuration: Path, env: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path, store: Store
) -> None:
    """It cannot be told how the run ended: that is what the run then says, and a rerun has nothing to make."""
    with prefect_server(tmp_path / "server") as url:
        impatient = {"PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "1"}  # of a minute each, otherwise
        run = start(configuration, store.url, {**env, **impatient})
        wait_for(lambda: len(store.list("completions")) >= 3, run)
    _, log = run.communicate(timeout=400)
    assert run.returncode == 1
    assert f"prefsieve: ConnectError at {url}" in log
    found = report(start(configuration, store.url, env))
    assert found["subsets"] == undisturbed["subsets"]
    assert [made(found, stage) for stage in ("generate", "score", "publish top")] == [0, 0, 0]
