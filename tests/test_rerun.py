"""Nothing is paid for twice: reruns start no engine, and more samples, scorers or prompts cost only themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.config import PairingConfig
from tasks.generate import completions_path, generate
from tasks.ingest import ingest, shards_of
from tasks.pair import pair
from tasks.score import score
from tasks.sections import ScorerConfig
from tasks.store import Store
from tests.conftest import Curated, copy_store, curate_stages, files_below, prompts, write_jsonl
from tests.services import JOINING, ROOT, environment

NOTHING = {"engine_starts": 0, "requests": 0, "samples": 0}


def without_strong(run: Curated) -> Any:
    """The run's configuration with one of its two generators."""
    (weak,) = [config for config in run.config.generate.generators if config.name == "weak"]
    return run.config.generate.model_copy(update={"generators": [weak]})


# --- the stages as functions


def test_a_rerun_starts_no_engine_and_gives_the_same_versions(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url))
    again = curate_stages(fake_run.config, store)
    assert again.engine_work == NOTHING
    assert again.prompts.work.shards_made == again.completions.work.shards_made == again.rewards.work.shards_made == 0
    assert [table.work.shards_made for table in again.pairs] == [0, 0]
    assert list(map(str, again.versions)) == list(map(str, fake_run.versions))
    assert again.rewards.counts == fake_run.rewards.counts
    assert files_below(Path(store.url)) == before


@pytest.mark.parametrize(
    ("gone", "engines"),
    [
        (["pairs", "subsets/*/[0-9a-f]*", "fingerprints", "faults"], False),
        (["rewards", "pairs", "subsets/*/[0-9a-f]*"], True),
        (["completions", "rewards", "pairs", "subsets/*/[0-9a-f]*"], True),
    ],
    ids=["pairs", "rewards", "completions"],
)
def test_what_operations_lets_somebody_delete_is_made_again(
    gone: list[str], engines: bool, fake_run: Curated, tmp_path: Path
) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = set(files_below(Path(store.url)))
    for pattern in gone:
        for folder in Path(store.url).glob(pattern):
            shutil.rmtree(folder)
    again = curate_stages(fake_run.config, store)
    assert list(map(str, again.versions)) == list(map(str, fake_run.versions))
    assert (again.engine_work != NOTHING) == engines
    assert before - set(files_below(Path(store.url))) <= {path for path in before if path.startswith("fingerprints")}


def test_more_samples_cost_only_the_further_ones(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url))
    config = without_strong(fake_run).model_copy(update={"samples": 8})
    completions = generate(config, fake_run.prompts, store)
    assert (completions.work.engine_starts, completions.work.requests) == (1, 40)
    assert completions.work.samples == 4 * 40
    rewards = score(fake_run.config.score, completions, store)
    assert rewards.work.samples == 4 * 40
    assert (rewards.counts.into, rewards.counts.out) == (320, 320)
    after = files_below(Path(store.url))
    assert {path: after[path] for path in before} == before
    fingerprint = completions.generators["weak"]
    for shard in shards_of(store, fake_run.prompts):
        assert store.exists(completions_path(fingerprint, shard["prompts"], (4, 8)))
    assert generate(config, fake_run.prompts, store).work.requests == 0
    fewer = generate(config.model_copy(update={"samples": 6}), fake_run.prompts, store)
    assert (fewer.work.requests, score(fake_run.config.score, fewer, store).counts.out) == (0, 240)


def test_another_scorer_generates_nothing_and_only_the_new_one_is_asked(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url))
    (tmp_path / "length.py").write_text("def score(prompt, text):\n    return len(text)\n")
    length = ScorerConfig(name="length", type="function", function=f"{tmp_path}/length.py:score")
    completions = generate(fake_run.config.generate, fake_run.prompts, store)
    scorers = [*fake_run.config.score.scorers, length]
    rewards = score(fake_run.config.score.model_copy(update={"scorers": scorers}), completions, store)
    assert completions.work.requests == 0
    assert (rewards.work.engine_starts, rewards.work.samples) == (1, 320)
    assert (rewards.work.shards_made, rewards.work.shards_reused) == (6, 6)
    made = set(files_below(Path(store.url))) - set(before)
    made.remove(f"fingerprints/{rewards.scorers['length']}.json")
    [took] = [path for path in made if path.startswith(f"costs/score/{rewards.scorers['length']}/")]
    made.remove(took)
    assert len(made) == 6
    assert all(path.startswith(f"rewards/{rewards.scorers['length']}/") for path in made)
    after = files_below(Path(store.url))
    assert {path: after[path] for path in before} == before


def test_more_prompts_cost_only_the_new_ones(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url) / "completions")
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(50))
    grown = fake_run.config.ingest.model_copy(update={"source": str(source)})
    prompt_set = ingest(grown, store)
    shards = shards_of(store, prompt_set)
    old = shards_of(store, fake_run.prompts)
    assert [shard["rows"] for shard in shards] == [16, 16, 8, 10]  # another file, cut where the first one was
    assert shards[:3] == old
    completions = generate(without_strong(fake_run), prompt_set, store)
    rewards = score(fake_run.config.score, completions, store)
    assert completions.work.requests == 10
    assert rewards.counts.out == 200
    after = files_below(Path(store.url) / "completions")
    assert {path: after[path] for path in before} == before


