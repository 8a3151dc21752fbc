"""deploy: the work pool, the deployments and the automations of one file, registered on the configured Prefect server.

The file is a `prefect.yaml`. `prefect deploy` 3.7.7 would record the deployer's folder, or stop at a module entrypoint
without a pull step; here flows are registered by module (`flows.curate.curate`) and nothing else, so a worker runs the
code that is installed beside it. Work pools are made when they are missing, schedules that the file has no more are
removed, all is checked before the server is touched, and doing it again changes nothing: automations that somebody
switched off in the UI stay off, unless the file says `enabled`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import TypeAdapter, ValidationError

from flows.automations import checked, register
from flows.cli import FLOWS, describe_errors
from flows.deployments import Deployment, NewPool, WorkPool, read_file
from flows.form import folded, form
from tasks.errors import ConfigError
from tasks.urls import shown

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.deployments.runner import RunnerDeployment


_MOST_TOLD = 1000  # characters of an answer of the server
# Seconds between two; the automation prefsieve-run-vanished waits for them.
_SIGNS_OF_LIFE = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}


def deploy_all(file: Path, pool: str = "", changes: Sequence[str] = (), dry_run: bool = False) -> None:
    """Register every deployment and automation of the file, and make the work pools that are missing.

    pool: where all deployments are registered, in place of the pools that the file says.
    changes: FIELD=VALUE, for the parameters of all of them, such as the Ray cluster that their runs are handed to.
    dry_run: only check the file, without a server, and say what would be registered.
    Raises ConfigError for a wrong file or wrong parameters, for a pool that nobody knows, and when no Prefect server is
    configured or answers.
    """
    content = read_file(file, changes)
    declared = {one.name: one for one in content.definitions.work_pools}
    own = [deployment.work_pool.name for deployment in content.deployments]
    known = {name: NewPool(name=name, type="process") for name in own} | declared
    deployments = [_in_pool(deployment, pool, declared) for deployment in content.deployments]
    wanted = [pool] if pool else own
    pools = {name: _new_pool(known[name], file) if name in known else None for name in dict.fromkeys(wanted)}
    registrations = [_registration(deployment) for deployment in deployments]
    for automation in content.automations:
        checked(automation, {})
    if dry_run:
        print(f"{file}: nothing is registered; it would be")
        print(*(f"  work pool   {name}" for name in pools), sep="\n")
        print(*map(_line, deployments), sep="\n")
        print(*(f"  automation  {automation.name}\n" for automation in content.automations), sep="", end="")
        return
    with _server() as (client, url):
        print(f"Prefect server {url}")
        types: dict[str, str] = {}
        for name, new in pools.items():
            with _refusal_of(f"work pool {name!r}"):
                types[name], was = _ensure_pool(client, name, new, known)
            print(f"  work pool   {name} ({types[name]}, {was})")
        for deployment, registration in zip(deployments, registrations, strict=True):
            registration.job_variables = _job_variables(deployment.work_pool, types[deployment.work_pool.name])
            with _refusal_of(f"deployment {deployment.name!r}"):
                changed = _apply(client, registration)
            print(_line(deployment))
            for line in changed:
                print(f"  {line}")
        for automation in content.automations:
            with _refusal_of(f"automation {automation.name!r}"):
                print(f"  automation  {automation.name} ({register(client, automation)})")
    for name in pools:
        print(f"Start a worker where the runs should happen:  prefect worker start --pool {name}")


def _line(deployment: Deployment) -> str:
    return ", ".join([f"  deployment  {deployment.flow}/{deployment.name}", *deployment.starts()])


def _in_pool(deployment: Deployment, pool: str, declared: Mapping[str, NewPool]) -> Deployment:
    """Registered in that pool, or its own where that is empty, with the job variables of all that are there."""
    place = deployment.work_pool if pool in ("", deployment.work_pool.name) else WorkPool(name=pool)
    shared = declared[place.name].job_variables if place.name in declared else {}
    place = place.model_copy(update={"job_variables": {**shared, **place.job_variables}})
    return deployment.model_copy(update={"work_pool": place})


def _new_pool(pool: NewPool, file: Path) -> WorkPoolCreate:
    """What it is made as. ConfigError for a template that cannot be read."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    if pool.base_job_template:
        path = file.parent / pool.base_job_template
        where = f"{file}: base_job_template of work pool {pool.name!r}: {path}"
        try:
            template = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{where}: cannot be read: {error.strerror}; check the path, which is relative to the deployments file"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: is not JSON: {error}; correct the file") from error
        if not isinstance(template, dict):
            raise ConfigError(f"{where}: holds no JSON object; correct the file")
    return WorkPoolCreate(name=pool.name, type=pool.type, base_job_template=template)


@contextlib.contextmanager
def _server() -> Iterator[tuple[SyncPrefectClient, str]]:
    """A client of the configured server, which has answered; ConfigError where it does not."""
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "no Prefect server is configured; set PREFECT_API_URL, for example to http://127.0.0.1:4200/api "
            "(`prefect server start` starts one there)"
        )
    with get_client(sync_client=True) as client:
        _greet(client, shown(url))
        yield client, shown(url)


