"""submit: a flow as a job of a Ray cluster, followed from here.

What travels is the configuration, as a file in the job's working folder, and from a source tree the code. Secrets do
not: the cluster has its own AWS_* variables and tokens. The job's id is a digest of the configuration, so submitting
again finds a running job and follows it; a job that has ended is run again, which does only what is missing.

The status is asked for; the log that is shown meanwhile is decoration, because Ray's stream of it may end early.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks.config import DEFAULT_STORE, is_local_path
from tasks.errors import ConfigError, RunError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_TIMEOUT = (10, 60)  # seconds to connect, and for an answer
_POLL = 1.0  # seconds between two questions for the status
_LOST = 300.0  # seconds without an answer after which the cluster counts as lost
_SHOWN = 20  # lines of a failed job's log
_REPORT = '{"'  # how the line with the report begins
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers these to an address that was given
_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"


def submit_flow(flow: str, values: dict[str, Any], address: str) -> dict[str, Any]:
    """Run the flow on the cluster whose dashboard is at `address`; returns the report that the job printed.

    Raises ConfigError when the cluster cannot be reached, refuses the token, or the job refuses the configuration;
    RunError with the end of the job's log when the job fails.
    """
    text = yaml.safe_dump(absolute({**values, "ray_address": "auto"}), allow_unicode=True)
    command = entrypoint(flow)
    name = f"prefsieve-{flow}-{hashlib.sha256(f'{command} {text}'.encode()).hexdigest()[:16]}"
    client = _connect(address)
    with _explained(address):
        job = _running_job(client, name) or _start(client, command, text, name)
    print(f"job {job} at {address}", file=sys.stderr)
    try:
        return _result(client, _followed(client, job, address))
    except KeyboardInterrupt:
        print(
            f"job {job} goes on without this terminal; run the same command to follow it again, or end it with "
            f"`ray job stop {job} --address {address}`",
            file=sys.stderr,
        )
        raise


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every local path made absolute: a job has another working folder."""
    values = copy.deepcopy(values)
    if store := values.get("store") or os.environ.get("PREFSIEVE_STORE"):
        values["store"] = _absolute(store, always=True)
    for part in (
        values,
        values.get("curate") or {},
        values.get("evaluate") or {},
    ):  # an experiment has the others inside
        _make_absolute(part)
    return values


def _make_absolute(values: dict[str, Any]) -> None:
    """Sources, models and files of functions, where they are paths."""
    for section in (values.get("ingest"), values.get("import")):
        if section and "source" in section:
            section["source"] = _absolute(section["source"])
        if section and section.get("tokenizer"):
            section["tokenizer"] = _absolute(section["tokenizer"])
    for model in [
        *values.get("generate", {}).get("generators", []),
        *values.get("score", {}).get("scorers", []),
        values.get("policy", {}),
    ]:
        if model.get("model") and not model.get("judge", {}).get("base_url"):  # an endpoint's model is its own affair
            model["model"] = _absolute(model["model"])
        file, colon, function = model.get("function", "").rpartition(":")
        if file.endswith(".py"):
            model["function"] = _absolute(file, always=True) + colon + function


def entrypoint(flow: str) -> str:
    """The job's shell command.

    Where neither the configuration nor the submitter names a store, the cluster's PREFSIEVE_STORE is taken, and without
    one the default folder below the submitter's, never one below the job's working folder, which is thrown away.
    """
    default = shlex.quote(str(Path(DEFAULT_STORE).absolute()))
    # The report goes through a file: on the way to the job's log it could be cut by a line of another thread.
    return (
        f'[ -n "$PREFSIEVE_STORE" ] || export PREFSIEVE_STORE={default}; '
        f"python -m flows.cli {flow} config.yaml --json > report.json && cat report.json"
    )


def _absolute(name: str, always: bool = False) -> str:
    """A hub name, a policy of the store and a URL stay as they are."""
    if "://" in name or name.startswith("policy:"):
        return name
    is_path = always or is_local_path(name) or any(letter in name for letter in "*?[")
    return str(Path(os.path.expanduser(name)).absolute()) if is_path else name


# --- the cluster