def test_another_source_label_or_kept_column_costs_only_functions(fake_run: Curated, tmp_path: Path) -> None:
    """A model sees the messages alone; a function sees source and kept columns too."""
    store = copy_store(fake_run.store, tmp_path / "store")
    rows = [{**row, "source": "another", "answer": index} for index, row in enumerate(prompts(40))]
    source = write_jsonl(tmp_path / "labelled.jsonl", rows)
    (tmp_path / "answer.py").write_text("def score(prompt, text):\n    return prompt.fields['answer']\n")
    answer = ScorerConfig(name="answer", type="function", function=f"{tmp_path}/answer.py:score")
    columns = fake_run.config.ingest.columns.model_copy(update={"keep": ["answer"]})
    ingest_config = fake_run.config.ingest.model_copy(update={"source": str(source), "columns": columns})
    prompt_set = ingest(ingest_config, store)
    assert prompt_set.digest != fake_run.prompts.digest
    completions = generate(fake_run.config.generate, prompt_set, store)
    scorers = [*fake_run.config.score.scorers, answer]
    rewards = score(fake_run.config.score.model_copy(update={"scorers": scorers}), completions, store)
    assert (completions.work.engine_starts, completions.work.requests) == (0, 0)
    assert (rewards.work.engine_starts, rewards.work.samples) == (1, 320)
    table = pair(fake_run.config.pair[0], rewards, store)
    sources = store.read_table(f"pairs/{table.digest}/pairs.parquet", ["source"])["source"].to_pylist()
    assert set(sources) == {"another"}
    by_answer = pair(PairingConfig(name="answers", scorer="answer"), rewards, store)
    assert by_answer.counts.dropped == {"rewards tie": 40}


# --- the command


@dataclass(frozen=True)
class Run:
    """One `prefsieve curate --json` in a process of its own."""

    status: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.out))

    def work(self, name: str) -> dict[str, int]:
        return {row["stage"]: row[name] for row in self.report["stages"]}

    @property
    def versions(self) -> list[str]:
        return [f"{row['name']}@{row['version']}" for row in self.report["subsets"]]


WITNESS = """
import sys
from flows.cli import main
try:
    main()
finally:
    ray = sys.modules.get("ray")
    print("ray started:", ray is not None and ray.is_initialized() or "ray.data" in sys.modules, file=sys.stderr)
    print("torch loaded:", "torch" in sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def commands(
    fake_run: Curated, local_ray: Any, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """The configuration of the run in this process, by command, in a store of its own: broken scorer, mended, again.

    The commands join the Ray of this process instead of starting one each.
    """
    folder = tmp_path_factory.mktemp("commands")
    address = f"ray_address={local_ray.get_runtime_context().gcs_address}"
    config = folder / "curate.yaml"
    config.write_text(yaml.safe_dump(fake_run.config.model_dump(mode="json")))
    env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(folder / "prefect"), **JOINING)

    def curate(*options: str) -> Run:
        arguments = ["curate", str(config), "--store", str(folder / "store"), "--json"]
        done = subprocess.run(
            [sys.executable, "-c", WITNESS, *arguments, "--set", address, *options],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return {
        "broken": curate("--set", "score.scorers.0.engine_args={nan: true}"),
        "mended": curate(),
        "again": curate(),
    }


def test_a_scorer_that_gives_nan_fails_the_command_with_one_clear_message(commands: dict[str, Run]) -> None:
    run = commands["broken"]
    assert (run.status, run.out) == (1, "")
    (message,) = [line for line in run.err.splitlines() if line.startswith("prefsieve: ")]
    assert "rewards of scorer 'reward' are missing, more than max_missing 5%: not finite: nan" in message
    assert "The completions are kept; mend the scorer and run again." in message
    assert "Traceback" not in run.err


def test_a_mended_scorer_finds_the_completions_that_were_paid_for(commands: dict[str, Run]) -> None:
    run = commands["mended"]
    assert run.status == 0, run.err
    assert run.work("requests")["generate"] == run.work("engine_starts")["generate"] == 0
    assert run.work("engine_starts")["score"] == 1


def test_a_rerun_of_the_command_starts_nothing_and_publishes_the_same(commands: dict[str, Run]) -> None:
    run = commands["again"]
    assert run.status == 0, run.err
    for what in ("engine_starts", "requests", "tokens", "shards_made"):
        assert set(run.work(what).values()) == {0}, what
    assert run.versions == commands["mended"].versions
    assert "ray started: False" in run.err
    assert "torch loaded: False" in run.err
    assert sum(row["seconds"] for row in run.report["stages"]) < 5


def test_the_command_and_the_functions_publish_the_same_versions_in_their_own_stores(
    commands: dict[str, Run], fake_run: Curated
) -> None:
    assert commands["again"].versions == list(map(str, fake_run.versions))


def test_the_json_output_is_one_document_and_the_logs_are_elsewhere(commands: dict[str, Run]) -> None:
    for name in ("mended", "again"):
        assert commands[name].out.count("\n") == 1
        assert isinstance(json.loads(commands[name].out), dict)
        assert "generate" in commands[name].err


def test_the_rows_of_a_report_add_up(commands: dict[str, Run]) -> None:
    for row in commands["again"].report["stages"]:
        assert row["in"] == row["out"] + sum(row["dropped"].values()), row


def test_generators_are_found_by_content_not_by_position_or_company(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    weak_first = fake_run.config.generate.generators[::-1]
    again = generate(fake_run.config.generate.model_copy(update={"generators": weak_first}), fake_run.prompts, store)
    assert again.work.requests == 0
    assert Store(store.url).list("completions") == fake_run.store.list("completions")
