"""Progress: rates that leave the start of engines out, times that a person can read, and where they are shown."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tasks.progress import Meter, Progress, duration, silent
from tests.conftest import curate_values, generator, prompts, write_jsonl
from tests.services import ROOT, environment, prefsieve


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("tasks.progress.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_change_is_reported_with_the_stage_and_the_unit(clock: Clock) -> None:
    seen: list[Progress] = []
    meter = Meter(seen.append, "generate", 10, "prompts", reused=4)
    clock.now += 2
    meter.add(3, "1,000 tokens/s")
    clock.now += 2
    meter.add(3)
    assert [progress.done for progress in seen] == [4, 7, 10]
    assert [progress.finished for progress in seen] == [False, False, True]
    assert {(progress.stage, progress.unit, progress.total, progress.reused) for progress in seen} == {
        ("generate", "prompts", 10, 4)
    }
    assert seen[1].note == "1,000 tokens/s"


def test_the_rate_leaves_out_the_start_of_the_engine(clock: Clock) -> None:
    seen: list[Progress] = []
    meter = Meter(seen.append, "generate", 1000, "prompts")
    clock.now += 60  # the engine starts
    meter.add(10)
    for _ in range(10):
        clock.now += 1
        meter.add(20)
    assert seen[-1].rate == pytest.approx(20)
    assert seen[-1].eta == pytest.approx((1000 - 210) / 20)


def test_there_is_a_rate_once_there_is_something_to_go_by(clock: Clock) -> None:
    seen: list[Progress] = []
    meter = Meter(seen.append, "score", 100, "rewards")
    clock.now += 10
    meter.add(50)
    assert [(progress.rate, progress.eta) for progress in seen] == [(0, None), (0, None)]
    meter.add(50)
    assert seen[-1].rate == pytest.approx(10)
    assert meter.seconds == pytest.approx(10)


def test_what_was_reused_makes_no_rate(clock: Clock) -> None:
    seen: list[Progress] = []
    meter = Meter(seen.append, "generate", 910, "prompts", reused=900)
    clock.now += 5
    meter.add(10)
    assert seen[-1].rate == pytest.approx(2)


def test_progress_reads_as_a_sentence() -> None:
    assert str(Progress("ingest", 1500, 0, "rows", 0.0)) == "1,500 rows"
    assert str(Progress("score", 10, 40, "rewards", 2.0)) == "10/40 rewards, 2.0 rewards/s, 15 s left"
    full = Progress("generate", 4000, 4000, "prompts", 12.34, reused=1000, note="9,000 tokens/s")
    assert str(full) == "4,000/4,000 prompts, 12.3 prompts/s, 1,000 reused, 9,000 tokens/s"
    assert full.finished


def test_an_unknown_total_is_never_finished_and_has_no_time_left() -> None:
    progress = Progress("ingest", 1500, 0, "rows", 3.0)
    assert not progress.finished
    assert progress.eta is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (245, "4 min 5 s"), (7800, "2 h 10 min"), (3600, "1 h 0 min")],
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_reporting_to_nobody_is_possible() -> None:
    Meter(silent, "pair", 1, "prompts").add(1)


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(prefect_api: str, tmp_path: Path) -> None:
    """A real terminal, and the same run again with its log in a file."""
    (tmp_path / "faults.json").write_text(json.dumps({"": "sleep 0.1"}))
    slow = {"engine_args": {"faults": str(tmp_path / "faults.json")}}
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(24))
    generate = {"samples": 2, "generators": [generator(**slow)]}
    values = curate_values(source, ingest={"source": str(source), "shard_size": 4}, generate=generate)
    (tmp_path / "curate.yaml").write_text(yaml.safe_dump(values))
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "home"), TERM="xterm", COLUMNS="120")
    command = [sys.executable, "-m", "flows.cli", "curate", str(tmp_path / "curate.yaml"), "--json"]
    ours, theirs = pty.openpty()
    drawn = b""
    store = ["--store", str(tmp_path / "drawn")]
    with subprocess.Popen([*command, *store], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs) as run:
        os.close(theirs)
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while piece := os.read(ours, 65536):
                drawn += piece
        assert run.stdout
        json.loads(run.stdout.read())
    assert run.returncode == 0, drawn.decode(errors="replace")
    assert "━".encode() in drawn and b"generate" in drawn and b"24/24 prompts" in drawn
    plain = prefsieve("curate", tmp_path / "curate.yaml", "--json", "--store", tmp_path / "plain", env=env)
    assert plain.returncode == 0, plain.stderr
    assert "━" not in plain.stderr and "generate: 24/24 prompts" in plain.stderr and "\x1b[" not in plain.stderr


SLOW = """
import time
from prefect import flow
from flows import reporting
from tasks.progress import Meter

create, reporting._PATIENCE = reporting.create_progress_artifact, 0.5

def late(*args, **kwargs):
    time.sleep(2)
    return create(*args, **kwargs)

reporting.create_progress_artifact = late

@flow
def slow():
    with reporting.progress_artifact("slow") as report:
        Meter(report, "slow", 2, "prompts").add(2)
    time.sleep(6)

slow()
"""


def test_a_server_that_is_slow_is_told_of_the_end_while_the_run_goes_on(prefect_api: str, tmp_path: Path) -> None:
    """What is told first takes longer than an end waits for."""
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "home"))
    subprocess.run([sys.executable, "-c", SLOW], env=env, cwd=ROOT, check=True, timeout=120)
    asked = {"artifacts": {"key": {"any_": ["slow-progress"]}}}
    (shown,) = httpx.post(f"{prefect_api}/artifacts/latest/filter", json=asked, timeout=60).json()
    assert float(shown["data"]) == 100
