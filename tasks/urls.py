"""URLs hold no secrets: they are printed, kept in the store, and stand in the parameters of runs and jobs."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import AfterValidator

from tasks.errors import ConfigError

# What stands before a host's @. A key of AWS may hold slashes: behind a colon all up to an @ counts, but for a port.
_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#]*@|(?!arn:|\[)[^\s/?#:]*:(?!\d*(?:[/?#]|$))\S*@)")
_USER_OF_ADDRESS = re.compile(r"^(?!\S*://)\S*(?::\S*@|@(?=\S+:\d))")  # me:word@HOST, me@HOST:PORT
_URL_WITH_QUERY = re.compile(r"(?<=://)([^\s?#'\"]*)[?#][^\s'\"]*")
_QUERY = re.compile(r"[?&;#]([^\s?&;#/=]+)=")
_SECRET_IN_QUERY = re.compile(
    r"(sig|signature|token|secret|password|passwd|pwd|credential|key|keyid|auth|authorization|sas|jwt)$", re.I
)
_SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_?key|secret_?key|password|passwd|secret|credentials?|authorization)"
    r"|((hf|hub|api|auth|access|bearer|session)_?)?token",  # eos_token and the like are none
    re.I,
)


def holds_secret(url: str) -> bool:
    """Whether it has a user or password before its host, or a signature, token or key in its query."""
    if "://" not in url:
        return False
    # Cut behind the last @: past it the search would go on for each of a million "://".
    before = (part for part, at, _ in (word.rpartition("@") for word in url.split()) if at)
    named = (unquote(name) for name in _QUERY.findall(url))
    return any(_USERINFO.search(f"{part}@") for part in before) or any(map(_SECRET_IN_QUERY.search, named))


def without_secrets(url: str, where: str = "") -> str:
    """The URL, or whatever else stands in its place; ConfigError, which does not show it, when it holds a secret."""
    if holds_secret(url):
        raise ConfigError(
            f"{where}the URL holds a password, key or token, which would be shown and kept; remove it: s3:// takes "
            "keys from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the hub from HF_TOKEN, https:// from FSSPEC_HTTPS, "
            'such as {"headers": {"Authorization": "Bearer ..."}}'
        )
    return url


Place = Annotated[str, AfterValidator(without_secrets)]


def shown(text: str) -> str:
    """A text with its URLs, or an address, as they may be printed: without user, password and query."""
    return _URL_WITH_QUERY.sub(r"\1", _USER_OF_ADDRESS.sub("", _USERINFO.sub("", text)))


def secret_setting(values: Any) -> str:
    """Name of the first setting that looks like a secret, at any depth; empty when there is none."""
    if isinstance(values, list):
        return next(filter(None, map(secret_setting, values)), "")
    if not isinstance(values, dict):
        return ""
    for name, value in values.items():
        if isinstance(value, str):
            if value and (_SECRET_NAME.fullmatch(str(name).replace("-", "_")) or holds_secret(value)):
                return str(name)
        elif found := secret_setting(value):
            return found
    return ""
