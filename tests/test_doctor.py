"""What the doctor finds out: whether models fit, load and say what they should, and what a run will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.doctor import examine, plan
from flows.markdown import plan_markdown
from tasks import trial
from tasks.costs import Speed, known_speed, remember_speed
from tasks.errors import ConfigError, RunError
from tasks.footprint import Footprint, fits, footprint
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.sections import GeneratorConfig, ScorerConfig
from tasks.store import Store
from tasks.trial import golden_rewards
from tests.conftest import TinyModels, curate_config, generator, prompts, write_jsonl

GIB = 2**30


def model(folder: Path, weights: int, **about: Any) -> Path:
    """A folder that says what an 8B Llama says, with files of the given size in bytes."""
    folder.mkdir()
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    config = {"dtype": "bfloat16", "max_position_embeddings": 8192, **llama, **about}
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights)  # a hole: a hole takes no room
    return folder


def test_what_a_model_needs_is_told_from_its_files(tmp_path: Path) -> None:
    store, path = Store(tmp_path / "store"), str(model(tmp_path / "8b", 16 * GIB))
    ours = GeneratorConfig(name="x", engine="vllm", model=path, gpus=1)
    # 2 x 32 layers x 8 heads x 128 dimensions x 2 bytes = 128 KiB per token
    assert footprint(ours, store) == Footprint(16 * GIB, 128 * 1024, 8192)
    assert footprint(ours.model_copy(update={"dtype": "float32"}), store) == Footprint(32 * GIB, 256 * 1024, 8192)
    assert fits(ours, store, memory=0).endswith("19 GiB per GPU for one sequence of 8,192 tokens")
    # 0.9 x 80 - 16 GiB = 56 GiB, 1 GiB per sequence
    assert fits(ours, store, memory=80 * GIB).endswith("room for 56 sequences of 8,192 tokens at once")
    two = ours.model_copy(update={"gpus": 2})
    assert fits(two, store, memory=24 * GIB).endswith("room for 27 sequences of 8,192 tokens at once")
    with pytest.raises(ConfigError, match=r"do not fit 14\.4 GiB; raise gpus"):
        fits(ours, store, memory=16 * GIB)
    with pytest.raises(
        ConfigError, match="room for 4,915 tokens, less than one sequence of 8,192; lower max_model_len"
    ):
        fits(ours, store, memory=16.6 / 0.9 * GIB)
    assert "not known" in fits(GeneratorConfig(name="x", engine="vllm", model="nobody/nothing", gpus=1), store)


def test_the_doctor_says_so_of_what_runs_on_gpus(tmp_path: Path) -> None:
    path = model(tmp_path / "8b", GIB // 16)
    (tmp_path / "8b" / "tokenizer.json").write_text("{}")
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(4))
    policy = {"name": "policy", "engine": "vllm", "model": str(path), "gpus": 1}
    config = curate_config(source, generate={"samples": 2, "generators": [policy]}, store=str(tmp_path / "store"))
    rows = {row["what"]: row for row in examine(config)["checks"]}
    assert rows[f"GPU memory for {path}"]["found"].startswith("0.062 GiB of weights, 0.12 MiB of cache per token")


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
    scorer = ScorerConfig(name="rm", engine="vllm", model="some/model")
    with pytest.raises(RunError, match="differ by up to 2, and spread over 8; this model's head is not"):
        golden_rewards(scorer, Store(tmp_path), "local")
    answers["vllm"] = [reward + 0.1 for reward in theirs]
    assert "4 of 4 right answers above wrong ones; as by transformers" in golden_rewards(
        scorer, Store(tmp_path), "local"
    )
    answers["vllm"] = [float("nan"), *theirs[1:]]
    with pytest.raises(RunError, match="not all are finite"):
        golden_rewards(scorer, Store(tmp_path), "local")


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
