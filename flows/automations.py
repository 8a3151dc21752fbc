"""Automations of a deployments file: what the Prefect server does by itself when something happens.

In Prefect's own words, but for one: a `send-notification` action names its block (`block: NAME`), whatever the block's
type, where Prefect wants an id. An automation whose block is not on the server is left out, and deploy says so: who has
nowhere to send notifications to can still deploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tasks.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

_UNKNOWN = str(UUID(int=0))


class Automation(BaseModel):
    """One entry of `automations:`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    enabled: bool = True  # left out, it stays as the UI has it
    trigger: dict[str, Any]
    actions: list[dict[str, Any]] = Field(min_length=1)

    @field_validator("actions")
    @classmethod
    def _blocks_have_names(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not all(isinstance(action.get("block", ""), str) for action in value):
            raise ValueError("`block` is the name of a notification block")
        return value

    @property
    def blocks(self) -> set[str]:
        """Names of the notification blocks that its actions send to."""
        return {action["block"] for action in self.actions if "block" in action}


def register(client: SyncPrefectClient, automation: Automation) -> str:
    """Create it on the server, or bring what has its name there up to date. Returns what was done, in words."""
    found = {name: _notification_block(client, name) for name in sorted(automation.blocks)}
    if missing := [name for name, block in found.items() if block is None]:
        return (
            f"left out, for there is no block {missing[0]!r}: make one under Blocks in the UI (Slack, Teams, e-mail, a "
            "webhook), and deploy again"
        )
    core = checked(automation, found)
    known = client.read_automations_by_name(automation.name)
    if known:
        values = core.model_dump(mode="json", exclude={"owner_resource"})  # Prefect would leave defaults out
        if "enabled" not in automation.model_fields_set:  # somebody may have switched it off in the UI
            values["enabled"] = known[0].enabled
        core = type(core).model_validate(values)
        client.update_automation(known[0].id, core)
        return "was there, brought up to date" if core.enabled else "was there, brought up to date, is switched off"
    client.create_automation(core)
    return "created"


def checked(automation: Automation, blocks: Mapping[str, str | None]) -> AutomationCore:
    """As Prefect has it; ConfigError where it would not. blocks: ids by name, of those that are known."""
    from prefect.events.schemas.automations import AutomationCore

    actions = [
        {**action, "block_document_id": blocks.get(action["block"], _UNKNOWN)} if "block" in action else action
        for action in automation.actions
    ]
    about = automation.model_dump(exclude={"actions"})
    try:
        return AutomationCore.model_validate({**about, "actions": actions})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"automation {automation.name!r}: {place}: {first['msg']}") from error


def _notification_block(client: SyncPrefectClient, name: str) -> str | None:
    """The id of the block of that name which can send notifications."""
    wanted = {
        "block_documents": {"name": {"any_": [name]}},
        "block_schemas": {"block_capabilities": {"all_": ["notify"]}},
        "include_secrets": False,
    }
    answer = client.request("POST", "/block_documents/filter", json=wanted)
    answer.raise_for_status()
    return next((str(block["id"]) for block in answer.json()), None)
