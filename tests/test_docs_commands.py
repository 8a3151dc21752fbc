"""Every command of the README and the docs: run here, in one folder and in the order in which a reader meets them, or
listed with the reason why not, and with what is looked at instead."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from flows.init import RECIPES
from tests.commands import PAGES, Told, as_json, commands_of
from tests.conftest import Result, prompts, write_jsonl
from tests.services import JOINING, ROOT, environment
from tests.tinyworld_fixture import tinyworld  # noqa: F401 (a fixture)

pytestmark = pytest.mark.timeout(1800)  # the first test may build TinyWorld

BY_MACHINES = {"configuration.md"}  # written by flows/reference.py, which has tests of its own
COMMANDS = [told for page in PAGES if page.name not in BY_MACHINES for told in commands_of(page)]


def commands() -> dict[str, Any]:
    """prefsieve's, as typer's own click has them."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


# --- what is looked at where a command does not run


def parsed(told: Told) -> None:
    """By prefsieve itself; the files that it names exist, or are a reader's own."""
    name, *arguments = told.words[1:]
    commands()[name].make_context(name, list(arguments))
    for word in arguments:
        if word.endswith(".yaml") and "/" in word:
            assert (ROOT / word).exists(), word


def known_to_prefect(told: Told) -> None:
    from prefect.cli._app import _app

    _app.parse_args(told.words[1:], exit_on_error=False, print_error=False)


def known_to_ray(told: Told) -> None:
    from ray.scripts.scripts import cli

    cli.commands[told.words[1]].make_context(told.words[1], told.words[2:])


def known_to_make(told: Told) -> None:
    targets = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert told.words[1] in targets


def known_to_program(told: Told) -> None:
    """The file exists, and has the options."""
    text = (ROOT / told.words[1]).read_text()
    for word in told.words[2:]:
        assert not word.startswith("--") or f'"{word}"' in text, word


def files_exist(told: Told) -> None:
    for word in told.words:
        if word.startswith(("infra/", "tests/", "deployments/", "configs/", "docker/")):
            assert (ROOT / word).exists(), word


def module_exists(told: Told) -> None:
    assert (ROOT / (told.words[2].replace(".", "/") + ".py")).exists()


def sets_variables(told: Told) -> None:
    for word in told.words[1:]:
        assert re.match(r"[A-Z_]+=\S", word), word


# --- the commands that do not run here

ELSEWHERE: list[tuple[str, str, Callable[[Told], None]]] = [
    (r"make demo", "takes minutes; its flows run below, on less", known_to_make),
    (r"make test", "runs this test", known_to_make),
    (r"make setup( \S+)?", "came before this test; for a GPU there is none", known_to_make),
    (r"\.venv/bin/python benchmarks/.+", "measures for minutes", known_to_program),
    (r"\.venv/bin/python -m pytest .+", "make test runs it", files_exist),
    (r"\.venv/bin/python -m examples\.tinyworld\.build .+", "the fixture tinyworld runs it", module_exists),
    (r"prefsieve (submit|cancel) .+", "needs a cluster: tests/test_submit.py, tests/faults/test_submission.py", parsed),
    (r"prefsieve deploy.*", "needs a server of its own: tests/test_deploy.py", parsed),
    (r"prefect (server|worker) start .+", "tests/services.py starts them for tests/test_deploy.py", known_to_prefect),
    (r"prefect (deployment run|work-pool) .+", "tests/test_deploy.py does so by the API", known_to_prefect),
    (r"ray start .+", "tests/services.py starts heads and nodes with it", known_to_ray),
    (r"export .+", "sets variables", sets_variables),
    (r"unset [A-Z_]+", "takes one back", lambda told: None),
    (r"git pull", "needs the repository that the clone came from", lambda told: None),
    (r"(kubectl|grep) .+", "needs a cluster: tests/test_infra.py holds the files against schemas", files_exist),
]


def row_of(told: Told) -> tuple[str, str, Callable[[Told], None]] | None:
    rows = [row for row in ELSEWHERE if re.fullmatch(row[0], told.text)]
    assert len(rows) < 2, f"{told.text} stands twice in the list"
    return rows[0] if rows else None


FIRST: dict[str, Told] = {}  # where a command is told first
for _told in COMMANDS:
    FIRST.setdefault(_told.text, _told)
HERE = [told for told in FIRST.values() if not row_of(told)]


def test_every_command_is_run_here_or_listed_and_no_row_of_the_list_is_left_over() -> None:
    assert len(COMMANDS) > 80 and len(HERE) > 35
    for told in HERE:
        assert told.words[0] in ("prefsieve", "du", "find"), f"{told.page}: {told.text}: run it here, or list it"
    for pattern, *_ in ELSEWHERE:
        assert any(re.fullmatch(pattern, told.text) for told in COMMANDS), f"no page has {pattern} any more"


@pytest.mark.parametrize("told", [told for told in FIRST.values() if row_of(told)], ids=lambda told: told.text)
def test_what_does_not_run_here_is_at_least_no_slip(told: Told) -> None:
    row = row_of(told)
    assert row
    row[2](told)