def _greet(client: SyncPrefectClient, url: str) -> None:
    """The first question to the server: what goes wrong here is the address, or the password."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        client.api_version()  # unlike /health, not answered by Prefect's UI, nor without a password
    except httpx.TransportError as error:
        raise ConfigError(
            f"PREFECT_API_URL: no Prefect server answers at {url} ({shown(str(error))}); start it, or correct the URL"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"PREFECT_API_URL: {url} is not a Prefect API; the URL ends in /api") from error
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        advice = "check PREFECT_API_AUTH_STRING or PREFECT_API_KEY" if status in (401, 403) else "the URL ends in /api"
        raise ConfigError(f"PREFECT_API_URL: {url} answers with status {status}; {advice}") from error


@contextlib.contextmanager
def _refusal_of(what: str) -> Iterator[None]:
    """What the server does not take comes out as a ConfigError, in the server's words."""
    from prefect.deployments.runner import DeploymentApplyError
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except (DeploymentApplyError, PrefectHTTPStatusError) as error:
        answered = error.__cause__ if isinstance(error, DeploymentApplyError) else error
        told = _words_of(answered.response) if isinstance(answered, PrefectHTTPStatusError) else str(error)
        raise ConfigError(f"{what} is refused by the server: {told[:_MOST_TOLD]}") from error


def _words_of(response: httpx.Response) -> str:
    """The detail of Prefect's answer. What was wrong in a request comes as a list, with all of the request in it."""
    try:
        answer = response.json()
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in answer.get("exception_detail", []))
        return str(answer.get("detail") or wrong or answer["exception_message"])
    except (ValueError, LookupError, AttributeError, TypeError):
        return f"status {response.status_code}: {response.text}"


def _ensure_pool(
    client: SyncPrefectClient, name: str, new: WorkPoolCreate | None, known: Iterable[str]
) -> tuple[str, str]:
    """Make the pool when it is missing; its type, and what was done. new: none for one that must be there; known: names
    that the file has."""
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_work_pool(name).type, "was there"
    except ObjectNotFound:
        if not new:
            there = sorted({*known, *(pool.name for pool in client.read_work_pools())})
            raise ConfigError(
                f"--pool {name!r}: there is no such work pool; there are: {', '.join(there)}; correct the name, or "
                "declare it in definitions.work_pools of the deployments file"
            ) from None
        client.create_work_pool(new)
        return new.type, "created"


def _job_variables(pool: WorkPool, type_: str) -> dict[str, Any]:
    """Those of the file, and what it leaves out. Without a folder Prefect would run each process in one that it
    deletes, and the default store with it."""
    where = {"working_dir": "."} if type_ == "process" else {}
    given = {**where, "env": {}, **pool.job_variables}
    if isinstance(given["env"], dict):  # else the server says so
        given["env"] = {**_SIGNS_OF_LIFE, **given["env"]}
    return given


def _registration(deployment: Deployment) -> RunnerDeployment:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import EntrypointType
    from prefect.flows import load_flow_from_entrypoint
    from prefect.schedules import Schedule
    from prefect.utilities.callables import ParameterSchema, parameter_schema

    class Form(ParameterSchema):
        allOf: list[dict[str, Any]] = []

    limit = deployment.concurrency_limit
    model = FLOWS[deployment.flow].__name__
    flow: Any = load_flow_from_entrypoint(deployment.entrypoint)
    drawn = form(parameter_schema(flow).model_dump(), model)
    try:
        schedules = [Schedule(**times.model_dump(exclude_none=True)) for times in deployment.schedules]
        registration = flow.to_deployment(
            name=deployment.name,
            description=deployment.description,
            tags=deployment.tags,
            triggers=_triggers(deployment),
            schedules=[replace(times, parameters=folded(times.parameters, drawn)) for times in schedules],
            concurrency_limit=ConcurrencyLimitConfig(**limit) if isinstance(limit, dict) else limit,
            parameters=folded(deployment.parameters, drawn),
            enforce_parameter_schema=deployment.enforce_parameter_schema,
            work_pool_name=deployment.work_pool.name,
            work_queue_name=deployment.work_pool.work_queue_name,
            entrypoint_type=EntrypointType.MODULE_PATH,
            version=_version(),
        )
    except ValueError as error:
        told = describe_errors(error.errors()) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"deployment {deployment.name!r}: {told}") from error
    assert not isinstance(registration, Coroutine)  # it would be one inside an event loop only
    registration._parameter_openapi_schema = Form.model_validate(drawn)
    return registration


def _triggers(deployment: Deployment) -> list[Any]:
    from prefect.events import DeploymentTriggerTypes

    return TypeAdapter(list[DeploymentTriggerTypes]).validate_python(deployment.triggers)


def _apply(client: SyncPrefectClient, registration: RunnerDeployment) -> list[str]:
    """Register it. Returns lines about what the server had otherwise: triggers that are switched off stay so where the
    file does not say `enabled`, schedules that the file has no more are removed."""
    from prefect.client.schemas.objects import VersionInfo
    from prefect.exceptions import ObjectNotFound

    told = []
    triggers: list[Any] = registration.triggers
    try:
        before = client.read_deployment_by_name(registration.full_name)
    except ObjectNotFound:
        before = None
    if before and triggers:  # Prefect makes their automations anew
        automations = client.read_resource_related_automations(f"prefect.deployment.{before.id}")
        off = {automation.name for automation in automations if not automation.enabled}
        for trigger in triggers:
            if trigger.name in off and "enabled" not in trigger.model_fields_set:
                trigger.enabled = False
                told.append(f"trigger     {trigger.name} was switched off, and stays so")
    # Told the version, Prefect does not go looking for a git remote to record.
    registration.apply(version_info=VersionInfo(type="prefect:simple", version=_version()))
    if before:  # Prefect would keep them, and go on to start runs
        slugs = {times.slug for times in registration.schedules or ()}
        for times in (times for times in before.schedules if times.slug not in slugs):
            with contextlib.suppress(ObjectNotFound):  # where one has no slug, Prefect has replaced all
                client.delete_deployment_schedule(before.id, times.id)
            told.append(f"schedule    {times.slug or times.schedule} removed")
    return told


def _version() -> str:
    try:
        return version("prefsieve")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"
