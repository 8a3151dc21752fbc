"""The configuration reference is what the models say, and says something about every field."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from flows import reference
from flows.cli import FLOWS
from tasks.objectives.settings import SETTINGS
from tests.services import ROOT

TEXT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| `")]


def test_the_reference_is_what_the_models_say_now() -> None:
    assert reference.reference() == TEXT, "write it anew: python -m flows.reference > docs/configuration.md"


def test_every_field_is_told_with_what_it_takes_its_default_and_what_it_is() -> None:
    assert len(ROWS) > 150
    for row in ROWS:
        assert len(row) in (4, 5) and all(cell.strip() for cell in row), row
    fields = [row[0].strip("`") for row in ROWS]
    for model in FLOWS.values():
        for name, field in model.model_fields.items():
            assert (field.alias or name) in fields
    options = {(row[0].strip("`"), row[1].strip("`")) for row in ROWS if len(row) == 5}
    assert options == {(name, field) for name, settings in SETTINGS.items() for field in settings.model_fields}


def test_every_section_is_there_once_and_every_link_leads_to_one() -> None:
    titles = re.findall(r"^#{2,3} (.+)$", TEXT, re.MULTILINE)
    anchors = [title.lower().replace(" ", "-") for title in titles]
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert links and links <= set(anchors)
    told = {"curate", "train", "evaluate", "experiment"} | links
    assert {title for title in titles if title[0].islower()} <= {link.replace("-", " ") for link in told}


class Inner(BaseModel):
    name: str = "a"


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid")

    share: float = Field(0.1, gt=0, le=1)
    least: float | None = Field(None, ge=0)
    seed: int = Field(0, ge=0, lt=2**31)
    flag: bool = True
    both: tuple[float, float] | None = None
    names: list[str] = Field(["x"], min_length=1)
    some: dict[str, Any] = {}
    inner: Inner = Inner()
    maybe: Inner | None = None
    several: list[Inner] = Field([Inner(name="b"), Inner(name="c")], min_length=1, max_length=3)


@pytest.mark.parametrize(
    ("field", "takes", "default"),
    [
        ("share", "number > 0 and <= 1", "`0.1`"),
        ("least", "number >= 0", "empty"),
        ("seed", "whole number from 0 to 2,147,483,647", "`0`"),
        ("flag", "true or false", "`true`"),
        ("both", "list of 2: number, number", "empty"),
        ("names", "list of text, at least 1", '`["x"]`'),
        ("some", "mapping", "empty"),
        ("inner", "[inner](#inner)", "its defaults"),
        ("maybe", "[inner](#inner)", "none"),
        ("several", "list of [inner](#inner), 1 to 3", "`b`, `c`"),
    ],
)
def test_types_and_defaults_are_written_as_a_person_would(field: str, takes: str, default: str) -> None:
    schema = Sample.model_json_schema()["properties"][field]
    assert reference._row(field, schema, False, "") == [f"`{field}`", takes, default, ""]
