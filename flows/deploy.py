"""deploy: the work pool and the deployments of one file, registered on the configured Prefect server.

The file is a `prefect.yaml`. `prefect deploy` 3.7.7 would record the deployer's folder, or stop at a module entrypoint
without a pull step; here flows are registered by module (`flows.curate.curate`) and nothing else, so a worker runs the
code that is installed beside it. The work pool is made when it is missing, all is checked before the server is touched,
and doing it again changes nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flows.cli import describe_errors, parse
from flows.values import read_yaml
from tasks.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.deployments.runner import RunnerDeployment


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WorkPool(_Strict):
    """Where runs of a deployment wait for a worker."""

    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class Times(_Strict):
    """When runs start by themselves; the slug tells the server which schedule this is when it is changed."""

    slug: str
    cron: str | None = None
    interval: timedelta | None = None  # a number is seconds
    timezone: str = "UTC"
    active: bool = True
    parameters: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of_two(self) -> Times:
        if (self.cron is None) == (self.interval is None):
            raise ValueError(f"schedule {self.slug!r}: give either `cron` or `interval`")
        return self

    def __str__(self) -> str:
        times = f"at {self.cron} {self.timezone}" if self.cron else f"every {self.interval}"
        return times if self.active else f"{times} (paused)"


class Deployment(_Strict):
    """One entry of `deployments:`, in Prefect's own words."""

    name: str
    entrypoint: str = Field(pattern=r"^flows\.\w+\.\w+$")  # a module: never a path of the deploying machine
    work_pool: WorkPool
    description: str | None = None
    tags: list[str] = []
    schedules: list[Times] = []
    concurrency_limit: int | dict[str, Any] | None = None
    enforce_parameter_schema: bool = True
    parameters: dict[str, Any] = {}


class _File(_Strict):
    deployments: list[Deployment] = Field(min_length=1)
    name: str = ""
    prefect_version: str = Field("", alias="prefect-version")
    definitions: dict[str, Any] = {}  # a place for YAML anchors
    build: list[Any] | None = Field(None, max_length=0)  # steps are `prefect deploy`'s; here the code is installed
    push: list[Any] | None = Field(None, max_length=0)
    pull: list[Any] | None = Field(None, max_length=0)


def deploy_all(file: Path) -> None:
    """Register every deployment of the file, and make the work pools that are missing.

    Raises ConfigError for a wrong file or wrong parameters, and when no Prefect server is configured or answers.
    """
    deployments = read_deployments(file)
    pools = list(dict.fromkeys(deployment.work_pool.name for deployment in deployments))
    with _server() as (client, url):
        registrations = [_registration(deployment) for deployment in deployments]
        print(f"Prefect server {url}")
        for pool in pools:
            print(f"  work pool   {pool} ({_ensure_pool(client, pool)})")
        for deployment, registration in zip(deployments, registrations, strict=True):
            _apply(registration)
            print(", ".join([f"  deployment  {registration.full_name}", *map(str, deployment.schedules)]))
    for pool in pools:
        print(f"Start a worker where the runs should happen:  prefect worker start --pool {pool}")


def read_deployments(file: Path) -> list[Deployment]:
    """The file's deployments; their parameters have passed the flow's own checks, so no schedule starts a wrong run."""
    content = read_yaml(file)
    try:
        deployments = _File.model_validate(content).deployments
    except ValidationError as error:
        raise ConfigError(f"{file}: {describe_errors(error)}") from error
    for deployment in deployments:
        if deployment.parameters or deployment.schedules:
            where = Path(f"{file}: parameters of deployment {deployment.name!r}")
            parse(deployment.entrypoint.rsplit(".", 1)[-1], deployment.parameters, where)
    return deployments


@contextlib.contextmanager
def _server() -> Iterator[tuple[SyncPrefectClient, str]]:
    """A client of the configured server; whatever is wrong with the connection comes out as a ConfigError."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "no Prefect server is configured; set PREFECT_API_URL, for example to http://127.0.0.1:4200/api "
            "(`prefect server start` starts one there)"
        )
    try:
        with get_client(sync_client=True) as client:
            client.api_version()  # unlike /health, not answered by Prefect's UI, nor without a password
            yield client, url
    except httpx.TransportError as error:
        raise ConfigError(
            f"PREFECT_API_URL: no Prefect server answers at {url} ({error}); start it, or correct the URL"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"PREFECT_API_URL: {url} is not a Prefect API; the URL ends in /api") from error
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        advice = "check PREFECT_API_AUTH_STRING or PREFECT_API_KEY" if status in (401, 403) else "the URL ends in /api"
        raise ConfigError(f"PREFECT_API_URL: {url} answers with status {status}; {advice}") from error


def _ensure_pool(client: SyncPrefectClient, name: str) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        return f"{client.read_work_pool(name).type}, was there"
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))
        return f"{ProcessWorker.type}, created"


def _registration(deployment: Deployment) -> RunnerDeployment:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import EntrypointType
    from prefect.flows import load_flow_from_entrypoint
    from prefect.schedules import Schedule

    limit = deployment.concurrency_limit
    try:
        registration = load_flow_from_entrypoint(deployment.entrypoint).to_deployment(
            name=deployment.name,
            description=deployment.description,
            tags=deployment.tags,
            schedules=[Schedule(**times.model_dump(exclude_none=True)) for times in deployment.schedules],
            concurrency_limit=ConcurrencyLimitConfig(**limit) if isinstance(limit, dict) else limit,
            parameters=deployment.parameters,
            enforce_parameter_schema=deployment.enforce_parameter_schema,
            work_pool_name=deployment.work_pool.name,
            work_queue_name=deployment.work_pool.work_queue_name,
            job_variables=deployment.work_pool.job_variables,
            entrypoint_type=EntrypointType.MODULE_PATH,
            version=_version(),
        )
    except ValueError as error:
        raise ConfigError(f"deployment {deployment.name!r}: {error}") from error
    assert not isinstance(registration, Coroutine)  # it would be one inside an event loop only
    return registration


def _apply(registration: RunnerDeployment) -> None:
    from prefect.client.schemas.objects import VersionInfo
    from prefect.deployments.runner import DeploymentApplyError

    try:
        # Told the version, Prefect does not go looking for a git remote to record.
        registration.apply(version_info=VersionInfo(type="prefect:simple", version=_version()))
    except DeploymentApplyError as error:
        raise ConfigError(f"deployment {registration.name!r} is refused by the server: {error}") from error


def _version() -> str:
    try:
        return version("prefsieve")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"
