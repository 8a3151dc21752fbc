"""A small process beside one that follows a job: ends the job when that process is killed, which nothing else notices.

A Prefect worker that is told to end kills the runs it started, with a signal that no process can see. As a program this
reads where to send what from its standard input, and sends it when that is closed before a word of release.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TRIES, _TIMEOUT = 3, 20.0  # seconds


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
    word = ""
    try:
        yield
        word = "released"
    except Exception:  # the job has ended, or cannot be reached
        word = "released"
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.communicate(word)


def main() -> None:
    order = json.loads(sys.stdin.readline() or "null")
    if not order or sys.stdin.readline():
        return
    request = urllib.request.Request(order["url"], data=b"", headers=order["headers"], method="POST")
    for _ in range(_TRIES):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
            return


if __name__ == "__main__":
    main()
