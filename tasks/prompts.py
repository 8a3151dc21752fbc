"""One row of a source as a prompt, or what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from tasks.records import digest
from tasks.rows import BadRow
from tasks.sections import ColumnsConfig, ImportConfig, IngestConfig

KEPT = 10  # times max_chars: how long the kept columns of a row may be, of which a whole shard is held in memory
LONGEST_LABEL = 1000  # characters; what is longer is a text, in the column that another name was meant for
_ROLES = {"system", "user", "assistant", "tool"}


def to_prompt(row: Any, config: IngestConfig) -> dict[str, Any]:
    """One row of the input as a row of PROMPTS; BadRow says what is wrong with it."""
    if isinstance(row, BadRow):
        raise row
    if config.columns.prompt not in row:
        raise BadRow("no prompt column", f"columns: {', '.join(map(str, row))}")
    try:
        return prompt_row(row[config.columns.prompt], row, config)
    except RecursionError:
        raise BadRow("nested too deeply", "") from None


def prompt_row(prompt: Any, row: dict[str, Any], config: IngestConfig | ImportConfig) -> dict[str, Any]:
    """A prompt (text or messages) and what else its row says of it, as a row of PROMPTS."""
    columns = config.columns
    messages = _messages(prompt)
    size = sum(len(message["content"]) for message in messages)
    if size > config.max_chars:
        raise BadRow("prompt too long", f"{size} characters")
    source = str(row.get(columns.source) or "unknown")
    if len(source) > LONGEST_LABEL:
        raise BadRow("source too long", source)
    check_unicode("".join([*(message["content"] for message in messages), source]))
    return {
        "prompt_id": digest(messages),
        "messages": messages,
        "source": source,
        "fields": _fields(row, columns, KEPT * config.max_chars),
    }


def _messages(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow("no prompt" if value in (None, "", []) else "prompt is neither text nor messages", repr(value))
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("malformed message", repr(message))
        if not isinstance(message.get("role"), str) or message["role"] not in _ROLES:
            raise BadRow("unknown role", repr(message.get("role")))
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages[-1]["content"].strip():
        raise BadRow("empty prompt", "")
    if messages[-1]["role"] == "assistant":
        raise BadRow("last message is the assistant's", messages[-1]["content"])
    return messages


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("not UTF-8", text.encode(errors="replace").decode()) from None
    if "\x00" in text:
        raise BadRow("NUL character", text.replace("\x00", "\\0"))


def _fields(row: dict[str, Any], columns: ColumnsConfig, longest: int) -> str:
    missing = [name for name in columns.keep if name not in row]
    if missing:
        raise BadRow("missing column", ", ".join(missing))
    try:
        text = json.dumps({name: row[name] for name in columns.keep}, allow_nan=False, default=str)
    except (ValueError, RecursionError) as error:
        raise BadRow("kept column is not JSON", str(error)) from None
    if len(text) > longest:
        raise BadRow("kept columns too long", f"{len(text)} characters of JSON; more than {KEPT} times max_chars")
    if "\\ud" in text:  # one half of a pair of these is no character
        check_unicode(json.dumps(json.loads(text), ensure_ascii=False))
    return text
