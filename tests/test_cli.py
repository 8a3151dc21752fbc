"""The command line: exit statuses, messages instead of tracebacks, and output that scripts can read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import (
    Command,
    Curated,
    copy_store,
    curate_values,
    files_below,
    prompts,
    python,
    scorer,
    write_jsonl,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts and a configuration, to work in."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "prompts.jsonl", prompts(20))
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "curate.yaml"
    path.write_text(yaml.safe_dump(curate_values("prompts.jsonl", **changes)))
    return path


# --- what is wrong is said in one message, with status 2 or 1


def test_help_and_its_absence(cli: Command) -> None:
    shown = cli("--help")
    assert shown.status == 0
    for command in (
        "init",
        "curate",
        "train",
        "evaluate",
        "experiment",
        "subsets",
        "show",
        "verify",
        "doctor",
        "deploy",
        "demo",
    ):
        assert command in shown.out
    assert cli("curate").status == 2
    assert cli("no-such-command").status == 2
    assert cli("curate", "a.yaml", "--no-such-option").status == 2


def break_file(content: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / "curate.yaml").write_text(content)
        return []

    return prepare


def put(**changes: Any) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        write_config(folder, **changes)
        return []

    return prepare


def options(*given: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(given)


def empty_prompts(folder: Path) -> list[str]:
    (folder / "prompts.jsonl").write_text("")
    return []


def same_function_twice(folder: Path) -> list[str]:
    (folder / "length.py").write_text("def score(prompt, text): return len(text)")
    scorers = [{"name": name, "type": "function", "function": "length.py:score"} for name in ("one", "two")]
    write_config(folder, score={"scorers": scorers})
    return []


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: (folder / "curate.yaml").unlink(), ["curate.yaml: cannot be read", "check the path"]),
        (break_file("ingest: [unclosed"), ["curate.yaml: not YAML"]),
        (break_file("just words"), ["a configuration is a mapping"]),
        (put(ingest={"source": "prompts.jsonl", "shardsize": 3}), ["ingest.shardsize: no such field"]),
        (options("--set", "generate.samples=0"), ["generate.samples", "greater than or equal to 1", "got 0"]),
        (options("--set", "generate.samples"), ["--set 'generate.samples': write field=value"]),
        (
            put(generate={"generators": [{"name": "g", "model": "./no-such-model"}]}),
            ["generate.generators.0.model", "'./no-such-model' does not exist", "check the path"],
        ),
        (
            put(generate={"generators": [{"name": "g", "model": "nobody/no-such-model"}]}),
            ["generate.generators.0.model", "'nobody/no-such-model'", "check the name, or the network"],
        ),
        (
            put(generate={"generators": [{"name": "g", "model": "policy:absent"}]}),
            ["no policy 'absent'", "there are: none yet"],
        ),
        (
            put(score={"scorers": [{"name": "r", "model": "./no-such-model"}]}),
            ["score.scorers.0.model", "'./no-such-model' does not exist"],
        ),
        (
            put(score={"scorers": [{"name": "f", "type": "function", "function": "absent.py:score"}]}),
            ["function 'absent.py:score'", "no module or file", "check the path"],
        ),
        (same_function_twice, ["score.scorers: 'one' and 'two' are the same model or function", "remove one"]),
        (empty_prompts, ["ingest.source 'prompts.jsonl' holds no rows"]),
        (put(ingest={"source": "absent.jsonl"}), ["ingest.source: 'absent.jsonl' does not exist; check the path"]),
        (put(ingest={"source": "nobody/no-such-data"}), ["ingest.source: 'nobody/no-such-data'"]),
        (options("--store", "gs://bucket"), ["store: 'gs://bucket' is neither a folder nor an s3://BUCKET URL"]),
    ],
)
def test_a_mistake_in_the_configuration_ends_with_status_2_before_anything_starts(
    prepare: Callable[[Path], Any], words: list[str], cli: Command, place: Path
) -> None:
    given = prepare(place) or []
    for extra in ([], ["--dry-run"], ["--json"]):
        result = cli("curate", "curate.yaml", *given, *extra)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("prefsieve: ")
        for word in words:
            assert word in result.err


def test_a_store_that_cannot_be_used_ends_with_status_1(cli: Command, place: Path) -> None:
    (place / "file").write_text("in the way")
    result = cli("curate", "curate.yaml", "--store", place / "file" / "store")
    assert (result.status, result.out) == (1, "")
    assert "cannot be used" in result.err
    assert "Check that the folder can be created and written" in result.err


@pytest.mark.parametrize("command", [["curate", "curate.yaml"], ["subsets"], ["show", "top"], ["verify", "top"]])
def test_a_bucket_that_cannot_be_reached_is_said_at_once(
    command: list[str], cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it, and it refuses
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        started = time.monotonic()
        result = cli(*command, "--store", "s3://bucket/prefix")
        assert time.monotonic() - started < 20
    assert (result.status, result.out) == (1, "")
    assert "store s3://bucket/prefix cannot be used" in result.err
    assert "AWS_ENDPOINT_URL" in result.err
    assert "very-secret" not in result.err


# --- dry runs and doctor


def test_a_dry_run_says_what_would_be_done_and_does_nothing(cli: Command, place: Path) -> None:
    result = cli("curate", "curate.yaml", "--dry-run", "--json", "--store", place / "store")
    assert result.status == 0
    work = {row["what"]: row["to do"] for row in result.json["work"]}
    assert work == {
        "prompts.jsonl": "read the source",
        "policy": "4 samples per prompt",
        "reward": "a reward per sample",
    }
    assert not (place / "store").exists()
    assert "4 samples per prompt" in cli("curate", "curate.yaml", "--dry-run").out


def test_a_dry_run_tells_what_is_left_to_do(cli: Command, fake_run: Curated, tmp_path: Path) -> None:
    path = tmp_path / "curate.yaml"
    path.write_text(yaml.safe_dump(fake_run.config.model_dump(mode="json")))
    before = files_below(Path(fake_run.store.url))
    done = cli("curate", path, "--dry-run", "--json", "--store", fake_run.store.url).json
    nothing = "nothing, all in the store"
    assert [row["to do"] for row in done["work"]] == ["40 prompts, all in the store", nothing, nothing, nothing]
    more = cli("curate", path, "--dry-run", "--json", "--store", fake_run.store.url, "--set", "generate.samples=6").json
    missing = "80 samples in 3 files"
    assert [row["to do"] for row in more["work"]][1:] == [missing, missing, "a reward per sample"]
    other = ["--set", "score.scorers.0.max_model_len=99"]
    rated = cli("curate", path, "--dry-run", "--json", "--store", fake_run.store.url, *other).json
    assert [row["to do"] for row in rated["work"]][1:] == [nothing, nothing, "320 rewards in 6 files"]
    assert files_below(Path(fake_run.store.url)) == before


DRY_RUN = """
import sys
from flows.cli import main
sys.argv = ["prefsieve", "curate", "curate.yaml", "--dry-run", "--json", "--store", "store"]
try:
    main()
