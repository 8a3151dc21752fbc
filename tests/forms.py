"""What Prefect 3.7.7's UI makes of the schema of a deployment's parameters: the rules of its sources.

They were read in the source maps of prefect/server/ui (components SchemaForm*); tests/ui tries the same in a browser.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

# All that is left of a schema when the UI sends it, with the values, to be checked; items and choices are sent whole.
_REMEMBERED = {
    *("$ref", "allOf", "anyOf", "block_type_slug", "const", "default", "definitions", "description", "enum", "example"),
    *("format", "items", "maxItems", "minItems", "position", "prefixItems", "properties", "required", "title", "type"),
}


def remembered(schema: Schema) -> Schema:
    """The schema that the UI checks values by, before it asks for a run."""
    kept = {key: value for key, value in schema.items() if key in _REMEMBERED}
    for key in {"properties", "definitions"} & kept.keys():
        kept[key] = {name: remembered(inner) for name, inner in kept[key].items()}
    return kept


def drawn_as(field: Schema, schema: Schema) -> str:
    """What a field of a section is drawn as: text, number, switch, choice, choices, list of these, section, or json.

    A section that may stay closed is a `closed section`, any other choice of types `buttons`.
    """
    if "allOf" in field:
        parts = [_meant(part, schema) for part in field["allOf"]]
        return _input({key: value for part in [*parts, field] for key, value in part.items()}, schema)
    if "anyOf" in field:
        parts = [_meant(part, schema) for part in field["anyOf"]]
        closed = len(parts) == 2 and parts[0].get("properties") == {} and parts[1].get("properties")
        return "closed section" if closed else "buttons"
    return _input(field, schema)


def _input(field: Schema, schema: Schema) -> str:
    field = _meant(field, schema)
    match field.get("type"):
        case "string" | "integer" | "number" as kind:
            plain = "text" if kind == "string" else "number"
            return "choice" if "enum" in field and kind != "number" else plain
        case "boolean":
            return "switch"
        case "array":
            items = [_meant(part, schema) for part in field.get("prefixItems") or [field.get("items", {})]]
            if "enum" in items[0]:
                return "choices"
            kinds = sorted({_input(part, schema) for part in items})
            return f"list of {' and '.join(kinds)}"
        case "object":
            return "section" if "properties" in field else "json"
        case "null":
            return "nothing"
        case _:
            return "choice" if "enum" in field else "json"


def _meant(field: Schema, schema: Schema) -> Schema:
    if "$ref" not in field:
        return field
    return {**schema["definitions"][field["$ref"].removeprefix("#/definitions/")], **field}
