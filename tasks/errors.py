"""The two ways a run ends badly; the command line turns them into exit status 2 and 1."""

from __future__ import annotations

import errno
import socket


class ConfigError(ValueError):
    """The configuration or an argument is wrong: the message names the field, the value and what to do."""


class RunError(RuntimeError):
    """The run failed for a reason outside the configuration: the message names the stage and what to do."""


class Unreachable(RunError):
    """A server could not be reached: the same may succeed when it is tried again."""


_LIBRARIES = {"aiohttp", "botocore", "httpcore", "httpx", "requests", "urllib3"}
_DOWN = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETRESET}
_BUSY = 429  # HTTP status, as are all from 500 on


def is_network_fault(error: BaseException | None) -> bool:
    """Whether trying again may help: a server that cannot be reached, or that says it cannot answer now.

    A full disk and a missing file are not. The libraries' errors are told by name: none of them is imported here.
    """
    if error is None:
        return False
    answer = getattr(error, "response", None)  # botocore has a dictionary here, requests and httpx an object
    if answer is not None:
        status = getattr(answer, "status_code", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status is not None and (status == _BUSY or status >= 500)
    if isinstance(error, Unreachable | ConnectionError | TimeoutError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno in _DOWN:
        return True
    return type(error).__module__.split(".")[0] in _LIBRARIES or is_network_fault(error.__cause__)
