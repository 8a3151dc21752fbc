"""What a deployments file says: a `prefect.yaml`, in Prefect's own words but for a few.

Work pools may be declared under `definitions`, an automation names its notification block, and a deployment's
`parameters` may be the name of a configuration file.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from flows.automations import Automation
from flows.cli import FLOWS, describe_errors, parse
from flows.values import load_values, read_yaml, set_value
from tasks.config import RunConfig
from tasks.errors import ConfigError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WorkPool(_Strict):
    """Where runs of a deployment wait for a worker."""

    name: str = Field(min_length=1)
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class NewPool(_Strict):
    """What a work pool is made as, when it is missing."""

    name: str = Field(min_length=1)
    type: Literal["process", "kubernetes"]
    base_job_template: Path | None = None  # a file, relative to this one; empty takes that of a process
    job_variables: dict[str, Any] = {}  # of all deployments that are registered in it

    @model_validator(mode="after")
    def _says_what_a_job_is(self) -> NewPool:
        if self.type == "kubernetes" and not self.base_job_template:
            raise ValueError(f"work pool {self.name!r}: kubernetes needs a base_job_template")
        return self


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
    entrypoint: str  # a module: never a path of the deploying machine
    work_pool: WorkPool
    description: str | None = None
    tags: list[str] = []
    schedules: list[Times] = []
    triggers: list[dict[str, Any]] = []  # events that start a run
    concurrency_limit: int | dict[str, Any] | None = None
    enforce_parameter_schema: bool = True
    parameters: dict[str, Any] = {}  # or the name of a configuration file that has them, relative to this one

    @field_validator("entrypoint")
    @classmethod
    def _of_a_flow(cls, value: str) -> str:
        if value not in (there := [f"flows.{flow}.{flow}" for flow in FLOWS]):
            raise ValueError(f"there is no such flow; give one of {', '.join(there)}")
        return value

    @field_validator("parameters", mode="before")
    @classmethod
    def _of_a_file(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return load_values(Path(info.context or "", value), [], "")
        except ConfigError as error:
            raise ValueError(f"deployment {info.data.get('name')!r}: {error}") from error

    @property
    def flow(self) -> str:
        return self.entrypoint.rsplit(".", 1)[-1]

    def starts(self) -> list[str]:
        """When runs begin by themselves, in words."""
        events = (event for trigger in self.triggers for event in trigger.get("expect", ()))
        return [*map(str, self.schedules), *(f"on {event}" for event in events)]


class _Definitions(BaseModel):
    """A place for YAML anchors, and for work pools, which `prefect deploy` has no word for."""

    model_config = ConfigDict(extra="allow")

    work_pools: list[NewPool] = []


class DeploymentsFile(_Strict):
    deployments: list[Deployment] = Field(min_length=1)
    name: str = ""
    prefect_version: str = Field("", alias="prefect-version")
    definitions: _Definitions = Field(default_factory=lambda: _Definitions())
    automations: list[Automation] = []
    build: list[Any] | None = Field(None, max_length=0)  # steps are `prefect deploy`'s; here the code is installed
    push: list[Any] | None = Field(None, max_length=0)
    pull: list[Any] | None = Field(None, max_length=0)


def read_file(file: Path, changes: Sequence[str] = ()) -> DeploymentsFile:
    """The file. Its parameters and those of its schedules have passed the flows' own checks. What a trigger fills in is
    known once there is an event: of that, the names have."""
    raw = read_yaml(file)
    try:
        content = DeploymentsFile.model_validate(raw, context=file.parent)
    except ValidationError as error:
        raise ConfigError(f"{file}: {describe_errors(error.errors())}") from error
    for deployment, entry in zip(content.deployments, raw["deployments"], strict=True):
        given = entry.get("parameters")
        source = f" ({file.parent / given})" if isinstance(given, str) else ""
        _check(deployment, changes, f"{file}: parameters of deployment {deployment.name!r}{source}")
    return content


def _check(deployment: Deployment, changes: Sequence[str], where: str) -> None:
    """Apply the changes, and check what runs will get. Without parameters the form starts empty, for somebody to fill
    in, so that changes alone need not be whole."""
    whole = bool(deployment.parameters)
    for change in changes:
        set_value(deployment.parameters, change)
    if whole:
        deployment.parameters = _arguments(parse(deployment.flow, deployment.parameters, Path(where)))
    else:
        _check_part(deployment.flow, deployment.parameters, Path(where))
    for times in deployment.schedules:
        values = {**deployment.parameters, **times.parameters}
        found = _arguments(parse(deployment.flow, values, Path(f"{where}, schedule {times.slug!r}")))
        own = times.parameters.keys()
        times.parameters = {name: value for name, value in found.items() if {name, name.rstrip("_")} & own}
    fields = FLOWS[deployment.flow].model_fields
    for trigger in deployment.triggers:
        given = trigger.get("parameters")
        for name in given if isinstance(given, dict) else ():
            if name not in fields:
                which = f"trigger {trigger.get('name', '')!r}"
                raise ConfigError(f"{where}, {which}: {name}: no such field; there are: {', '.join(fields)}")


def _check_part(flow: str, values: dict[str, Any], path: Path) -> None:
    """Like parse, but fields may be missing."""
    try:
        parse(flow, values, path)
    except ConfigError as error:
        found = error.__cause__
        if not isinstance(found, ValidationError):
            raise
        wrong = [each for each in found.errors() if each["loc"] and each["type"] != "missing"]
        if wrong:
            raise ConfigError(f"{path}: {describe_errors(wrong)}") from error


def _arguments(config: RunConfig) -> dict[str, Any]:
    """What was set, as the flow is called and its form has it: `reward_scale: auto` is 0 there, `import` is no name."""
    values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in values.items()}
