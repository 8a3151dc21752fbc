"""submit: a flow as a job of a Ray cluster, followed from here.

What travels is the configuration, as a file in the job's working folder, and from a source tree the code. Secrets do
not: the cluster has its own AWS_* variables and tokens. The job's id is a digest of the configuration, so submitting
again finds a running job and follows it; a job that has ended is run again, which does only what is missing.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import secrets
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows import guard, jobs
from tasks.cluster import code
from tasks.config import DEFAULT_STORE, RunConfig, is_local_path
from tasks.errors import ConfigError, RunError, Unreachable
from tasks.urls import without_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_SHOWN = 20  # lines of a failed job's log
_LEAVE = 30  # seconds that a job which is stopped has, to tell Prefect and to end its actors


@dataclass(frozen=True)
class Job:
    """A flow with its configuration, as the cluster is given it."""

    name: str
    command: str
    config: str  # YAML


def submit_flow(flow: str, config: RunConfig, address: str) -> dict[str, Any]:
    """Run the flow on the cluster whose dashboard is at `address`; returns the report that the job printed.

    Raises ConfigError when the cluster cannot be reached, refuses the token, or the job refuses the configuration;
    RunError with the end of the job's log when the job fails.
    """
    wanted, client = prepared(flow, config), jobs.connect(address)
    job, runs = _attempt(client, wanted, address)
    if not runs:
        _start(client, wanted, job, address)
    print(f"job {job} at {address}", file=sys.stderr)
    try:
        return _result(*jobs.follow(client, job, address))
    except KeyboardInterrupt:
        print(
            f"job {job} goes on without this terminal; run the same command to follow it again, or end it with "
            f"`prefsieve cancel {job} --address {address}`",
            file=sys.stderr,
        )
        raise


def run_flow(flow: str, config: RunConfig, address: str) -> dict[str, Any]:
    """As `submit_flow`, but the job ends with this process, and with whatever interrupts it."""
    wanted, client = prepared(flow, config), jobs.connect(address)
    job, runs = _attempt(client, wanted, address)
    run = "" if runs else secrets.token_hex(8)
    with guard.guarding(client, job, run):
        try:
            if not runs:
                _start(client, wanted, job, address, run)
            print(f"job {job} at {address}", file=sys.stderr)
            return _result(*jobs.follow(client, job, address))
        except BaseException as error:
            if not isinstance(error, Exception):
                print(f"job {job} is being stopped", file=sys.stderr)
                try:
                    jobs.stop(client, job, address)
                except RunError as unknown:  # the guard goes on trying
                    error.add_note(str(unknown))
            raise


def cancel_flow(flow: str, config: RunConfig, address: str) -> dict[str, Any]:
    """Stop the job that runs this flow with this configuration. Raises ConfigError when there is none."""
    name, client = prepared(flow, config).name, jobs.connect(address)
    with jobs.explained(address):
        running = jobs.running(client, name)
    if not running:
        raise ConfigError(f"no job runs {flow} with this configuration at {address}")
    return _stopped(client, str(running.submission_id), address)


def cancel_job(job: str, address: str) -> dict[str, Any]:
    """Stop a job by its id. Raises ConfigError when there is none, or it has ended already."""
    client = jobs.connect(address)
    with jobs.explained(address):
        known = {str(info.submission_id): info for info in client.list_jobs() if info.submission_id}
    if job not in known:
        running = [name for name, info in known.items() if not jobs.has_ended(info)]
        raise ConfigError(f"job {job!r} is not known at {address}; running there: {', '.join(running) or 'none'}")
    if jobs.has_ended(known[job]):
        raise ConfigError(f"job {job} has ended already: {known[job].status.value.lower()}")
    return _stopped(client, job, address)


def _stopped(client: JobSubmissionClient, job: str, address: str) -> dict[str, Any]:
    return {"job": job, "status": jobs.stop(client, job, address).status.value.lower()}


# --- what travels


def prepared(flow: str, config: RunConfig) -> Job:
    """The same job for the same configuration, however it was written down."""
    text = yaml.safe_dump(absolute({**given(config), "ray_address": "auto"}), allow_unicode=True)
    command = entrypoint(flow)
    digest = hashlib.sha256(f"{command} {text}".encode()).hexdigest()
    return Job(f"prefsieve-{flow}-{digest[:16]}", command, text)


def given(config: RunConfig) -> dict[str, Any]:
    """What was said in a configuration, without its sections' defaults."""
    fields = type(config).model_fields
    defaults = {
        name for name, field in fields.items() if getattr(config, name) == field.get_default(call_default_factory=True)
    }
    return config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=defaults)


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every local path made absolute: a job has another working folder."""
    values = copy.deepcopy(values)
    if store := values.get("store") or os.environ.get("PREFSIEVE_STORE"):
        values["store"] = _absolute(without_secrets(store, "store: "), always=True)
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


def _attempt(client: JobSubmissionClient, wanted: Job, address: str) -> tuple[str, bool]:
    """The attempt that goes on, or is the next; and whether it goes on."""
    with jobs.explained(address):
        known = jobs.attempts(client, wanted.name)
    for info in known.values():
        if not jobs.has_ended(info):
            print(f"job {info.submission_id} is already {info.status.value.lower()}: following it", file=sys.stderr)
            return str(info.submission_id), True
    return f"{wanted.name}-{max(known) + 1}" if known else wanted.name, False


def _start(client: JobSubmissionClient, wanted: Job, job: str, address: str, run: str = "") -> None:
    """Submit it, unless somebody else is faster: theirs has the same name, and does the same.

    run: of whom the job is to say that it is. Raises Unreachable when the job may be there, or come yet.
    """
    import requests

    with tempfile.TemporaryDirectory() as folder, jobs.explained(address):
        Path(folder, "config.yaml").write_text(wanted.config, encoding="utf-8")
        env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(_LEAVE)}
        try:
            client.submit_job(
                entrypoint=wanted.command,
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": env_vars, **code()},
                metadata={"run": run} if run else None,
            )
        except (requests.RequestException, RuntimeError) as error:
            if jobs.is_known(client, job, address):
                return
            if isinstance(error, RuntimeError):
                raise
            what = (
                "where it begins within a minute, it is stopped; run the same command again after that"
                if run
                else "run the same command again, which follows the job where it is there by then"
            )
            raise Unreachable(f"job {job}: {address} did not answer when it was submitted; {what}") from error


def _result(info: JobDetails, log: str) -> dict[str, Any]:
    job, status = str(info.submission_id), info.status.value
    if status == "SUCCEEDED":
        return _report(job, log)
    said = "\n  ".join(log.rstrip().splitlines()[-_SHOWN:]) or info.message
    if info.driver_exit_code == 2:
        raise ConfigError(f"job {job} refuses its configuration:\n  {said}")
    raise RunError(f"job {job} {status.lower()}; the end of its log:\n  {said}")


def _report(job: str, log: str) -> dict[str, Any]:
    """The last JSON document of the log."""
    for line in reversed(log.splitlines()):
        if line.startswith(jobs.REPORT):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    raise RunError(f"job {job} succeeded, but its log holds no report; the store has what it made")
