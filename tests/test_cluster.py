"""Pools of actors: side by side, with errors that say what they are; and Ray is left when the outermost block ends."""

from __future__ import annotations

import errno
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import requests
from aiohttp import ClientResponseError, ServerDisconnectedError
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from tasks.cluster import Pool, check_room, disconnecting, nodes_of, run_pools
from tasks.errors import ConfigError, RunError, Unreachable, is_network_fault
from tasks.records import Work
from tasks.sections import GeneratorConfig

ONE = GeneratorConfig(name="one", engine="fake")


class Meeting:
    """Comes to a place and waits there for the other."""

    def __init__(self, folder: str, me: str, other: str, run: str) -> None:
        self.mine, self.others = Path(folder) / me, Path(folder) / other

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        self.mine.touch()
        deadline = time.monotonic() + 60
        while not self.others.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"met": self.others.exists(), "item": item["item"]}


class Failing:
    def __init__(self, error: Exception, run: str) -> None:
        self.error = error

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        raise self.error


def test_pools_run_side_by_side_and_every_answer_arrives(local_ray: Any, tmp_path: Path) -> None:
    answers: list[tuple[str, int, bool]] = []

    def pool(me: str, other: str) -> Pool:
        def on_done(answer: dict[str, Any]) -> None:
            answers.append((me, answer["item"], answer["met"]))

        return Pool("test", Meeting, (str(tmp_path), me, other), [{"item": 1}, {"item": 2}], ONE, on_done)

    assert run_pools([pool("a", "b"), pool("b", "a")]).engine_seconds >= 0
    assert sorted(answers) == [("a", 1, True), ("a", 2, True), ("b", 1, True), ("b", 2, True)]


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (ConnectionResetError("the bucket is gone"), Unreachable, "a server could not be reached: .*bucket is gone"),
        (ValueError("bad shape"), RunError, "an engine failed: ValueError: bad shape"),
    ],
)
def test_what_fails_in_a_worker_is_said_and_only_the_network_is_worth_another_try(
    local_ray: Any, raised: Exception, kind: type[Exception], said: str
) -> None:
    with pytest.raises(RunError, match=said) as caught:
        run_pools([Pool("test", Failing, (raised,), [{"item": 1}], ONE, lambda answer: None)])
    assert type(caught.value) is kind


class Beating:
    """Works for ever, and leaves a trace of it."""

    def __init__(self, trace: str, run: str) -> None:
        self.trace = Path(trace)

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        for beat in range(1200):
            self.trace.write_text(str(beat))
            time.sleep(0.05)
        return {}


class FailingBeside(Failing):
    """Fails when the other one works."""

    def __init__(self, trace: str, run: str) -> None:
        super().__init__(ValueError("bad shape"), run)
        self.trace = Path(trace)

    async def work(self, item: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while not self.trace.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return await super().work(item)


def test_nothing_of_a_failed_run_goes_on_beside_the_next_try(local_ray: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pools = [
        Pool("test", kind, (str(trace),), [{"item": 1}], ONE, lambda answer: None) for kind in (Beating, FailingBeside)
    ]
    with pytest.raises(RunError, match="bad shape"):
        run_pools(pools)
    time.sleep(1)  # a kill takes a moment to arrive
    last = trace.read_text()
    time.sleep(1)
    assert trace.read_text() == last


@pytest.mark.parametrize(
    ("error", "worth_another_try"),
    [
        (ConnectionResetError("gone"), True),
        (TimeoutError("slow"), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError("model.safetensors"), False),
        (ValueError("bad shape"), False),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:9"), True),
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject"), True),
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 409}}, "PutObject"), True),
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject"), False),
        (NoCredentialsError(), False),
        (ServerDisconnectedError(), True),
        (ClientResponseError(None, (), status=403), False),
        (requests.exceptions.ReadTimeout(), True),
        (httpx.ConnectError("gone"), True),
    ],
)
def test_a_network_fault_is_told_from_others(error: Exception, worth_another_try: bool) -> None:
    assert is_network_fault(error) == worth_another_try
    try:
        raise OSError("as s3fs says it") from error
    except OSError as wrapped:
        assert is_network_fault(wrapped) == worth_another_try
    try:
        raise ConfigError("as we say it, when the address is wrong") from error
    except ConfigError as ours:
        assert not is_network_fault(ours)


def test_no_pools_need_no_ray() -> None:
    assert run_pools([]) == Work()


def test_the_outermost_block_leaves_ray_and_only_if_it_was_not_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(running=False)
    ray.is_initialized = lambda: ray.running
    ray.shutdown = lambda: setattr(ray, "running", False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with disconnecting():
        with disconnecting():
            ray.running = True
        assert ray.running
    assert not ray.running
    ray.running = True
    with disconnecting():
        pass
    assert ray.running


def test_nodes_that_an_autoscaler_may_add_are_room(monkeypatch: pytest.MonkeyPatch) -> None:
    head = SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 0.0}}]
    )  # a cluster that has not grown yet
    large = GeneratorConfig(name="large", engine="fake", cpus=4, gpus=1)
    with pytest.raises(ConfigError, match="no node of the Ray cluster has both"):
        check_room(head, large)
    monkeypatch.setenv("PREFSIEVE_NODES", '[{"nodes": 1, "CPU": 4}, {"nodes": 2, "CPU": 8, "GPU": 1}]')
    assert nodes_of(head) == [{"CPU": 4}, {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    check_room(head, large)
    with pytest.raises(ConfigError, match=r"gpus: 2: no node .* \(4 CPUs and 0 GPUs; 8 CPUs and 1 GPUs; "):
        check_room(head, large.model_copy(update={"gpus": 2}))


@pytest.mark.parametrize("said", ["8", "{}x", '["CPU"]', '[{"CPU": 8}]', '[{"nodes": "many"}]'])
def test_nodes_that_are_said_wrongly_are_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSIEVE_NODES", said)
    with pytest.raises(ConfigError, match=r"PREFSIEVE_NODES: .* is no list of nodes"):
        nodes_of(None)
