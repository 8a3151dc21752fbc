"""Jobs of a Ray cluster, by the dashboard's HTTP: found, followed, stopped.

The status is asked for, again and again, through times in which nobody answers. The log comes by a stream, which breaks
with the connection and which Ray may end early: it is taken up again where it broke off, and what it left out is made
up for at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.errors import ConfigError, RunError, Unreachable
from tasks.urls import shown

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

REPORT = '{"'  # how the line with a flow's report begins

_TIMEOUT = (10, 60)  # seconds to connect, and for an answer
_POLL = 1.0  # seconds between two questions for the status
_LOST = 300.0  # seconds without an answer after which the cluster counts as lost
_SILENT = 60.0  # seconds without a line after which the stream of the log may be dead, and is asked for anew
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers these to an address that was given
_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"

Answer = TypeVar("Answer")


def connect(address: str) -> JobSubmissionClient:
    """A client of the dashboard. ConfigError when none answers, or it refuses the token."""
    if not re.fullmatch(r"https?://[^/@?#\s]+/?", address):
        raise ConfigError(
            f"--address {shown(address)!r}: give the dashboard of the Ray cluster, such as http://HEAD:8265, and its "
            "token by RAY_AUTH_TOKEN"
        )
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # uploads and closed sockets are not news
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's own waits for ever when packets are lost."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": _TIMEOUT, **options})

    with explained(address):
        client = Client(address)
        client.list_jobs()  # the version is told to everybody, the jobs only to who has the token
    return client


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """What goes wrong between here and the cluster, as one message that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(f"--address {address}: the cluster asks for its token; {_TOKEN_ADVICE}") from error
    except RunError:  # is a RuntimeError, and says it already
        raise
    except (requests.RequestException, ConnectionError) as error:
        raise ConfigError(
            f"--address {address}: no Ray dashboard answers there; check host and port (8265 by default), and that "
            "the cluster is up"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"--address {address}: {_first_line(error)}") from error


def has_ended(info: JobDetails) -> bool:
    return bool(info.status.is_terminal())


def attempts(client: JobSubmissionClient, name: str) -> dict[int, JobDetails]:
    """Every job of a name by attempt, from 1: NAME, NAME-2, NAME-3 ..."""
    found = {}
    for job in client.list_jobs():
        if match := re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or ""):
            found[int(match[1] or 1)] = job
    return found


def running(client: JobSubmissionClient, name: str) -> JobDetails | None:
    """The attempt that goes on."""
    return next((job for job in attempts(client, name).values() if not has_ended(job)), None)


def is_known(client: JobSubmissionClient, job: str, address: str) -> bool:
    """Whether the cluster has the job, ended or not. Raises Unreachable when nobody tells."""
    try:
        return any(info.submission_id == job for info in _patiently(client.list_jobs, job, address))
    except RunError as error:
        raise Unreachable(str(error)) from error


def follow(client: JobSubmissionClient, job: str, address: str) -> tuple[JobDetails, str]:
    """The job once it has ended, and its log, of which each line but a report is shown as it comes.

    Raises RunError when the cluster does not answer for five minutes, or does not know the job any more.
    """
    log = _Log(client, job)
    shower = threading.Thread(target=log.stream, daemon=True)
    shower.start()
    info = _wait(client, job, address)
    text = _patiently(partial(client.get_job_logs, job), job, address)
    log.show(0, text if text.endswith("\n") else f"{text}\n")
    log.complete.set()
    shower.join(_POLL)
    return info, text


def stop(client: JobSubmissionClient, job: str, address: str) -> JobDetails:
    """The job once it has ended, after it was told to. Raises RunError as `follow` does."""
    return _wait(client, job, address, lambda: client.stop_job(job))


def _wait(
    client: JobSubmissionClient, job: str, address: str, meanwhile: Callable[[], Any] = lambda: None
) -> JobDetails:
    with _interrupts() as interrupted:
        while not has_ended(info := _patiently(partial(client.get_job_info, job), job, address)):
            _patiently(meanwhile, job, address)
            time.sleep(_POLL)
            if interrupted.is_set():
                raise KeyboardInterrupt
    return info


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C. Its exception alone is not enough: raised while garbage is collected, Python ignores it."""
    interrupted, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _patiently(ask: Callable[[], Answer], job: str, address: str) -> Answer:
    """An answer, through times in which there is none."""
    import requests
    from ray.exceptions import AuthenticationError

    since = time.monotonic()
    while True:
        try:
            return ask()
        except AuthenticationError as error:
            raise RunError(
                f"job {job}: {address} does not take the token any more, and the job may still be running; "
                f"{_TOKEN_ADVICE}, then run the same command to follow it again, or end it with "
                f"`prefsieve cancel {job} --address {address}`"
            ) from error
        except (requests.RequestException, RuntimeError) as error:
            if "status code 404" in str(error):
                raise RunError(
                    f"job {job} is not known at {address}: the cluster was started anew, or the job never came to be; "
                    "run the same command to go on"
                ) from error
            if time.monotonic() - since > _LOST:
                raise RunError(
                    f"job {job}: {address} has not answered for {_LOST:.0f} s ({_first_line(error)}); the job may "
                    "still be running: run the same command to follow it again"
                ) from error
        time.sleep(_POLL)


class _Log:
    """A job's log on standard error: each line once, however often it arrives."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job = client, job
        self.complete = threading.Event()  # nothing more is wanted of the stream
        self.seen, self.rest = 0, ""  # characters so far, and those of a line that has no end yet
        self.lock = threading.Lock()

    def show(self, start: int, text: str) -> None:
        """A part of the log that begins at this character: what is new in it."""
        with self.lock:
            new = text[max(0, self.seen - start) :]
            self.seen += len(new)
            *lines, self.rest = (self.rest + new).split("\n")
            for line in lines:
                if not line.startswith(REPORT):
                    print(line, file=sys.stderr)

    def stream(self) -> None:
        """What a thread does: every stream of Ray's begins at the log's beginning."""
        while not self.complete.is_set():
            with contextlib.suppress(Exception):  # decoration: the status and the whole log are asked for beside
                asyncio.run(self._stream_once())
            self.complete.wait(_POLL)

    async def _stream_once(self) -> None:
        start, now = 0, asyncio.get_running_loop().time
        async with asyncio.timeout(_SILENT) as patience:
            async for text in self.client.tail_job_logs(self.job):
                patience.reschedule(now() + _SILENT)
                self.show(start, text)
                start += len(text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
