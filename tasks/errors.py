"""The two ways a run ends badly; the command line turns them into exit status 2 and 1."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration or an argument is wrong: the message names the field, the value and what to do."""


class RunError(RuntimeError):
    """The run failed for a reason outside the configuration: the message names the stage and what to do."""


class Unreachable(RunError):
    """A server could not be reached: the same may succeed when it is tried again."""


def is_network_fault(error: BaseException) -> bool:
    """Whether trying again may help. Not all errors of botocore and aiohttp are OSErrors; neither is imported here."""
    if isinstance(error, Unreachable) or type(error).__module__.split(".")[0] in ("botocore", "aiohttp"):
        return True
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | FileExistsError | PermissionError)
