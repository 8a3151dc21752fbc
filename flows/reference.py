"""The configuration reference, docs/configuration.md, as the models that check a configuration have it.

    python -m flows.reference > docs/configuration.md

Written from their JSON schema, as Prefect's form is: a table for each section, with fields, what they take, defaults
and descriptions. Where a flow's field has no description the flow's docstring has it, also as in the form.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from flows.cli import FLOWS
from tasks.config import RunConfig
from tasks.objectives.settings import SETTINGS

Schema = dict[str, Any]

_HEAD = """# Configuration reference

Written by `python -m flows.reference` from the models that check a configuration: change those, not this file.

A configuration is a YAML file with the fields of one of the four flows. A field that does not exist is refused, and so
is a value that a field does not take. `prefsieve init` writes configurations to start from, with comments; others lie
in [configs](../configs). `prefsieve import` takes one of `curate`, and reads its section [import](#import).

On the command line, `--set generate.samples=16` changes a field, and `--set score.scorers.0.workers=4` one of the first
scorer. As defaults, `empty` is no value, `none` a section that is left out.

"""
_OBJECTIVES = """## Objectives

What `train.objective` names, and what each can be told: `beta` stands beside it, all else in `train.options`. What they
do is in [training.md](training.md#objectives).

"""
_LIKE = {  # texts of a certain form
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$": "name",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@[0-9a-f]{8,64})?$": "name or name@version",
    r"^[a-z][a-z0-9_]{0,63}$": "snake_case name",
    r"^[A-Za-z]{1,8}$": "letters, at most 8",
}
_FLOWS = {model.__name__: flow for flow, model in FLOWS.items()}
_HEADER = ["field", "takes", "default", "what"]


def reference() -> str:
    """The whole document."""
    schemas = _schemas()
    sections = [name for name in schemas if name not in _FLOWS]
    parts = [_HEAD, "## Flows\n\n"]
    parts += [_section(name, schemas, _descriptions(flow)) for name, flow in _FLOWS.items()]
    parts += ["## Sections\n\n", *(_section(name, schemas, {}) for name in sections), _OBJECTIVES, _objectives()]
    return "".join(parts)


def _schemas() -> dict[str, Schema]:
    """Of every section, by its name: each flow, and what stands in it, in order."""
    schemas = models_json_schema([(model, "validation") for model in FLOWS.values()])[1]["$defs"]
    steps = schemas["SubsetConfig"]["properties"]["steps"]  # the one section that has its schema inside
    schemas["Step"] = steps["items"]
    steps["items"] = {"$ref": "#/$defs/Step"}
    found: dict[str, Schema] = {}

    def add(name: str) -> None:
        if name not in found:
            found[name] = schemas[name]
            for inner in _parts(schemas[name]):
                add(inner)

    for name in _FLOWS:
        add(name)
    return found


def _parts(schema: Any) -> list[str]:
    """Names of the sections that a schema refers to."""
    if isinstance(schema, list):
        return [name for inner in schema for name in _parts(inner)]
    if not isinstance(schema, dict):
        return []
    if "$ref" in schema:
        return [schema["$ref"].rsplit("/", 1)[-1]]
    return [name for inner in schema.values() for name in _parts(inner)]


def _section(name: str, schemas: dict[str, Schema], told: dict[str, str]) -> str:
    """told: descriptions of fields that have none."""
    schema = schemas[name]
    required = schema.get("required", [])
    fields = schema["properties"]
    last = RunConfig.model_fields if name in _FLOWS else fields.keys() - set(required)
    names = sorted(fields, key=lambda field: field in last)
    rows = [_row(field, fields[field], field in required, told.get(field, "")) for field in names]
    about = [schema.get("description", "").replace("\n", " "), _places(name, schemas)]
    words = " ".join(filter(None, about))
    return f"### {_title(name)}\n\n{words}\n\n{_table(_HEADER, rows)}\n"


def _places(name: str, schemas: dict[str, Schema]) -> str:
    """Where a section stands."""
    places: dict[str, list[str]] = {}
    for parent, schema in schemas.items():
        for field, value in schema["properties"].items():
            if name in _parts(value):
                places.setdefault(field, []).append(_link(parent))
    told = [f"`{field}` in {_listed(parents, 'and')}" for field, parents in places.items()]
    return f"Stands as {'; as '.join(told)}." if told else ""


def _row(field: str, schema: Schema, required: bool, told: str) -> list[str]:
    default = "required" if required else _default(schema)
    return [f"`{field}`", _takes(schema), default, schema.get("description") or told]


def _takes(schema: Schema) -> str:
    """What a field takes, as a person would say it."""
    if "$ref" in schema:
        return _link(schema["$ref"].rsplit("/", 1)[-1])
    if "anyOf" in schema:
        return " or ".join(_takes(inner) for inner in schema["anyOf"] if inner.get("type") != "null")
    if "enum" in schema:
        return f"one of {', '.join(f'`{value}`' for value in schema['enum'])}"
    if schema["type"] == "array":
        return _list(schema)
    if schema["type"] == "object":
        values = schema["additionalProperties"]
        return f"mapping of text to {_takes(values)}" if isinstance(values, dict) else "mapping"
    if schema["type"] == "string":
        return _LIKE[schema["pattern"]] if "pattern" in schema else "text"
    if schema["type"] == "boolean":
        return "true or false"
    return _number(schema)


def _list(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {', '.join(map(_takes, schema['prefixItems']))}"
    least, most = schema.get("minItems"), schema.get("maxItems")
    length = f", {least} to {most}" if most else f", at least {least}" if least else ""
    return f"list of {_takes(schema['items'])}{length}"


def _number(schema: Schema) -> str:
    whole = schema["type"] == "integer"
    bounds = {key: schema[key] for key in _BOUNDS if key in schema}
    if whole and "exclusiveMaximum" in bounds:
        bounds["maximum"] = bounds.pop("exclusiveMaximum") - 1
    if whole and "exclusiveMinimum" in bounds:
        bounds["minimum"] = bounds.pop("exclusiveMinimum") + 1
    if bounds.keys() == {"minimum", "maximum"}:
        words = f" from {_digits(bounds['minimum'])} to {_digits(bounds['maximum'])}"
    else:
        words = " and".join(f" {_BOUNDS[key]} {_digits(bound)}" for key, bound in bounds.items())
    return f"{'whole number' if whole else 'number'}{words}"


_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _default(schema: Schema) -> str:
    """A section is left out, or taken with its own defaults; of a list of sections the names are told."""
    value = schema.get("default")
    if value in (None, "", [], {}):
        return "none" if value is None and _parts(schema) else "empty"
    if _parts(schema) and isinstance(value, dict):
        return "its defaults"
    if _parts(schema):
        return ", ".join(f"`{section['name']}`" for section in value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _descriptions(flow: str) -> dict[str, str]:
    """What the docstring of a flow says of its parameters; read as text, since importing a flow imports Prefect."""
    module = ast.parse((Path(__file__).parent / f"{flow}.py").read_text(encoding="utf-8"))
    [function] = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == flow]
    told = re.findall(r"^    (\w+): (.+)$", ast.get_docstring(function) or "", re.MULTILINE)
    return {name.rstrip("_"): words for name, words in told}


def _objectives() -> str:
    rows = []
    for name, settings in SETTINGS.items():
        for field, schema in settings.model_json_schema()["properties"].items():
            rows.append([f"`{name}`", *_row(field, schema, False, "")])
    return _table(["objective", *_HEADER], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _title(name: str) -> str:
    """generate of GenerateConfig; held out of HeldOutConfig."""
    return " ".join(re.findall("[A-Z][a-z]*", name.removesuffix("Config"))).lower()


def _link(name: str) -> str:
    title = _title(name)
    return f"[{title}](#{title.replace(' ', '-')})"


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


if __name__ == "__main__":
    print(reference(), end="")