def test_prefsieve_knows_every_command_and_option_that_a_sentence_names() -> None:
    known, seen = commands(), 0
    for page in PAGES:
        for span in re.findall(r"`(prefsieve [^`]+)`", page.read_text(encoding="utf-8")):
            name, *arguments = shlex.split(span)[1:]
            if name.startswith("--"):
                assert name in ("--install-completion", "--show-completion"), span
                continue
            assert name in known, f"{page}: {span}"
            options = {option for each in known[name].params for option in each.opts}
            assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= options, f"{page}: {span}"
            seen += 1
    assert seen > 30


# --- the others, one after the other

POLICY, STRONG = "[{name: policy, engine: fake}]", "[{name: strong, engine: fake}, {name: weak, engine: fake, seed: 1}]"
RATED = {"score.scorers": "[{name: rm, engine: fake}]"}
OWN = {"import.source": "completions.jsonl"}
WORLD = {"model": ".prefsieve/tinyworld/policy", "engine": "transformers", "gpus": 0}
# What a reader would have changed, and less of everything: (the command, what is set, further options).
LESS: list[tuple[str, dict[str, Any], list[str]]] = [
    (r"curate configs/tinyworld/curate\.yaml", {"ingest.limit": 240, "generate.samples": 4}, []),
    (r"train configs/tinyworld/train\.yaml", {"train.max_steps": 3}, []),
    # `make demo` runs it on these models, tests/test_evaluate.py the command.
    (r"evaluate configs/tinyworld/evaluate\.yaml", {}, ["--dry-run"]),
    # Trains twenty policies; tests/test_experiments.py runs whole ones.
    (r"experiment configs/experiments/pvar\.yaml", {}, ["--dry-run"]),
    (
        r"experiment mixdpo\.yaml",
        {
            "policy.model": WORLD["model"],
            **{f"evaluate.generate.generators.0.{key}": value for key, value in WORLD.items()},
            **{f"curate.generate.generators.0.{key}": value for key, value in WORLD.items()},
            "evaluate.score.scorers.0.engine": "fake",
            "curate.score.scorers.0.engine": "fake",
        },
        ["--dry-run"],
    ),
    (r"(doctor|curate) (pvar|adaptive)\.yaml", {"generate.generators": POLICY, **RATED}, []),
    (r"curate pvar\.yaml$", {}, ["--dry-run"]),  # the quickstart's commands run it whole
    (r"curate adaptive\.yaml$", {}, ["--dry-run"]),  # starts engines in each round: tests/test_adapt.py
    (r"(doctor|curate) delta\.yaml", {"generate.generators": STRONG, **RATED}, []),
    (r"(import|curate) (config|mine|import)\.yaml", OWN, []),
]


@pytest.fixture(scope="module")
def place(tinyworld: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Like a clone in which the demo built its world, with files of somebody's own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "examples", "deployments"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".prefsieve").mkdir()
    (folder / ".prefsieve" / "tinyworld").symlink_to(tinyworld.absolute())
    write_jsonl(folder / "prompts.jsonl", prompts(60))
    write_jsonl(folder / "heldout.jsonl", prompts(20, first=1000))
    rated = [json.loads(line) for line in (ROOT / "examples" / "imports" / "long.jsonl").read_text().splitlines()]
    write_jsonl(folder / "completions.jsonl", [{**row, "quality": row["correctness"]} for row in rated])
    return folder


@pytest.fixture(scope="module")
def results(place: Path, local_ray: Any, prefect_api: str) -> dict[str, Result]:
    """What each command ended with: all run in one process, which has one Ray and one Prefect server for them."""
    (place / "commands.json").write_text(as_json([(told, as_run(told)) for told in HERE]))
    home = {"PREFECT_HOME": str(place / "prefect"), "PYTHONPATH": str(ROOT)}
    env = environment(PREFECT_API_URL=prefect_api, **JOINING, **home)
    program = "import sys; from tests.commands import run_all; run_all(sys.argv[1])"
    command = [sys.executable, "-c", program, local_ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=1200, check=False)
    print(done.stderr)  # seconds of each
    assert done.returncode == 0, done.stderr
    return {text: Result(*ended) for text, ended in json.loads((place / "results.json").read_text()).items()}


def as_run(told: Told) -> list[str]:
    """Its words, with what a reader would fill in and change."""
    words = [{"NAME": "margin-top", "COPY": ".prefsieve/store"}.get(word, word) for word in told.words]
    for pattern, values, options in LESS:
        if re.match(f"prefsieve {pattern}", told.text):
            words += [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
            words += [option for option in options if option not in words]
    return words


@pytest.mark.parametrize("told", HERE, ids=lambda told: told.text)
def test_a_command_does_what_it_should(told: Told, results: dict[str, Result]) -> None:
    result = results[told.text]
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    assert result.out.strip() or told.words[0] == "find"


def test_every_recipe_has_a_page_that_runs_it() -> None:
    for recipe in RECIPES:
        page = ROOT / "docs" / "howto" / f"{recipe}.md"
        words = [told.words for told in COMMANDS if told.page == str(page.relative_to(ROOT))]
        assert any(each[1:3] == ["init", recipe] for each in words), recipe
        assert any(each[1] in ("curate", "experiment") and "--dry-run" not in each for each in words), recipe
