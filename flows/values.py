"""Configuration files: YAML as plain values, and nothing else that YAML can express.

What the models of tasks/config.py are given is JSON's kind of data: no aliases that unfold without end, no key that
stands twice, no dates or bytes, no number that a database or a browser could not hold.
"""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import ConfigError

_LARGEST_FILE = 4 * 2**20  # bytes
_MOST_VALUES = 100_000  # counted as they unfold: an alias stands for all that it names
_DEEPEST = 50
_LARGEST_NUMBER = 2**63 - 1
_SHOWN = 200  # characters of a value in a message
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def load_values(path: Path, changes: list[str], store: str) -> dict[str, Any]:
    """The YAML file's values with --set and --store applied."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping with sections such as `ingest:`")
    for change in changes:
        set_value(values, change)
    _check(values, str(path))
    return {**values, "store": store} if store else values


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. ConfigError when it cannot be read, or holds what no configuration does."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if len(raw) > _LARGEST_FILE:
        raise ConfigError(f"{path}: is larger than {_LARGEST_FILE >> 20} MiB; this is no configuration, check the path")
    try:
        values = _parsed(raw.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    _check(values, str(path))
    return values


class _Loader(yaml.SafeLoader):
    """Of a key that stands twice PyYAML takes the last one, without a word. Merged mappings (`<<`) it writes out with
    all that they repeat, and numbers of base 60 take it minutes."""

    merged = 0  # keys, as they unfold

    def flatten_mapping(self, node: Any) -> None:
        own: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in own:
                raise self._wrong(f"the key {shortened(key.value)} stands twice", key)
            if isinstance(key, yaml.ScalarNode):
                own.add(key.value)
            if key.tag == "tag:yaml.org,2002:merge":
                self._count(value.value if isinstance(value, yaml.SequenceNode) else [value])
        super().flatten_mapping(node)
        # As in a dict the last one counts. Keys that are no scalars are told apart: they are refused anyway.
        last = {
            (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): (key, at) for key, at in node.value
        }
        node.value = list(last.values())

    def _count(self, merged: list[Any]) -> None:
        for node in merged:
            if isinstance(node, yaml.MappingNode):  # else it is refused
                self.flatten_mapping(node)
                self.merged += 1 + len(node.value)
                if self.merged > _MOST_VALUES:
                    raise self._wrong(f"more than {_MOST_VALUES:,} values, merges unfolded; use fewer", node)

    def number(self, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode) and ":" in node.value:
            raise self._wrong(f"{shortened(node.value)} is a number of base 60; put it in quotes to have a text", node)
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)

    @staticmethod
    def _wrong(told: str, node: Any) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, told, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def _parsed(text: str) -> Any:
    """ValueError, in one line, for whatever is wrong with the text."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # of a date or a number that is none, PyYAML lets Python's own errors through
        raise ValueError(" ".join(str(error).split())[:500] or type(error).__name__) from error


def _check(values: Any, where: str) -> None:
    """ConfigError for what is no JSON: it would end in a traceback, or in no end, somewhere on its way."""
    unfolded: dict[int, int] = {}  # how many values a list or mapping stands for
    above: list[int] = []

    def count(value: Any, field: str) -> int:
        if not isinstance(value, list | dict):
            _check_scalar(value, f"{where}: {field}")
            return 1
        if id(value) in unfolded:
            return unfolded[id(value)]
        if id(value) in above:
            raise ConfigError(f"{where}: {field}: an alias stands inside of what it names; write the values out")
        if len(above) == _DEEPEST:
            raise ConfigError(f"{where}: {field[:80]} ...: nested deeper than {_DEEPEST} levels; check the indentation")
        above.append(id(value))
        total = 1
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                raise ConfigError(f"{where}: {field}: the key {shortened(key)} is no text; put it in quotes")
            _check_scalar(key, f"{where}: a key of {field}")
            total += count(inner, f"{field}.{_name(key)}" if field else _name(key))
            if total > _MOST_VALUES:
                raise ConfigError(f"{where}: {field}: more than {_MOST_VALUES:,} values, aliases unfolded; use fewer")
        above.pop()
        unfolded[id(value)] = total
        return total

    count(values, "")


def _check_scalar(value: Any, where: str) -> None:
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(f"{where}: {shortened(value)} holds NUL, or half of a character; remove it")
    elif isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise ConfigError(f"{where}: {shortened(value)}; it must fit into 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is no finite number; give one, or remove the field")
    elif value is not None and not isinstance(value, int | float):
        raise ConfigError(
            f"{where}: {shortened(value)} is a {type(value).__name__}; put it in quotes to have it as text"
        )


def set_value(values: dict[str, Any], change: str) -> None:
    """Apply one --set. ConfigError when there is no such place."""
    field, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {shortened(change)}: write field=value, for example --set generate.samples=16")
    *parents, last = field.split(".")
    target: Any = values
    try:
        value = _parsed(text)
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
        target[int(last) if isinstance(target, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {shortened(field)}: there is no such place in the configuration") from error


def _name(key: Any) -> str:
    return str(key)[:64]


def shortened(value: Any) -> str:
    """A value for a message, whatever its length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return _REPR.repr(value)[:_SHOWN]
