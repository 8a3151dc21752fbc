"""The guide to selection: numbers are recomputed, configurations parsed, rows understood, links followed."""

from __future__ import annotations

import doctest
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import FLOWS, load_values
from flows.doctor import plan
from flows.markdown import plan_markdown
from tasks.config import METRICS, Control, CurateConfig, EvaluateConfig
from tasks.forms import form_of, understand
from tasks.sections import ImportConfig
from tasks.selection.pairing import REASONS
from tests.services import ROOT
from tests.test_explained import on_screen

GUIDE = ROOT / "docs" / "selection.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
CONFIGURATIONS = [yaml.safe_load(content) for kind, content in BLOCKS if kind == "yaml"]


def test_every_number_of_the_guides_examples_is_what_the_code_computes() -> None:
    program = "".join(content for kind, content in BLOCKS if kind == "python")
    examples = doctest.DocTestParser().get_doctest(program, {}, "selection.md", str(GUIDE), 0)
    assert len(examples.examples) > 60
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert not result.failed, "".join(said)


def test_every_number_of_the_evaluation_guide_is_what_the_code_computes_and_its_configuration_is_accepted() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```(?=\n)", text, re.DOTALL | re.MULTILINE)
    program = "".join(content for kind, content in blocks if kind == "python")
    examples = doctest.DocTestParser().get_doctest(program, {}, "evaluation.md", "evaluation.md", 0)
    assert len(examples.examples) > 15
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert not result.failed, "".join(said)
    [configuration] = [yaml.safe_load(content) for kind, content in blocks if kind == "yaml"]
    assert set(configuration) <= set(EvaluateConfig.model_validate(configuration).model_dump())
    shown = json.loads((ROOT / "benchmarks" / "results" / "leaderboard.json").read_text())
    measured = [*shown["length_controlled"].values(), shown["uncontrolled"], shown["win_rate"], *shown["generators"]]
    known = {str(value) for row in measured for value in row.values()}
    known |= {str(shown["spearman_of_gap_and_gap_of_effect"])}
    section = text.partition("## 6.")[2]
    claimed = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", section))
    assert claimed - {"0.2", "3.5"} <= known, claimed - known  # a weight in the published code, and a name


def test_every_decimal_in_the_guides_prose_stands_in_one_of_its_examples() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    prose = re.sub(r"arXiv [\d., ]+|http\S+|127\.0\.0\.1", "", prose)
    examples = " ".join(content for _, content in BLOCKS)
    known = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", examples))
    assert set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", prose)) <= known


def whole(section: dict[str, Any]) -> dict[str, Any]:
    """A configuration that lacks nothing but what a piece of the guide says."""
    ratings = [{"name": name} for name in ("quality", "style")]
    base = {
        "import": {"source": "x", "ratings": ratings, "columns": {"keep": ["difficulty"]}},
        "subset": [{"name": "all", "steps": [{"rank": "random", "fraction": 1.0}]}],
    }
    return {**base, **section}


@pytest.mark.parametrize("section", CONFIGURATIONS, ids=lambda section: "-".join(section))
def test_every_configuration_of_the_guide_is_accepted(section: dict[str, Any]) -> None:
    assert set(section) <= set(CurateConfig.model_validate(whole(section)).model_dump(by_alias=True))


def test_every_row_of_the_guide_is_understood_in_the_form_it_is_shown_for() -> None:
    seen = []
    for (kind, content), (next_kind, row) in itertools.pairwise(BLOCKS):
        if next_kind != "json":
            continue
        assert kind == "yaml", "a row stands after its configuration"
        values = yaml.safe_load(content)["import"]
        understood = understand(json.loads(row), ImportConfig(**values))
        assert len(understood.prompt["messages"]) == 1
        assert understood.prompt["messages"][0]["content"] == "2 + 2?"
        assert understood.completions[0].text == "4"
        assert form_of(json.loads(row), ImportConfig(**{**values, "form": "auto"})) == values["form"]
        seen.append([completion.ratings for completion in understood.completions])
    assert seen == [
        [{"quality": 9.0}],
        [{"helpfulness": 5.0}, {"helpfulness": "no number: N/A"}],
        [{"quality": 9.0}, {"quality": 2.0}],
        [{"score": 0.9}, {"score": 0.4}],
        [{"score": "no rating"}, {"score": "no rating"}],
    ]


def test_every_metric_rule_reason_and_control_is_in_the_guide() -> None:
    rules = CurateConfig.model_fields["pair"].default[0].__class__.model_fields["rule"].annotation.__args__
    for name in (*METRICS, "margin.S", "tau.S", "flipped.S", *rules, *Control.__args__):
        assert f"`{name}`" in TEXT, name
    for reason in REASONS[1:]:
        assert reason in " ".join(TEXT.split()), reason


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_readmes_configuration_is_one_that_curate_takes(tmp_path: Path) -> None:
    [content] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "curate.yaml"
    path.write_text(content)
    config = FLOWS["curate"].model_validate(load_values(path, [], ""))
    assert isinstance(config, CurateConfig) and config.import_
    assert (ROOT / config.import_.source).exists()


def test_the_readmes_dry_run_prints_what_the_readme_shows(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [content] = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    values = yaml.safe_load(content)
    values["import"]["source"] = str(ROOT / values["import"]["source"])
    shown = on_screen(plan_markdown(plan(CurateConfig.model_validate({**values, "store": str(tmp_path / "store")}))))
    printed = {" ".join(line.split()) for line in shown.splitlines()}
    claimed = readme.partition("a part of what it prints):")[2].partition("\nWithout")[0].strip("\n").splitlines()
    assert len(claimed) > 20
    for line in (" ".join(line.split()) for line in claimed):
        if not line.endswith("...") and not line.startswith("──"):
            assert line in printed, line
