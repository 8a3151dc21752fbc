"""The form of each flow: what a field is drawn as, in which order, and what is refused beside which field."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import build_error_obj, validate
from pydantic import ValidationError

from flows.cli import FLOWS
from flows.curate import curate
from flows.form import MORE, folded, form, unfolded
from tasks.config import CurateConfig
from tests.forms import drawn_as, remembered
from tests.services import ROOT

Schema = dict[str, Any]

MAPPINGS = {"resources", "engine_args", "quotas", "options", "train"}  # with names that nobody knows beforehand
PLAIN = {flow: parameter_schema(getattr(import_module(f"flows.{flow}"), flow)).model_dump() for flow in FLOWS}
FORMS = {flow: form(schema, FLOWS[flow].__name__) for flow, schema in PLAIN.items()}
DEPLOYED = {
    deployment["name"]: deployment["parameters"]
    for deployment in yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text(encoding="utf-8"))["deployments"]
}


def sections(schema: Schema) -> list[tuple[str, Schema]]:
    return [("", schema), *schema["definitions"].items()]


def errors_beside(schema: Schema, values: Schema) -> dict[str, str]:
    """Messages by the path of the field that they stand beside."""
    found: dict[str, str] = {}

    def add(errors: list[Any], place: str) -> None:
        for error in errors:
            if isinstance(error, str):
                found[place] = f"{found[place]} and {error}" if place in found else error
            else:
                add(error["errors"], f"{place}.{error.get('property', error.get('index'))}".strip("."))

    add(build_error_obj(validate(values, schema))["errors"], "")
    return found


def with_value(values: Schema, path: str, value: Any) -> Schema:
    values = json.loads(json.dumps(values))  # what anchors share is apart
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = values
    for part in way:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    inner[last] = value
    return values


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_its_place_a_title_in_words_and_a_description(flow: str) -> None:
    for name, section in sections(FORMS[flow]):
        fields = section["properties"]
        assert sorted(field["position"] for field in fields.values()) == list(range(len(fields)))
        for field in fields.values():
            assert field["title"] and "_" not in field["title"], f"{name}: {field['title']}"
            assert field["description"] or name == "CurateConfig", f"{name}: {field['title']}"


@pytest.mark.parametrize("flow", FLOWS)
def test_no_field_is_a_row_of_types_and_only_mappings_are_boxes_for_json_and_stand_last(flow: str) -> None:
    for section_name, section in sections(FORMS[flow]):
        drawn = {name: drawn_as(field, FORMS[flow]) for name, field in section["properties"].items()}
        boxes = {name for name, kind in drawn.items() if "json" in kind or "nothing" in kind}
        assert boxes <= MAPPINGS, section_name
        assert "buttons" not in drawn.values(), section_name
        assert boxes == set(in_order(section)[len(drawn) - len(boxes) :]), section_name


def test_without_the_form_there_would_be_rows_of_types_and_no_order() -> None:
    """So the rules here tell the one from the other."""
    pairing = PLAIN["curate"]["definitions"]["PairingConfig"]["properties"]
    assert drawn_as(pairing["scorer"], PLAIN["curate"]) == "buttons"
    assert drawn_as(FORMS["curate"]["definitions"]["PairingConfig"]["properties"]["scorer"], FORMS["curate"]) == "text"
    assert not any("position" in field for field in pairing.values())
    for field in ({}, {"type": "array"}, {"type": "object"}, {"type": "array", "items": {"anyOf": []}}):
        assert "json" in drawn_as(field, {})


def in_order(section: Schema) -> list[str]:
    fields = section["properties"]
    return sorted(fields, key=lambda name: fields[name]["position"])


def test_what_must_be_chosen_comes_first() -> None:
    curate = FORMS["curate"]
    assert in_order(curate)[:5] == ["ingest", "generate", "score", "pair", "subset"]
    assert in_order(curate)[-4:] == ["publish", "store", "ray_address", "prices"]
    first = {name: in_order(section) for name, section in curate["definitions"].items()}
    assert first["IngestConfig"][0] == "source"
    assert first["GeneratorConfig"] == ["name", "engine", "model", "sampling", "batch_size", MORE]
    assert first["ScorerConfig"][:4] == ["name", "type", "engine", "model"]
    assert first["Step"][:3] == ["rank", "keep", "fraction"]


@pytest.mark.parametrize(
    ("section", "field", "kind"),
    [
        ("GenerateConfig", "samples", "number"),
        ("GenerateConfig", "generators", "list of section"),
        ("GenerateConfig", "adaptive", "closed section"),
        ("GeneratorConfig", "engine", "choice"),
        ("GeneratorConfig", "sampling", "closed section"),
        ("GeneratorConfig", MORE, "closed section"),
        ("GeneratorMore", "trust_remote_code", "switch"),
        ("ScorerConfig", "judge", "closed section"),
        ("JudgeMore", "verdicts", "choice"),
        ("ColumnsConfig", "keep", "list of text"),
        ("PairingConfig", "scorer", "text"),
        ("SubsetConfig", "steps", "list of section"),
        ("SubsetConfig", "controls", "choices"),
        ("Step", "fraction", "number"),
        ("StepMore", "quantiles", "list of number"),
        ("StepMore", "values", "list of text"),
    ],
)
def test_a_field_of_curate_is_drawn_as(section: str, field: str, kind: str) -> None:
    assert drawn_as(FORMS["curate"]["definitions"][section]["properties"][field], FORMS["curate"]) == kind


def test_a_section_that_can_be_left_out_says_what_it_then_is() -> None:
    fields = FORMS["curate"]["definitions"]["GeneratorConfig"]["properties"]
    assert "Defaults: temperature = 1, top p = 1, top k = 0, max tokens = 512." in fields["sampling"]["description"]
    assert fields["sampling"]["anyOf"][0]["title"] == "Defaults"
    assert FORMS["curate"]["properties"]["import_"]["anyOf"][0]["title"] == "Not used"


def test_a_form_fills_in_no_default_that_depends_on_other_fields() -> None:
    """A filter would be refused for the `keep` of a ranking, a judge for the engine of a reward model."""
    definitions = FORMS["curate"]["definitions"]
    assert not any("default" in field for field in definitions["Step"]["properties"].values())
    assert "default" not in definitions["ScorerConfig"]["properties"]["engine"]
    assert definitions["GeneratorConfig"]["properties"]["engine"]["default"] == "transformers"


@pytest.mark.parametrize("flow", FLOWS)
def test_what_is_deployed_passes_also_with_every_field_written_out(flow: str) -> None:
    config = FLOWS[flow].model_validate(DEPLOYED[flow])
    full = json.loads(config.model_dump_json(by_alias=flow != "curate"))  # the flow says import_, the section import
    for schema in (FORMS[flow], remembered(FORMS[flow])):
        for values in (DEPLOYED[flow], full):
            assert errors_beside(schema, values) == {}
            assert errors_beside(schema, folded(values, FORMS[flow])) == {}


@pytest.mark.parametrize("flow", FLOWS)
def test_what_is_rarely_changed_is_folded_for_the_form_and_unfolded_for_the_flow(flow: str) -> None:
    full = json.loads(FLOWS[flow].model_validate(DEPLOYED[flow]).model_dump_json(by_alias=flow != "curate"))
    for values in (DEPLOYED[flow], full):
        assert unfolded(folded(values, FORMS[flow])) == values
    assert MORE in json.dumps(folded(full, FORMS[flow]))
    assert MORE not in json.dumps(folded(DEPLOYED[flow], FORMS[flow])), "what is deployed should be short to look at"
    assert getattr(import_module(f"flows.{flow}"), flow).validate_parameters(folded(full, FORMS[flow]))


def test_a_folded_value_wins_over_one_that_was_there_by_default() -> None:
    generator = {"name": "policy", "engine": "fake", "workers": 1, MORE: {"workers": 3}}
    parameters = {"generate": {"generators": [generator]}, "subset": DEPLOYED["curate"]["subset"]}
    assert curate.validate_parameters(parameters)["generate"].generators[0].workers == 3


def test_a_configuration_of_the_command_line_knows_no_folded_section() -> None:
    generator = {"name": "policy", "engine": "fake", MORE: {"workers": 3}}
    with pytest.raises(ValidationError, match=MORE):
        CurateConfig.model_validate({**DEPLOYED["curate"], "generate": {"generators": [generator]}})


REFUSED = [
    ("generate.samples", 0, "0 is less than the minimum of 1"),
    ("generate.max_refused", 1.5, "1.5 is greater than the maximum of 1"),
    ("generate.generators.1.sampling.temperature", 99, "99 is greater than the maximum of 10"),
    ("generate.generators.0.name", "my policy", "'my policy' does not match"),
    (f"generate.generators.0.{MORE}.workers", 0, "0 is less than the minimum of 1"),
    ("generate.generators.0.workers", 2000, "2000 is greater than the maximum of 1024"),
    ("generate.generators.0.engine", "vlm", "'vlm' is not one of ['transformers', 'vllm', 'fake']"),
    ("ingest.limit", -1, "-1 is less than the minimum of 0"),
    (f"score.scorers.0.judge.{MORE}.timeout", 0, "0 is less than or equal to the minimum of 0"),
    ("subset.0.steps.0.fraction", 2, "2 is greater than the maximum of 1"),
    ("subset.1.name", "a/b", "'a/b' does not match"),
    ("publish.rows_per_file", 0, "0 is less than the minimum of 1"),
]


@pytest.mark.parametrize(("path", "value", "said"), REFUSED)
def test_a_wrong_value_is_refused_beside_its_field_by_what_the_ui_remembers(path: str, value: Any, said: str) -> None:
    wrong = with_value(DEPLOYED["curate"], path, value)
    for schema in (FORMS["curate"], remembered(FORMS["curate"])):
        errors = errors_beside(schema, wrong)
        assert list(errors) == [path]
        assert errors[path].startswith(said)
    assert said not in errors_beside(remembered(PLAIN["curate"]), wrong).get(path, ""), "no form is needed for it"


def test_a_field_that_does_not_exist_is_refused_with_those_that_do() -> None:
    wrong = with_value(DEPLOYED["curate"], "generate.generators.0.wokers", 2)
    for schema in (FORMS["curate"], remembered(FORMS["curate"])):
        errors = errors_beside(schema, wrong)
        assert list(errors) == ["generate.generators.0"]
        assert errors["generate.generators.0"].startswith("'wokers' is not one of ['model'")


def test_what_is_missing_is_told_beside_its_field_and_once() -> None:
    wrong = deepcopy(DEPLOYED["curate"])
    del wrong["ingest"]["source"], wrong["generate"]["generators"][2]["name"], wrong["subset"]
    assert errors_beside(remembered(FORMS["curate"]), wrong) == {
        "ingest.source": "'source' is a required property",
        "generate.generators.2.name": "'name' is a required property",
        "subset": "'subset' is a required property",
    }
