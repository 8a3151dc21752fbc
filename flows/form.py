"""The form of a deployment: the JSON schema of a flow's parameters, so that Prefect's UI draws it well.

What pydantic writes says which values are right. Both UIs of Prefect 3.7.7 read it in ways of their own:

- Fields go by `position`. Without it their order is the database's, and PostgreSQL keeps none.
- A choice between types is a row of buttons over the inputs of the one that is chosen. For a value that may be empty
  that is clutter, so it has its one type here: left empty, it is left out.
- Nothing can be folded, but a choice of two objects can: one without fields, which is the defaults or nothing, and the
  section. So a section that a run can do without is closed until it is opened, or has values already. What is rarely
  changed becomes such a section, `more_settings`, which the flows put back where it belongs.
- Where a choice fails, the message is the whole value. So the choice takes any object, and `allOf` of what it stands in
  says what is right inside, field by field; under patternProperties, as one of the UIs would draw properties twice.
- Bounds and patterns of a field are forgotten on the way to the check that shows messages beside fields, but for those
  in an `allOf`.
- Defaults are filled in. A step is a filter or a ranking and would get the defaults of both, so it has none here.
- A mapping is a box for JSON. It comes last.

Values that pass are those that passed before. tests/forms.py has the UI's rules, tests/ui tries them in a browser.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

Schema = dict[str, Any]

MORE = "more_settings"

_MORE = "More"  # how the name of such a section ends
_REF = "#/definitions/"
_FIRST = {"CurateConfig": ["ingest", "generate", "score", "pair", "subset", "import", "ensembles", "publish"]}
# Of a section, what is shown; all else is in its more_settings.
_SHOWN = {
    "IngestConfig": ["source", "format", "columns", "limit"],
    "ImportConfig": ["source", "form", "columns", "ratings"],
    "GeneratorConfig": ["name", "engine", "model", "sampling", "batch_size"],
    "ScorerConfig": ["name", "type", "engine", "model", "function", "judge", "batch_size"],
    "JudgeConfig": ["mode", "base_url", "api_key_env", "instructions"],
    "PairingConfig": ["name", "rule", "generators", "scorer"],
    "Step": ["rank", "keep", "fraction", "filter", "min", "max"],
    "PolicyConfig": ["model", "workers", "cpus", "gpus"],
    "TrainingConfig": [
        *("objective", "beta", "learning_rate", "epochs", "max_steps"),
        *("batch_size", "micro_batch_size", "max_length", "lora"),
    ],
}
_TITLES = {
    "CurateConfig": {
        "ingest": "Prompts (ingest)",
        "generate": "Completions (generate)",
        "score": "Rewards (score)",
        "pair": "Pairs (pair)",
        "subset": "Subsets to publish (subset)",
        "import": "Or completions that exist already (import)",
        "publish": "Published files (publish)",
    },
    "EvaluateConfig": {
        "ingest": "Held-out prompts (ingest)",
        "generate": "Completions (generate)",
        "score": "Rewards (score)",
        "evaluate": "What is compared (evaluate)",
    },
}
_DEPENDING = {"ScorerConfig": ["engine"]}  # fields whose default depends on others: left empty, it does
_WRITTEN = {"cpus": "CPUs", "gpus": "GPUs", "api": "API", "url": "URL"}
_LETTERS = {"^[A-Za-z0-9]": "Letters, digits, dots, dashes and underscores.", "^[a-z]": "snake_case."}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "pattern", "additionalProperties")


def form(schema: Schema, model: str) -> Schema:
    """The schema of a flow's parameters, as Prefect has it, to be drawn.

    model: name of the model that has these parameters as fields.
    """
    schema = deepcopy(schema)
    definitions = schema["definitions"]
    for section in list(definitions.values()):
        for field in section["properties"].values():
            if "properties" in field.get("items", {}):  # the one section that has its schema inside: steps
                step = field["items"]
                for inner in step["properties"].values():
                    inner.pop("default", None)
                definitions[step["title"]] = step
                field["items"] = {"$ref": f"{_REF}{step['title']}"}
    for name in _SHOWN.keys() & definitions.keys():
        _fold(name, definitions)
    for name, section in definitions.items():
        _draw(section, name)
        section["title"] = "More" if name.endswith(_MORE) else _words(name.removesuffix("Config"))
    _draw(schema, model)
    for field in schema["properties"].values():
        if "default" in field:
            field["default"] = _folded(field["default"], field, schema)
    return schema


def folded(values: Schema, form: Schema) -> Schema:
    """Parameters of a flow as its form has them, with what is rarely changed in sections of its own."""
    return {name: _folded(value, form["properties"].get(name, {}), form) for name, value in values.items()}


def unfolded(value: Any) -> Any:
    """The same parameters as the flow's models have them. What is no plain value is left as it is."""
    if isinstance(value, list):
        return [unfolded(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    fields = {name: unfolded(inner) for name, inner in value.items()}
    more = fields.pop(MORE, None) or {}
    return {**fields, **more}


def _folded(value: Any, field: Schema, form: Schema) -> Any:
    if isinstance(value, list):
        return [_folded(inner, field.get("items", {}), form) for inner in value]
    section = form["definitions"].get(_section_of(field), {})
    if not isinstance(value, dict) or "properties" not in section:
        return value
    fields = section["properties"]
    rest = form["definitions"].get(_section_of(fields.get(MORE, {})), {"properties": {}})["properties"]
    shown = {name: _folded(inner, fields.get(name, {}), form) for name, inner in value.items() if name not in rest}
    more = {name: _folded(inner, rest[name], form) for name, inner in value.items() if name in rest}
    return {**shown, **({MORE: more} if more else {})}


def _section_of(field: Schema) -> str:
    """Name of the section that a field is, closed or not; empty for other fields."""
    references = [choice["$ref"] for choice in (field, *field.get("anyOf", [])) if "$ref" in choice]
    return references[0].removeprefix(_REF) if references else ""


def _fold(name: str, definitions: Schema) -> None:
    """Put what is rarely changed into a section of its own. It is also taken where it was, but not drawn there."""
    section, more = definitions[name], f"{name.removesuffix('Config')}{_MORE}"
    fields = section["properties"]
    rest = {field: fields[field] for field in fields if field not in _SHOWN[name]}
    told = ", ".join(_lower(field) for field in rest)
    definitions[more] = {"type": "object", "additionalProperties": False, "properties": rest}
    del section["additionalProperties"]
    taken = {f"^{field}$": _check(schema) for field, schema in rest.items()}
    section["allOf"] = [{"propertyNames": {"enum": [*fields, MORE]}, "patternProperties": taken}]
    section["properties"] = {field: fields[field] for field in _SHOWN[name]}
    section["properties"][MORE] = {"$ref": f"{_REF}{more}", "description": f"{told[:1].upper()}{told[1:]}."}


def _check(field: Schema) -> Schema:
    return {key: value for key, value in deepcopy(field).items() if key not in ("title", "description", "default")}


def _draw(section: Schema, model: str) -> None:
    first, titles = _SHOWN.get(model, _FIRST.get(model, [])), _TITLES.get(model, {})
    fields, inside = section["properties"], {}

    def turn(name: str) -> tuple[bool, int]:
        plain = name.rstrip("_")
        return _is_mapping(fields[name]), first.index(plain) if plain in first else len(first)

    for position, name in enumerate(sorted(sorted(fields, key=_was(fields)), key=turn)):
        field, optional = _without_null(fields[name])
        if "$ref" in field and name not in section.get("required", []):
            inner = {"$ref": field["$ref"]}
            inside[f"^{name}$"] = {"if": {"type": "object"}, "then": inner} if optional else inner
            field = _closed(field, "Not used" if optional else "Defaults")
        if name in _DEPENDING.get(model, []):
            del field["default"]
        bounds = {key: field.pop(key) for key in _BOUNDS if key in field}
        about = [field.get("description", ""), *(_LETTERS[start] for start in _LETTERS if _begins(bounds, start))]
        field |= {"title": titles.get(name.rstrip("_"), _words(name)), "description": " ".join(about).strip()}
        fields[name] = {**field, "position": position, **({"allOf": [bounds]} if bounds else {})}
    if inside:
        section["allOf"] = [*section.get("allOf", []), {"patternProperties": inside}]


def _was(fields: Schema) -> Any:
    """Parameters have a position already; other fields stand as the model has them."""
    names = list(fields)
    return lambda name: fields[name].get("position", names.index(name))


def _begins(bounds: Schema, start: str) -> bool:
    return str(bounds.get("pattern", "")).startswith(start)


def _without_null(field: Schema) -> tuple[Schema, bool]:
    """The field as if it could not be empty, and whether it can. Prefect takes null where there is no default."""
    choices = field.get("anyOf", [])
    if {"type": "null"} not in choices:
        return dict(field), False
    [only] = [choice for choice in choices if choice != {"type": "null"}]
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return {**only, **rest}, True


def _closed(field: Schema, without: str) -> Schema:
    """A section that can be left out, as a choice between that and its fields. The type lets Prefect take null, too."""
    default = field.get("default") or {}
    told = ", ".join(f"{_lower(name)} = {_told(value)}" for name, value in default.items() if _is_plain(value))
    about = field.get("description", "")
    return {
        "type": "object",
        "description": f"{about} Defaults: {told}." if told else about,
        "anyOf": [{"title": without, "type": "object", "properties": {}}, {"$ref": field["$ref"]}],
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _told(value: str | float) -> str:
    if isinstance(value, str | bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _is_mapping(field: Schema) -> bool:
    return field.get("type") == "object"


def _lower(name: str) -> str:
    return _WRITTEN.get(name, name.replace("_", " "))


def _words(name: str) -> str:
    """Max chars of max_chars; Held out of HeldOut."""
    split = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name.strip("_"))
    words = " ".join(_WRITTEN.get(word, word) for word in split.replace("_", " ").split())
    return words[:1].upper() + words[1:]
