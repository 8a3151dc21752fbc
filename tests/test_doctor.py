"""What the doctor finds out: whether models fit, load and say what they should, and what a run will take."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flows.cli import load_values, parse
from flows.doctor import examine, plan
from flows.markdown import plan_markdown
from tasks import footprint as footprints
from tasks import trial
from tasks.config import TrainConfig
from tasks.costs import Speed, known_speed, remember_speed
from tasks.engines.loop import EngineLoop
from tasks.errors import ConfigError, RunError
from tasks.experiments import ExperimentConfig
from tasks.faults import EngineDied
from tasks.footprint import Footprint, fits, fits_training, footprint, gpu_memory
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.sections import GeneratorConfig, ScorerConfig
from tasks.store import Store
from tasks.training import PolicyConfig
from tasks.trial import golden_rewards, models_of
from tests.conftest import TinyModels, curate_config, curate_values, generator, prompts, scorer, write_jsonl
from tests.services import ROOT

GIB = 2**30


def tensors(file: Path, size: int, dtype: str = "BF16") -> None:
    """A safetensors file with one tensor of so many bytes."""
    tensor = {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + size)  # a hole: a hole takes no room


def model(folder: Path, weights: int, stored: str = "BF16", **about: Any) -> Path:
    """A folder that says what an 8B Llama says, with weights of the given size in bytes."""
    folder.mkdir()
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    config = {"dtype": "bfloat16", "max_position_embeddings": 8192, **llama, **about}
    (folder / "config.json").write_text(json.dumps(config))
    tensors(folder / "model.safetensors", weights, stored)
    return folder


def served(path: Path | str, engine: str = "vllm", **changes: Any) -> GeneratorConfig:
    return GeneratorConfig.model_validate({"name": "x", "engine": engine, "model": str(path), "gpus": 1, **changes})


def weights_of(config: GeneratorConfig, store: Store) -> float:
    needs = footprint(config, store)
    assert isinstance(needs, Footprint)
    return needs.weights


def test_what_a_model_needs_is_told_from_its_files(tmp_path: Path, store: Store) -> None:
    ours = served(model(tmp_path / "8b", 16 * GIB))
    # 2 x 32 layers x 8 heads x 128 dimensions x 2 bytes = 128 KiB per token
    assert footprint(ours, store) == Footprint(16 * GIB, 128 * 1024, 8192)
    assert footprint(ours.model_copy(update={"dtype": "float32"}), store) == Footprint(32 * GIB, 256 * 1024, 8192)
    assert fits(ours, store, memory=0).endswith(": 18.48 GiB per GPU for one sequence of 8,192 tokens")
    # 0.92 x 80 - 16 GiB = 57.6 GiB, 1 GiB per sequence
    assert fits(ours, store, memory=80 * GIB).endswith("room for 58 sequences of 8,192 tokens at once")
    two = ours.model_copy(update={"gpus": 2})
    assert fits(two, store, memory=24 * GIB).endswith("room for 28 sequences of 8,192 tokens at once")
    with pytest.raises(ConfigError, match=r"do not fit 14\.72 GiB; raise gpus"):
        fits(ours, store, memory=16 * GIB)


def test_too_little_room_for_the_cache_is_told_and_fails_nothing(tmp_path: Path, store: Store) -> None:
    """What it takes is told too high of latent attention, sliding windows and state spaces."""
    ours = served(model(tmp_path / "8b", 16 * GIB))
    words = fits(ours, store, memory=16.5 / 0.92 * GIB)
    assert "room for 4,096 tokens, less than one sequence of 8,192; if vLLM refuses to start, lower" in words


def test_transformers_has_one_gpu_and_reserves_no_cache(tmp_path: Path, store: Store) -> None:
    path = model(tmp_path / "8b", 16 * GIB)
    ours = served(path, "transformers", gpus=2)
    assert footprint(ours, store) == Footprint(16 * GIB, 0, 8192)
    assert fits(ours, store, memory=16.5 * GIB) == "16.00 GiB of weights: leave 0.50 GiB of one GPU"
    assert fits(ours, store, memory=0) == "16.00 GiB of weights, all on one GPU"
    with pytest.raises(ConfigError, match=r"do not fit a GPU of 12\.00 GiB, .* smaller dtype, or engine: vllm"):
        fits(ours, store, memory=12 * GIB)
    assert "room for" in fits(served(path, gpus=2), store, memory=12 * GIB), "vLLM splits it over both"


def test_the_arguments_of_vllm_decide_as_they_do_there(tmp_path: Path, store: Store) -> None:
    path = model(tmp_path / "8b", 16 * GIB)

    def needs(length: int = 0, **arguments: Any) -> Any:
        return footprint(served(path, max_model_len=length, engine_args=arguments), store)

    assert needs(4096).longest == 4096
    assert needs(4096, max_model_len=1024).longest == 1024, "engine_args go before"
    assert needs(4096, max_model_len=-1).longest == 8192, "as much as there is room for"
    assert needs(kv_cache_dtype="fp8_e4m3").per_token == 64 * 1024
    assert needs(dtype="float32", kv_cache_dtype="bfloat16") == Footprint(32 * GIB, 128 * 1024, 8192)
    half = served(path, engine_args={"gpu_memory_utilization": 0.5})
    assert "room for 24 sequences" in fits(half, store, memory=80 * GIB)
    quantised = served(path, engine_args={"quantization": "fp8"})
    assert fits(quantised, store, memory=GIB) == "not known: engine_args has quantization, which decides it"


def test_weights_are_counted_in_the_type_that_an_engine_loads_them_as(tmp_path: Path, store: Store) -> None:
    full = model(tmp_path / "full", 8 * GIB, "F32", dtype="float32")
    halved = model(tmp_path / "halved", 8 * GIB, "F32", dtype="bfloat16")
    silent = model(tmp_path / "silent", 8 * GIB, "F32", dtype=None)
    packed = model(tmp_path / "packed", 8 * GIB, "I32", dtype="bfloat16")
    for engine, of_silent in (("vllm", 4), ("transformers", 8)):  # vLLM halves float32 where config.json has no dtype
        sizes = [weights_of(served(path, engine), store) / GIB for path in (full, halved, silent, packed)]
        assert sizes == [8, 4, of_silent, 8]


def test_weights_that_lie_there_twice_are_counted_once(tmp_path: Path, store: Store) -> None:
    path = model(tmp_path / "8b", 2 * GIB)
    tensors(path / "consolidated.safetensors", 2 * GIB)
    tensors(path / "other.safetensors", GIB)
    assert weights_of(served(path), store) == 2 * GIB
    for name in ("a", "b"):
        tensors(path / f"{name}.safetensors", 3 * GIB)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_of(served(path), store) == 6 * GIB
    (path / "b.safetensors").unlink()
    assert footprint(served(path), store) == "not all of its files are here"
    for name in ("model.safetensors.index.json", "model.safetensors", "a.safetensors"):
        (path / name).unlink()
    assert weights_of(served(path), store) == GIB


def test_of_what_is_not_known_the_doctor_says_why(tmp_path: Path, store: Store) -> None:
    for absent in ("nobody/nothing", "models/of/mine", "./absent"):
        assert fits(served(absent), store) == "not known: its files are not here"
    path = model(tmp_path / "8b", GIB, text_config=None, num_hidden_layers=None, n_layer=32)
    assert footprint(served(path), store) == Footprint(GIB, 0, 8192)
    assert fits(served(path), store, memory=2 * GIB).startswith("1.00 GiB of weights: leave 0.84 GiB for a cache of")
    assert "its config.json does not say how large it is" in fits(served(path), store, memory=0)
    (path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        fits(served(path), store)
    (path / "model.safetensors").unlink()
    assert fits(served(path), store) == "not known: it has no safetensors"


def test_without_torch_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu_memory() == 0


def test_of_a_training_the_weights_alone_are_known(tmp_path: Path, store: Store) -> None:
    path = model(tmp_path / "8b", 16 * GIB)
    words = fits_training(PolicyConfig(model=str(path), gpus=1), store)
    assert words.startswith("not estimated; 32.00 GiB of weights in float32, and what training takes")
    assert fits_training(PolicyConfig(model="./absent"), store) == "not known: its files are not here"


def test_the_doctor_says_so_of_what_runs_on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = model(tmp_path / "8b", GIB // 16)
    (path / "tokenizer.json").write_text("{}")
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(4))
    policy = {"name": "policy", "engine": "vllm", "model": str(path), "gpus": 1}
    judge = {**policy, "name": "judge", "type": "judge"}
    config = curate_config(
        source,
        generate={"samples": 2, "generators": [policy, generator("other")]},
        score={"scorers": [judge]},
        store=str(tmp_path / "store"),
    )
    monkeypatch.setattr(footprints, "gpu_memory", lambda: GIB / 32)
    rows = {row["what"]: row for row in examine(config)["checks"] if row["what"].startswith("GPU memory")}
    assert list(rows) == ["GPU memory for generator policy", "GPU memory for scorer judge"]
    assert not any(row["ok"] for row in rows.values())
    elsewhere = config.model_copy(update={"ray_address": "auto"})  # what the GPUs here hold says nothing of those
    for row in (row for row in examine(elsewhere)["checks"] if row["what"] in rows):
        assert row["ok"] and row["found"].startswith("0.06 GiB of weights, 0.125 MiB of cache per token: 1.15 GiB per")


def experiment(path: str, source: Path, **changes: Any) -> ExperimentConfig:
    """One that curates, with an engine of each kind; model `path` is trained."""
    judges = [scorer("judge", type="judge"), scorer("duels", type="judge", judge={"mode": "pairwise"})]
    endpoint = {"name": "far", "type": "judge", "model": "m", "judge": {"base_url": "http://127.0.0.1:1"}}
    values = {
        "name": "small",
        "subsets": ["top"],
        "policy": {"model": path, "gpus": 1},
        "train": {"max_steps": 1},
        "curate": curate_values(source, score={"scorers": [scorer(), *judges]}),
        "evaluate": {
            "ingest": {"source": str(source)},
            "generate": {"samples": 2, "generators": [generator("reference")]},
            "score": {"scorers": [{"name": "f", "type": "function", "function": "statistics:mean"}, endpoint]},
        },
        **changes,
    }
    return ExperimentConfig.model_validate(values)


def test_of_an_experiment_each_model_is_tried_or_it_is_said_why_not(local_ray: Any, tmp_path: Path) -> None:
    path = str(model(tmp_path / "8b", GIB // 16))
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(4))
    config = experiment(path, source, store=str(tmp_path / "store"))
    rows = {row["what"]: row for row in examine(config, load=True)["checks"]}
    tried = {what: row["found"] for what, row in rows.items() if what.endswith(" loaded")}
    names = ["generator policy", "scorer reward", "scorer judge", "scorer duels", "reference"]
    assert list(tried) == [f"{name} loaded" for name in names]
    assert all(rows[what]["ok"] and found.startswith("ready after ") for what, found in tried.items())
    assert tried["scorer judge loaded"].endswith("8 of 8 answers rated")
    left = {what: row["found"] for what, row in rows.items() if what.endswith(" not tried")}
    assert list(left) == [
        f"{what} not tried" for what in ("held-out scorer f", "held-out scorer far", f"policy {path}")
    ]
    assert ["function" in found or "endpoint" in found or "training" in found for found in left.values()] == [True] * 3
    assert rows[f"GPU memory for policy {path}"]["found"].startswith("not estimated; 0.12 GiB of weights in float32")
    train = TrainConfig(name="t", subset="top", policy=config.policy, store=config.store)
    assert [row["what"] for row in examine(train, load=True)["checks"]][-1] == f"policy {path} not tried"


def test_of_the_recipe_for_mixdpo_all_models_are_looked_at() -> None:
    recipe = ROOT / "flows" / "recipes" / "mixdpo.yaml"
    whats = [what for what, _ in models_of(parse("experiment", load_values(recipe, [], ""), recipe))]
    assert whats[:4] == ["generator policy", "scorer rm", "reference", "held-out scorer judging-rm"]
    assert whats[4].startswith("policy Qwen/")


def test_what_would_be_a_job_of_a_cluster_is_not_tried_from_here(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(4))
    config = curate_config(source, store=str(tmp_path / "store"), ray_address="http://127.0.0.1:1")
    rows = {row["what"]: row for row in examine(config, load=True)["checks"]}
    assert rows[f"prompts {source}"]["ok"]
    for what in ("generator policy not tried", "scorer reward not tried"):
        assert rows[what]["ok"] and "`prefsieve submit` one of few prompts" in rows[what]["found"]


class Hanging:
    def add(self, key: int, request: str) -> None: ...

    def step(self) -> list[Any]:
        threading.Event().wait()
        return []

    def close(self) -> None: ...


class Failing(Hanging):
    def step(self) -> list[Any]:
        raise MemoryError("out of memory")


def test_an_engine_that_hangs_is_waited_for_as_long_as_its_deadline() -> None:
    async def ask(engine: Hanging) -> None:
        await EngineLoop(engine, deadline=1).answers(["x"])

    with pytest.raises(EngineDied, match="no step within 1 s"):
        asyncio.run(ask(Hanging()))
    with pytest.raises(MemoryError):  # as it came
        asyncio.run(ask(Failing()))


@pytest.mark.parametrize(
    ("part", "what", "words"),
    [
        ("Capital of France", "hang", "the engine hangs: no step within 1 s"),
        ("Capital of France", "exit", "an engine failed: 2 processes ended at it"),
        ("start", "exit", "an engine did not start: 2 processes ended at it"),
    ],
)
def test_an_engine_that_hangs_or_ends_its_process_does_not_hang_the_doctor(
    part: str, what: str, words: str, local_ray: Any, tmp_path: Path
) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps({part: what}))
    hangs = generator(engine_args={"faults": str(faults)}, deadline=1)
    config = curate_config(
        write_jsonl(tmp_path / "prompts.jsonl", prompts(4)),
        generate={"samples": 2, "generators": [hangs]},
        store=str(tmp_path / "store"),
    )
    started = time.monotonic()
    rows = {row["what"]: row for row in examine(config, load=True)["checks"]}
    assert time.monotonic() - started < 120
    assert not rows["generator policy loaded"]["ok"]
    assert words in rows["generator policy loaded"]["found"]
    assert rows["scorer reward loaded"]["ok"], "the others are tried all the same"


def test_models_are_loaded_and_asked_where_a_run_would(local_ray: Any, tiny_models: TinyModels, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(4))
    policy = {"name": "policy", "model": str(tiny_models.generator), "sampling": {"max_tokens": 5}}
    broken = model(tmp_path / "broken", 1000)
    (broken / "tokenizer.json").write_text("{}")
    config = curate_config(
        source,
        generate={"samples": 2, "generators": [policy]},
        score={"scorers": [{"name": "rm", "model": str(tiny_models.reward)}, {"name": "bad", "model": str(broken)}]},
        store=str(tmp_path / "store"),
    )
    assert not [row for row in examine(config)["checks"] if row["what"].endswith(" loaded")], (
        "that takes a while: if asked to"
    )
    rows = {row["what"]: row for row in examine(config, load=True)["checks"] if row["what"].endswith(" loaded")}
    assert rows["generator policy loaded"]["ok"] and " tokens in " in rows["generator policy loaded"]["found"]
    assert rows["scorer rm loaded"]["ok"] and "of 4 right answers above" in rows["scorer rm loaded"]["found"]
    assert not rows["scorer bad loaded"]["ok"] and "an engine did not start" in rows["scorer bad loaded"]["found"]


def test_rewards_that_are_not_those_of_transformers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both engines stand in here; that the real ones agree on a real model is a test of vLLM's."""
    theirs = [3.0, -1.0, 2.0, -2.0, 1.0, 0.0, 4.0, -4.0]
    answers = {"vllm": [reward / 2 for reward in theirs], "transformers": theirs}
    monkeypatch.setattr(trial, "_asked", lambda config, *about: {"loaded": 1, "rewards": answers[config.engine]})
    config = ScorerConfig(name="rm", engine="vllm", model="some/model")
    with pytest.raises(RunError, match="differ by up to 2, and spread over 8; this model's head is not"):
        golden_rewards(config, Store(tmp_path), "local")
    answers["vllm"] = [reward + 0.1 for reward in theirs]
    assert "4 of 4 right answers above wrong ones; as by transformers" in golden_rewards(
        config, Store(tmp_path), "local"
    )
    for changes, why in (
        ({"gpus": 2}, "not split a model"),
        ({"engine_args": {"quantization": "fp8"}}, "not take engine_args"),
    ):
        answers["vllm"] = [reward / 2 for reward in theirs]
        words = golden_rewards(config.model_copy(update=changes), Store(tmp_path), "local")
        assert "not held against transformers" in words and why in words
    answers["vllm"] = [float("nan"), *theirs[1:]]
    with pytest.raises(RunError, match="not all are finite"):
        golden_rewards(config, Store(tmp_path), "local")


