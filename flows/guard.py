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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TRIES, _PAUSE, _TIMEOUT = 30, 10.0, 20.0  # seconds; a cluster's head may just be away
_LATE = 7  # tries of these, a minute, for a job that this run was submitting and that is not there yet
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@contextlib.contextmanager
def guarding(client: JobSubmissionClient, job: str, run: str) -> Iterator[None]:
    """The job is stopped when this process is killed inside of the block, or interrupted, or raises Unreachable.

    run: what the job's metadata must say for that, as another run may submit a job of that name meanwhile; empty for
    any, of a job that was there before.
    """
    from tasks.errors import Unreachable  # which the program that this file is cannot import

    order = {"url": f"{client._address}/api/jobs/{job}", "headers": client._headers, "run": run}  # with the token
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
    except Unreachable:  # the job may be there, or come yet
        raise
    except Exception:  # the job has ended, or cannot be reached
        _release(beside)
        raise
    finally:  # without a release it goes on by itself, for as long as nobody answers
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
    end(**order)


def end(url: str, headers: dict[str, str], run: str) -> None:
    """Stop the job, through times in which nobody answers, and one that comes to be only now."""
    late = 0
    for _ in range(_TRIES):
        try:
            if _has_its_end(url, headers, run):
                return
            late += 1
        except urllib.error.HTTPError as error:
            if error.code == 404 and run:
                late += 1
            elif error.code < 500:  # it is gone, or the token is another by now
                return
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):  # or what answers is no Ray
            pass
        if late == _LATE:
            return
        time.sleep(_PAUSE)


def _has_its_end(url: str, headers: dict[str, str], run: str) -> bool:
    """Whether the job has ended, is told to, or is another run's; one that just begins has nothing yet to be told."""
    job = _ask("GET", url, headers)
    if job["status"] in _ENDED or (run and (job.get("metadata") or {}).get("run") != run):
        return True
    return bool(_ask("POST", f"{url}/stop", headers)["stopped"])


def _ask(method: str, url: str, headers: dict[str, str]) -> dict[str, Any]:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        return dict(json.load(answer))


if __name__ == "__main__":
    main()
