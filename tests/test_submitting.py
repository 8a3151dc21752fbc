"""A job's run ends, or an answer is lost, while the job is submitted: with a dashboard that says what a test wants."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray

from flows import guard
from flows.submit import run_flow, submit_flow
from tasks.errors import RunError, Unreachable
from tests.conftest import curate_config
from tests.services import free_ports

REPORT = {"stages": [], "subsets": []}
CONFIG = curate_config("prompts.jsonl")
Answer = Callable[[str, str, dict[str, Any]], Any]  # of method, path, body


# --- the guard


def test_a_guard_waits_for_a_job_that_comes_to_be_only_now(soon: None) -> None:
    """Two times it is not there, then it has no process yet that could be stopped."""
    mine = details("x", metadata={"run": "mine"})
    said = {"GET": [404, 404, mine, mine], "POST": [{"stopped": False}, {"stopped": True}]}
    with dashboard(lambda method, *_: said[method].pop(0)) as there:
        guard.end(f"{there.address}/api/jobs/x", {}, "mine")
    assert [method for method, _ in there.asked] == ["GET", "GET", "GET", "POST", "GET", "POST"]


def test_a_guard_does_not_wait_for_a_job_for_ever(soon: None) -> None:
    with dashboard(lambda *_: 404) as there:
        guard.end(f"{there.address}/api/jobs/x", {}, "mine")
    assert len(there.asked) * 10 == 70, "a minute"


def test_a_guard_does_not_wait_for_a_job_that_was_there_before_and_is_gone(soon: None) -> None:
    """What comes to be under its name then is another run's."""
    with dashboard(lambda *_: 404) as there:
        guard.end(f"{there.address}/api/jobs/x", {}, "")
    assert there.asked == [("GET", "/api/jobs/x")]


@pytest.mark.parametrize("about", [{"status": "STOPPED"}, {"metadata": {"run": "another"}}, {"metadata": None}])
def test_a_guard_leaves_a_job_that_has_ended_or_is_of_another_run(soon: None, about: dict[str, Any]) -> None:
    with dashboard(lambda *_: details("x", **{"metadata": {"run": "mine"}, **about})) as there:
        guard.end(f"{there.address}/api/jobs/x", {}, "mine")
    assert there.asked == [("GET", "/api/jobs/x")]


def test_a_guard_goes_on_while_nobody_answers_and_nobody_ends_it() -> None:
    (port,) = free_ports(1)
    order = {"url": f"http://127.0.0.1:{port}/api/jobs/x", "headers": {"Authorization": "Bearer t"}, "run": ""}
    beside = subprocess.Popen([sys.executable, "-I", guard.__file__], stdin=subprocess.PIPE, text=True)
    assert beside.stdin
    beside.stdin.write(f"{json.dumps(order)}\n")
    beside.stdin.close()
    time.sleep(2)
    beside.terminate()
    said = [503, details("x"), {"stopped": True}]
    with dashboard(lambda *_: said.pop(0), port) as there:
        assert beside.wait(60) == 0
    assert there.asked == [("GET", "/api/jobs/x"), ("GET", "/api/jobs/x"), ("POST", "/api/jobs/x/stop")]
    assert there.tokens == {"Bearer t"}


# --- runs


@pytest.mark.parametrize("run", [run_flow, submit_flow])
def test_a_job_whose_answer_is_lost_is_followed(run: Callable[..., Any]) -> None:
    with cluster("SUCCEEDED", begins=["submitted"]) as there:
        assert run("curate", CONFIG, there.address) == REPORT
    assert there.asked.count(("POST", "/api/jobs/")) == 1


def test_a_job_that_comes_to_be_after_its_answer_was_lost_is_stopped() -> None:
    with cluster("RUNNING", begins=["submitted", "listed"]) as there:
        with pytest.raises(Unreachable, match="where it begins within a minute, it is stopped; run the same"):
            run_flow("curate", CONFIG, there.address)
        wait_for_stop(there)


def test_a_job_whose_run_is_interrupted_while_it_is_submitted_is_stopped() -> None:
    """It begins when the run has not found it, and the guard has not either."""
    me = threading.get_ident()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        begins = ["submitted", "missed", "missed"]
        with cluster("RUNNING", begins, lambda: signal.pthread_kill(me, signal.SIGINT)) as there:
            with pytest.raises(KeyboardInterrupt):
                run_flow("curate", CONFIG, there.address)
            wait_for_stop(there)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_in_mid_job_is_told_with_what_to_do(status: int) -> None:
    with (
        cluster("RUNNING", begins=["submitted"], refuses=status) as there,
        pytest.raises(RunError, match="RAY_AUTH_TOKEN") as refused,
    ):
        submit_flow("curate", CONFIG, there.address)
    assert f"--address {there.address}`" in str(refused.value)
    assert "may still be running" in str(refused.value)


# --- a dashboard


class Dashboard:
    def __init__(self, answer: Answer, port: int) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.address = f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def dashboard(answer: Answer, port: int = 0) -> Iterator[Dashboard]:
    """An answer that is a number is the status of an error, None is none at all."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if "/logs/tail" in self.path:  # a web socket
                return
            there.asked.append((self.command, self.path))
            there.tokens.add(self.headers["Authorization"])
            is_json = self.headers["Content-Type"] == "application/json"
            said = there.answer(self.command, self.path, json.loads(body) if is_json and body else {})
            if said is not None:
                self.send_response(said if isinstance(said, int) else 200)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        there = Dashboard(answer, server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield there
        server.shutdown()


@contextlib.contextmanager
def cluster(
    status: str, begins: list[str], meanwhile: Callable[[], Any] = lambda: None, refuses: int = 0
) -> Iterator[Dashboard]:
    """Takes one job, and loses the answer to that.

    begins: what must have been asked since for the job to begin. meanwhile: happens while it is submitted. refuses:
    what is said of the job in place of its status.
    """
    wanted: dict[str, Any] = {}
    begun: dict[str, dict[str, Any]] = {}
    asked: list[str] = []

    def happened(what: str) -> None:
        if wanted:
            asked.append(what)
        if asked == begins:
            name = wanted["submission_id"]
            begun[name] = details(name, status=status, metadata=wanted["metadata"])

    def answer(method: str, path: str, body: dict[str, Any]) -> Any:
        name, _, what = path.removeprefix("/api/jobs/").partition("/")
        if not path.startswith("/api/jobs/"):  # the version, and whether a package is there
            return {"ray_version": ray.__version__}
        if method == "POST" and not name:
            wanted.update(body)
            happened("submitted")
            meanwhile()
            return None
        if not name:
            listed = list(begun.values())
            happened("listed")
            return listed
        if name not in begun:
            happened("missed")
            return 404
        if what == "stop":
            begun[name]["status"] = "STOPPED"
            return {"stopped": True}
        return {"logs": json.dumps(REPORT)} if what == "logs" else refuses or begun[name]

    with dashboard(answer) as there:
        yield there


def details(job: str, **changes: Any) -> dict[str, Any]:
    """A job, as Ray tells of it."""
    return {"submission_id": job, "type": "SUBMISSION", "status": "PENDING", "entrypoint": "", **changes}


def wait_for_stop(there: Dashboard) -> None:
    deadline = time.monotonic() + 30
    while not any(path.endswith("/stop") for _, path in there.asked):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_PAUSE", 0.0)