finally:
    heavy = ("ray", "torch", "transformers", "vllm", "prefect", "trl")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def test_a_dry_run_loads_nothing_that_could_start(place: Path) -> None:
    done = python(DRY_RUN, cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["work"]
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_doctor_says_what_is_well_and_what_is_not(cli: Command, place: Path) -> None:
    well = cli("doctor", "curate.yaml", "--json", "--store", place / "store")
    assert well.status == 0
    checks = {row["what"]: row for row in well.json["checks"]}
    assert all(row["ok"] for row in checks.values())
    assert "two runs may share this store" in checks[f"store {place / 'store'}"]["found"]
    assert checks["prompts prompts.jsonl"]["found"] == "format jsonl"
    write_config(place, score={"scorers": [{"name": "r", "model": "./absent"}, scorer("s")]})
    ill = cli("doctor", "curate.yaml", "--json", "--store", place / "store")
    assert ill.status == 1
    wrong = [row for row in ill.json["checks"] if not row["ok"]]
    assert [row["what"] for row in wrong] == ["scorer r"]
    assert "'./absent' does not exist" in wrong[0]["found"]
    assert cli("doctor").status == 0
    assert "FAILS" in cli("doctor", "curate.yaml").out


def test_doctor_takes_the_configuration_of_any_flow(cli: Command, place: Path, fake_run: Curated) -> None:
    train = {"name": "p", "subset": "top", "policy": {"model": "./absent"}}
    (place / "train.yaml").write_text(yaml.safe_dump(train))
    result = cli("doctor", "train.yaml", "--json", "--store", fake_run.store.url)
    found = {row["what"]: row for row in result.json["checks"]}
    assert found["subset top"]["found"] == str(fake_run.versions[0])
    assert not found["model ./absent"]["ok"]


# --- the shelf


def test_subsets_lists_what_is_published(cli: Command, fake_run: Curated) -> None:
    listed = cli("subsets", "--store", fake_run.store.url, "--json").json
    assert listed["store"] == fake_run.store.url
    assert [row["name"] for row in listed["subsets"]] == ["bottom", "delta", "random", "top"]
    assert {row["version"] for row in listed["subsets"]} == {version.version for version in fake_run.versions}
    assert all(row["latest"] for row in listed["subsets"])
    table = cli("subsets", "--store", fake_run.store.url)
    assert "bottom" in table.out
    empty = cli("subsets", "--store", Path(fake_run.store.url) / "nowhere", "--json")
    assert (empty.status, empty.json["subsets"]) == (0, [])


def test_the_store_comes_from_the_environment_when_none_is_given(
    cli: Command, fake_run: Curated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFSIEVE_STORE", fake_run.store.url)
    assert len(cli("subsets", "--json").json["subsets"]) == 4


def test_show_tells_what_a_subset_holds(cli: Command, fake_run: Curated) -> None:
    version = fake_run.versions[3]
    shown = cli("show", str(version), "--store", fake_run.store.url, "--json").json
    assert (shown["name"], shown["version"]) == (version.name, version.version)
    assert shown["manifest"]["content"]["summary"]["rows"] == 12
    assert len(shown["examples"]) == 3
    text = cli("show", "delta", "--store", fake_run.store.url).out
    assert version.version in text


def test_verify_passes_and_fails_by_its_exit_status(cli: Command, fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    good = cli("verify", "top", "--store", store.url, "--json")
    assert (good.status, good.json["problems"], good.json["files"]) == (0, [], 3)
    readme = Path(store.full(f"{fake_run.versions[0].place}/README.md"))
    readme.write_bytes(readme.read_bytes() + b" ")
    bad = cli("verify", "top", "--store", store.url, "--json")
    assert (bad.status, bad.json["problems"]) == (1, ["README.md: sha256 differs from the manifest's"])
    told = cli("verify", "top", "--store", store.url)
    assert told.status == 1
    assert "README.md" in told.out


def test_a_damaged_manifest_is_told_by_verify_and_refused_by_the_others(
    cli: Command, fake_run: Curated, tmp_path: Path
) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    Path(store.full(f"{fake_run.versions[0].place}/manifest.json")).write_bytes(b'{"content": ')
    verified = cli("verify", "top", "--store", store.url, "--json")
    assert (verified.status, verified.json["problems"]) == (1, ["manifest.json: cannot be read"])
    for command in (["show", "top"], ["subsets"]):
        result = cli(*command, "--store", store.url)
        assert (result.status, result.out) == (1, "")
        assert "manifest.json" in result.err
        assert "is damaged" in result.err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_an_unknown_subset_ends_with_status_2(command: str, cli: Command, fake_run: Curated) -> None:
    for wanted, words in (("absent", "there are: bottom, delta"), ("top@ffffffff", "top@ffffffff does not exist")):
        result = cli(command, wanted, "--store", fake_run.store.url, "--json")
        assert (result.status, result.out) == (2, "")
        assert words in result.err


def test_training_on_an_unknown_subset_ends_with_status_2(cli: Command, place: Path) -> None:
    train = {"name": "p", "subset": "absent", "policy": {"model": "./absent"}}
    (place / "train.yaml").write_text(yaml.safe_dump(train))
    result = cli("train", "train.yaml", "--store", place / "store")
    assert result.status == 2
    assert "no subset 'absent'" in result.err
