"""The guide to selection: numbers are recomputed, configurations parsed, rows understood, links followed."""

from __future__ import annotations

import doctest
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import FLOWS, load_values
from flows.deployments import read_file
from flows.doctor import plan
from flows.markdown import plan_markdown
from tasks.config import METRICS, Control, CurateConfig, EvaluateConfig
from tasks.forms import form_of, understand
from tasks.sections import ImportConfig
from tasks.selection.pairing import REASONS
from tests.services import ROOT, environment
from tests.test_explained import on_screen

GUIDE = ROOT / "docs" / "selection.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCK = r"```(\w+)\n(.*?)```(?=\n)"
BLOCKS = re.findall(BLOCK, TEXT, re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "infra" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGURATIONS = [yaml.safe_load(content) for kind, content in BLOCKS if kind == "yaml"]


@pytest.mark.parametrize(("page", "least"), [("selection.md", 60), ("evaluation.md", 15), ("faq.md", 10)])
def test_every_number_of_a_pages_examples_is_what_the_code_computes(page: str, least: int) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    program = "".join(content for kind, content in re.findall(BLOCK, text, re.DOTALL) if kind == "python")
    examples = doctest.DocTestParser().get_doctest(program, {}, page, page, 0)
    assert len(examples.examples) > least
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert not result.failed, "".join(said)


def test_what_the_evaluation_guide_says_of_a_leaderboard_was_measured_and_its_configuration_is_accepted() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(BLOCK, text, re.DOTALL)
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


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as git hosts make them; those of equal headings are not told apart."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#{1,6} (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8")):
            linked = (page.parent / target).resolve()
            if "://" not in target and linked not in found:
                found.add(linked)
                ahead.append(linked)
    assert {page.resolve() for page in PAGES} <= {*found, ROOT / "README.md"}


@pytest.mark.parametrize("repository", ["", "https://git.example.com/team/prefsieve"])
def test_the_site_builds_strictly_loads_nothing_from_elsewhere_and_has_whole_lists(
    repository: str, tmp_path: Path
) -> None:
    """Where a repository is named, links to what lies outside docs/ lead there, else its path is told."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = environment(REPO_URL=repository, NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    pages = {page.relative_to(tmp_path / "site"): page.read_text() for page in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > len(PAGES) - 3
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="?(https?://[^\s">]+)', page)
        assert not [url for url in loaded if not repository or not url.startswith(repository)], name
        assert not re.search(r"<p>[^<]*\n(?:- |\d+\. |\| )", page), (
            f"{name}: a list or table without an empty line before it"
        )
    guide = pages[Path("reliability.html")]
    result = "benchmarks/results/scale.json"
    assert (f'<a href="{repository}/blob/main/{result}">' if repository else f"(<code>{result}</code>)") in guide


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


def test_a_team_s_own_deployments_as_readme_and_operations_show_them_are_taken(tmp_path: Path) -> None:
    [short] = re.findall(r"^    deployments:\n(?:     .+\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    [long] = re.findall(r"```yaml\n(# nightly\.yaml\n.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    shutil.copy(ROOT / "flows" / "recipes" / "pvar.yaml", tmp_path)
    shutil.copy(ROOT / "configs" / "tinyworld" / "train.yaml", tmp_path)
    file = tmp_path / "nightly.yaml"
    for text, flows in ((textwrap.dedent(short), ["curate"]), (long, ["curate", "train"])):
        file.write_text(text)
        deployments = read_file(file).deployments
        assert [one.entrypoint for one in deployments] == [f"flows.{flow}.{flow}" for flow in flows]
        assert deployments[0].parameters["subset"][0]["name"] == "pvar-top"
        assert [times.slug for times in deployments[0].schedules] == ["nightly"]