def _connect(address: str) -> JobSubmissionClient:
    if not re.fullmatch(r"https?://[^/]+/?", address):
        raise ConfigError(f"--address {address!r}: give the dashboard of the Ray cluster, such as http://HEAD:8265")
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # uploads and closed sockets are not news
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's own waits for ever when packets are lost."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": _TIMEOUT, **options})

    with _explained(address):
        client = Client(address)
        client.list_jobs()  # the version is told to everybody, the jobs only to who has the token
    return client


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """What goes wrong between here and the cluster, as one message that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(f"--address {address}: the cluster asks for its token; {_TOKEN_ADVICE}") from error
    except (requests.RequestException, ConnectionError) as error:
        raise ConfigError(
            f"--address {address}: no Ray dashboard answers there; check host and port (8265 by default), and that "
            "the cluster is up"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"--address {address}: {_first_line(error)}") from error


def _attempts(client: JobSubmissionClient, name: str) -> dict[int, JobDetails]:
    """Every job of this configuration by attempt, from 1: NAME, NAME-2, NAME-3 ..."""
    found = {}
    for job in client.list_jobs():
        if match := re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or ""):
            found[int(match[1] or 1)] = job
    return found


def _running_job(client: JobSubmissionClient, name: str) -> str | None:
    for job in _attempts(client, name).values():
        if job.status.value not in _ENDED:
            print(f"job {job.submission_id} is already {job.status.value.lower()}: following it", file=sys.stderr)
            return str(job.submission_id)
    return None


def _start(client: JobSubmissionClient, command: str, text: str, name: str) -> str:
    """Submit the next attempt; when somebody else was faster, theirs is the job."""
    last = max(_attempts(client, name), default=0)
    job = name if last == 0 else f"{name}-{last + 1}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(text, encoding="utf-8")
        runtime_env = {"working_dir": folder, "excludes": ["__pycache__/"], **_code()}
        try:
            client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime_env)
        except RuntimeError:
            if running := _running_job(client, name):
                return running
            raise
    return job


def _code() -> dict[str, Any]:
    """From a source tree its packages travel along; an installed prefsieve is expected on the cluster as well."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        return {}
    return {"py_modules": [str(root / "flows"), str(root / "tasks")]}


# --- following


def _followed(client: JobSubmissionClient, job: str, address: str) -> JobDetails:
    """The job once it has ended. A connection that was lost is taken up again."""
    import requests

    threading.Thread(target=_show_log, args=(client, job), daemon=True).start()
    answered = time.monotonic()
    while True:
        try:
            info = client.get_job_info(job)
        except (requests.RequestException, RuntimeError) as error:
            if time.monotonic() - answered > _LOST:
                raise RunError(
                    f"job {job}: {address} has not answered for {_LOST:.0f} s ({_first_line(error)}); the job may "
                    "still be running: run the same command to follow it again"
                ) from error
        else:
            answered = time.monotonic()
            if info.status.value in _ENDED:
                return info
        time.sleep(_POLL)


def _show_log(client: JobSubmissionClient, job: str) -> None:
    import asyncio

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            for line in lines.splitlines():
                if line.startswith(_REPORT):
                    return
                print(line, file=sys.stderr)

    with contextlib.suppress(Exception):  # decoration: the status is asked for by the other thread
        asyncio.run(show())


def _result(client: JobSubmissionClient, info: JobDetails) -> dict[str, Any]:
    job, status = str(info.submission_id), info.status.value
    log = client.get_job_logs(job)
    if status == "SUCCEEDED":
        return _report(job, log)
    said = "\n  ".join(log.rstrip().splitlines()[-_SHOWN:]) or info.message
    if info.driver_exit_code == 2:
        raise ConfigError(f"job {job} refuses its configuration:\n  {said}")
    raise RunError(f"job {job} {status.lower()}; the end of its log:\n  {said}")


def _report(job: str, log: str) -> dict[str, Any]:
    """The last JSON document of the log."""
    for line in reversed(log.splitlines()):
        if line.startswith(_REPORT):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    raise RunError(f"job {job} succeeded, but its log holds no report; the store has what it made")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
