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


_DOWN = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETRESET}
_LATER = {408, 409, 429}  # HTTP status: slow, another writer is at it, too many; as are all from 500 on
_LIBRARIES = {"aiohttp", "botocore", "httpcore", "httpx", "requests", "urllib3"}
_THEIRS = {  # what these call their faults of the network; others are of credentials and arguments
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "MaxRetryError",
    "NetworkError",
    "ProtocolError",
    "Timeout",
    "TimeoutException",
    "TransportError",
}


def is_network_fault(error: BaseException | None) -> bool:
    """Whether trying again may help: a server that cannot be reached, or that says it cannot answer now.

    A full disk and a missing file are not. The libraries' errors are told by name: none of them is imported here.
    """
    if error is None or isinstance(error, ConfigError):
        return False
    status = _status(error)
    if status is not None:
        return status in _LATER or status >= 500
    if isinstance(error, Unreachable | ConnectionError | TimeoutError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno in _DOWN:
        return True
    kinds = type(error).__mro__
    theirs = any(kind.__name__ in _THEIRS and kind.__module__.split(".")[0] in _LIBRARIES for kind in kinds)
    return theirs or is_network_fault(error.__cause__)


def _status(error: BaseException) -> int | None:
    """HTTP status of what a server answered: in botocore, in requests and httpx, in aiohttp."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(answer, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None