def test_a_dry_run_estimates_by_what_the_same_model_took_before(local_ray: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    policy = generator("policy", sampling={"max_tokens": 100}, workers=2, gpus=0)
    config = curate_config(source, generate={"samples": 4, "generators": [policy]}, store=str(tmp_path / "store"))
    store = Store(config.store_url)
    assert config.ingest and config.generate
    set_ = ingest(config.ingest, store)
    assert _of(plan(config), "generate") == {"to do": "48 samples in 1 files", "estimate": "at most 4,800 tokens"}
    made = generate(config.generate, set_, store)
    speed = known_speed(store, "generate", made.generators["policy"])
    assert speed and (speed.samples, speed.tokens, speed.engine_starts) == (48, made.work.tokens, 1)
    assert speed.busy_seconds > 0 and speed.start_seconds > 0
    other = Speed(52, 1000 - made.work.tokens, 20 - speed.busy_seconds, 1, 4 - speed.start_seconds)
    remember_speed(store, "generate", made.generators["policy"], other)
    more = config.model_copy(update={"generate": config.generate.model_copy(update={"samples": 8})})
    # 48 more in a file, of which 100 were 1,000 tokens and took engines 20 s, after 2 s to start
    assert _of(plan(more), "generate")["estimate"] == "about 480 tokens, 12 s with 1 engine"
    assert "about 480 tokens, 12 s with 1 engine" in plan_markdown(plan(more))
    assert "estimate" not in _of(plan(config), "generate"), "nothing is left to do"


def _of(planned: dict[str, Any], stage: str) -> dict[str, str]:
    [row] = [row for row in planned["work"] if row["stage"] == stage]
    return {key: row[key] for key in ("to do", "estimate") if key in row}
