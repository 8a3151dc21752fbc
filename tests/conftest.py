"""Builders and fixtures: real components, kept small.

Runs that many tests look at are made once a session; a test that changes one works on a copy of its store.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Before anything imports a library that reads them: the tests need no network and use nobody's caches or servers.
for _name in [name for name in os.environ if name.startswith(("PREFSIEVE_", "AWS_", "PREFECT_", "RAY_"))]:
    del os.environ[_name]
_SESSION_FOLDER = tempfile.TemporaryDirectory(prefix="prefsieve-tests-")
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "XDG_CACHE_HOME": f"{_SESSION_FOLDER.name}/cache",
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{_SESSION_FOLDER.name}/hypothesis",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # threads of tiny models only wait for each other
        "JUDGE_KEY": secrets.token_hex(16),  # before Ray starts: its workers inherit it
    }
)

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config import CurateConfig
from tasks.costs import cost_of
from tasks.records import Completions, Pairs, PromptSet, Rewards, Selection, Version
from tasks.sections import PricesConfig
from tasks.store import Store
from tests.services import ROOT, prefect_server

hypothesis.settings.register_profile("fast", deadline=None, max_examples=60, database=None, derandomize=True)
hypothesis.settings.load_profile("fast")


# --- builders


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(number: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with a prompt each, from two sources, and a column for function scorers."""
    return [
        {"prompt": f"what is {i} plus {i}", "source": f"part{i % 2}", "answer": 2 * i}
        for i in range(first, first + number)
    ]


def generator(name: str = "policy", **changes: Any) -> dict[str, Any]:
    return {"name": name, "engine": "fake", **changes}


def scorer(name: str = "reward", **changes: Any) -> dict[str, Any]:
    return {"name": name, "engine": "fake", **changes}


NO_COST = cost_of([], {}, PricesConfig())  # of a run that asked no engine


def curate_values(source: Path | str, **changes: Any) -> dict[str, Any]:
    """A small configuration on fake engines; a change replaces a whole section."""
    return {
        "ingest": {"source": str(source), "shard_size": 16},
        "generate": {"samples": 4, "generators": [generator()]},
        "score": {"scorers": [scorer()]},
        "subset": [{"name": "top", "steps": [{"rank": "pvar", "fraction": 0.25}]}],
        **changes,
    }


def curate_config(source: Path | str, **changes: Any) -> CurateConfig:
    return CurateConfig.model_validate(curate_values(source, **changes))


@dataclass(frozen=True)
class Curated:
    """The handles of one curate run, in the data's order."""

    config: CurateConfig
    store: Store
    prompts: PromptSet
    completions: Completions
    rewards: Rewards
    pairs: list[Pairs]
    selections: list[Selection]
    versions: list[Version]

    @property
    def engine_work(self) -> dict[str, int]:
        """What both GPU stages had to do."""
        both = (self.completions.work, self.rewards.work)
        return {name: sum(getattr(w, name) for w in both) for name in ("engine_starts", "requests", "samples")}


def curate_stages(config: CurateConfig, store: Store) -> Curated:
    """The stages of curate, as plain functions."""
    from tasks.generate import generate
    from tasks.ingest import ingest
    from tasks.pair import pair
    from tasks.publish import publish
    from tasks.score import score
    from tasks.subset import subset

    assert config.ingest and config.generate and config.score
    prompt_set = ingest(config.ingest, store)
    completions = generate(config.generate, prompt_set, store)
    rewards = score(config.score, completions, store)
    pairs = [pair(rule, rewards, store, ensembles=config.ensembles) for rule in config.pair]
    tables = {table.name: table for table in pairs}
    selections = [
        taken for wanted in config.subset for taken in subset(wanted, tables[wanted.pairs or pairs[0].name], store)
    ]
    versions = [
        publish(config.publish, wanted, taken, store)
        for wanted, taken in zip(config.subset_of_each_name(), selections, strict=True)
    ]
    return Curated(config, store, prompt_set, completions, rewards, pairs, selections, versions)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all Parquet files below a folder, in the files' order."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.rglob("*.parquet"))]).to_pylist()


def files_below(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Path -> (size, time of change, inode) of every file below a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ino) for f in files}


def copy_store(store: Store, target: Path) -> Store:
    """A store with the same files, free to be changed."""
    shutil.copytree(store.url, target, copy_function=shutil.copy2)
    return Store(target)


def python(code: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A program in a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, timeout=120, capture_output=True, text=True, check=False)


class Result(NamedTuple):
    """What a command ended with."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Command = Callable[..., Result]


# --- fixtures


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`prefsieve` in this process, as the installed script calls it."""
    from flows.cli import main

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["prefsieve", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def session_folder() -> Path:
    return Path(_SESSION_FOLDER.name)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Any]:
    """One Ray on this machine for all tests that run engines in its actors."""
    from tasks.cluster import connect

    ray = connect("local")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def fake_run(local_ray: Any, session_folder: Path) -> Curated:
    """40 prompts in shards of 16, 16 and 8; two fake generators, 4 samples, one fake reward model; read it only."""
    folder = session_folder / "fake-run"
    source = write_jsonl(folder / "prompts.jsonl", prompts(40))
    config = curate_config(
        source,
        generate={
            "samples": 4,
            "generators": [generator("strong", engine_args={"quality": 1.0}), generator("weak")],
        },
        pair=[
            {"name": "on-policy", "generators": ["weak"]},
            {"name": "delta", "rule": "generator_delta", "generators": ["strong", "weak"]},
        ],
        subset=[
            {"name": "top", "pairs": "on-policy", "steps": [{"rank": "pvar", "fraction": 0.25}]},
            {"name": "random", "pairs": "on-policy", "steps": [{"rank": "random", "fraction": 0.25}]},
            {"name": "bottom", "pairs": "on-policy", "steps": [{"rank": "pvar", "keep": "bottom", "fraction": 0.25}]},
            {"name": "delta", "pairs": "delta", "steps": [{"rank": "margin", "count": 12}]},
        ],
    )
    return curate_stages(config, Store(folder / "store"))


@dataclass(frozen=True)
class TinyModels:
    """Folders of a random Llama and a random one-label reward model with one character-level tokenizer."""

    generator: Path
    reward: Path
    room: int  # longest sequence in tokens


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message['role'][0] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_models(session_folder: Path) -> TinyModels:
    """Built on the spot; the padding token has id 0, as in many real tokenizers."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 >[].-\n"
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,  # random, but with an opinion: a flat distribution would hide mistakes
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    folders = TinyModels(session_folder / "tiny" / "generator", session_folder / "tiny" / "reward", 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folders.generator)
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(folders.reward)
    for folder in (folders.generator, folders.reward):
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def prefect_api(session_folder: Path) -> Iterator[str]:
    """One Prefect server for all commands that run flows: each would start its own otherwise."""
    with prefect_server(session_folder / "prefect") as url:
        yield url
