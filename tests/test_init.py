"""`prefsieve init`: recipes that are accepted, marked where one has to change them, and never written over a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli import FLOWS, flow_of, load_values, parse
from flows.init import MARK, RECIPES
from tests.conftest import Command, prompts, python, write_jsonl
from tests.services import ROOT

FOLDER = ROOT / "flows" / "recipes"
FAKE = ["--set", "generate.generators.0.engine=fake", "--set", "score.scorers.0.engine=fake"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFSIEVE_STORE", raising=False)


def test_the_recipes_are_what_lies_in_their_folder() -> None:
    assert sorted(RECIPES) == sorted(path.stem for path in FOLDER.iterdir())


def test_without_a_recipe_it_lists_them_with_a_line_each(cli: Command) -> None:
    listed = cli("init", "--json").json["recipes"]
    assert [row["recipe"] for row in listed] == list(RECIPES)
    assert {row["flow"] for row in listed} == {"curate", "experiment"}
    shown = cli("init")
    assert shown.status == 0
    lines = [line for line in shown.out.splitlines() if "•" in line]
    assert len(lines) == len(RECIPES), "no line is folded"
    assert all(row["recipe"] in line and row["what"] in line for row, line in zip(listed, lines, strict=True))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_written_as_a_configuration_that_its_flow_accepts(recipe: str, cli: Command) -> None:
    written = cli("init", recipe)
    path = Path(f"{recipe}.yaml")
    assert path.read_text() == (FOLDER / path).read_text()
    values = load_values(path, [], "")
    flow = flow_of(values)
    assert isinstance(parse(flow, values, path), FLOWS[flow])
    for command in (f"doctor {path}", f"{flow} {path} --dry-run", f"{flow} {path} "):
        assert f"prefsieve {command}" in written.out


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_about_somebodys_own_data_and_machines_is_marked_and_told(recipe: str, cli: Command) -> None:
    told = cli("init", recipe, "--json").json["change"]
    lines = Path(f"{recipe}.yaml").read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if MARK in line] == told
    for line in lines:
        name = re.match(r"\s*(source|prompt|workers|model): (?!source)", line)
        if name and "Skywork-Reward-V2-Qwen3-4B" not in line:  # a reward model is nobody's own
            assert MARK in line, line
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("recipe", ["pvar", "adaptive", "delta"])
def test_a_recipe_of_prompts_has_a_dry_run_with_its_models_faked(recipe: str, cli: Command) -> None:
    cli("init", recipe)
    write_jsonl(Path("prompts.jsonl"), prompts(20))
    weak = ["--set", "generate.generators.1.engine=fake", "--set", "generate.generators.1.seed=1"]
    planned = cli("curate", f"{recipe}.yaml", "--dry-run", "--json", *FAKE, *(weak if recipe == "delta" else []))
    assert planned.status == 0, planned.err
    stages = [row["stage"] for row in planned.json["work"]]
    assert stages == ["ingest", *["generate"] * (2 if recipe == "delta" else 1), "score"]


def test_the_recipe_of_an_import_selects_from_the_files_that_ship(cli: Command) -> None:
    cli("init", "import")
    source = f"import.source={ROOT / 'examples' / 'imports' / 'long.jsonl'}"
    column = "import.ratings.0.column=correctness"
    planned = cli("curate", "import.yaml", "--dry-run", "--json", "--set", source, "--set", column)
    assert planned.status == 0, planned.err
    names = ["margin-top", "margin-top-random", "margin-top-length-matched"]
    assert [row["name"] for row in planned.json["subsets"]] == names
    assert all(row["pairs"] > 0 for row in planned.json["subsets"])


def test_a_file_is_overwritten_by_force_only(cli: Command) -> None:
    Path("mine.yaml").write_text("mine")
    refused = cli("init", "pvar", "mine.yaml")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err == "prefsieve: mine.yaml: exists; name another file, or overwrite it by --force\n"
    assert Path("mine.yaml").read_text() == "mine"
    assert cli("init", "pvar", "mine.yaml", "--force").status == 0
    assert "ingest" in yaml.safe_load(Path("mine.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pvr"], "no recipe 'pvr'; there are: pvar, delta, mixdpo, adaptive, import"),
        (["../recipes/pvar"], "no recipe '../recipes/pvar'"),
        (
            ["pvar", "absent/pvar.yaml"],
            "absent/pvar.yaml: cannot be written: No such file or directory; make the folder",
        ),
        (["pvar", "."], ".: is a folder; name a file in it"),
        (["pvar", ".", "--force"], ".: is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_written_ends_with_status_2_and_one_message(
    arguments: list[str], words: str, cli: Command
) -> None:
    refused = cli("init", *arguments)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith(f"prefsieve: {words}") and refused.err.count("\n") == 1
    assert not list(Path().iterdir())


# --- completion in a shell

PREFSIEVE = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "prefsieve"
from flows.cli import main
main()
"""

COMPLETE = """
prefsieve --install-completion >/dev/null && . ~/.bashrc
COMP_WORDS=({words} "") COMP_CWORD={place}
_prefsieve_completion prefsieve
echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [("prefsieve init", list(RECIPES)), ("prefsieve submit", list(FLOWS)), ("prefsieve curate", [])],
)
def test_bash_completes_recipes_and_flows_once_it_is_told_to(words: str, completed: list[str]) -> None:
    """Of a file nothing is said, and bash completes files by itself."""
    Path("prefsieve").write_text(PREFSIEVE)
    Path("prefsieve").chmod(0o755)
    environment = {**os.environ, "HOME": str(Path().absolute()), "PATH": f".:{os.environ['PATH']}"}
    script = COMPLETE.format(words=words, place=len(words.split()))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == completed


@pytest.mark.parametrize(
    ("shell", "given"),
    [
        ("bash", {"COMP_WORDS": "prefsieve init p", "COMP_CWORD": "2"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "prefsieve init p"}),
    ],
)
def test_completion_loads_nothing_heavy(shell: str, given: dict[str, str]) -> None:
    code = f"""
import os, sys
os.environ |= {{"_PREFSIEVE_COMPLETE": "complete_{shell}"}} | {given}
sys.argv = ["prefsieve"]
from flows.cli import main
try:
    main()
finally:
    heavy = ("ray", "torch", "transformers", "vllm", "prefect", "trl", "pyarrow")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = python(code, cwd=ROOT)
    assert "pvar" in done.stdout and "mixdpo" not in done.stdout
    assert done.stderr.split() == ["[]"]
