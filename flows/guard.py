"""A small process beside one that follows a job: ends the job when that process is killed, which nothing else notices.

A Prefect worker that is told to end kills the runs it started, with a signal that no process can see. As a program this
reads where to send what from its standard input, and sends it when that is closed before a word of release.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TRIES, _PAUSE, _TIMEOUT = 30, 10.0, 20.0  # seconds; a cluster's head may just be away


@contextlib.contextmanager
def guarding(client: JobSubmissionClient, job: str) -> Iterator[None]:
    """The job is stopped when this process is killed inside of the block, or interrupted."""
    order = {"url": f"{client._address}/api/jobs/{job}/stop", "headers": client._headers}  # the token is among them
    beside = subprocess.Popen(
        [sys.executable, "-I", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert beside.stdin
    beside.stdin.write(f"{json.dumps(order)}\n")
    beside.stdin.flush()
    try:
        yield
        _release(beside)
    except Exception:  # the job has ended, or cannot be reached
        _release(beside)
        raise
    finally:  # interrupted: it goes on by itself, for as long as nobody answers
        with contextlib.suppress(OSError):
            beside.stdin.close()


def _release(beside: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        beside.communicate("released")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # what ends the other may be sent to all beside it
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.stdin.readline() or "null")
    if not order or sys.stdin.readline():
        return
    request = urllib.request.Request(order["url"], data=b"", headers=order["headers"], method="POST")
    for _ in range(_TRIES):
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:  # the job never came to be, or the token is another by now
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
