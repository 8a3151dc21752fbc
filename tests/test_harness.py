"""lm-evaluation-harness on policy and reference, with a task of our own and tiny models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.markdown import evaluate_markdown
from tasks.check import checks
from tasks.config import EvaluateConfig, HarnessConfig
from tasks.errors import ConfigError
from tasks.harness import harness, harness_found
from tasks.store import Store
from tests.conftest import NO_COST, TinyModels, files_below, generator, prompts, scorer, write_jsonl

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: install prefsieve[harness]"
)
EXAMPLES = 8


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    """A folder with a task of two kinds over a local file: which digit comes next, chosen and written."""
    digits = [{"question": f"what comes after {i}", "answer": str(i + 1)} for i in range(EXAMPLES)]
    data = write_jsonl(tmp_path / "data" / "digits.jsonl", digits)
    folder = tmp_path / "definitions"
    folder.mkdir()
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metadata": {"version": 1.0},
    }
    metric = {"aggregation": "mean", "higher_is_better": True}
    chosen = {
        "task": "next_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": [str(i) for i in range(1, EXAMPLES + 1)],
        "doc_to_target": "{{answer | int - 1}}",  # which of the choices
        "metric_list": [{"metric": "acc", **metric}],
    }
    written = {
        "task": "next_written",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **metric}],
    }
    for one in (chosen, written):
        (folder / f"{one['task']}.yaml").write_text(yaml.safe_dump({**task, **one}))
    return folder


def configure(folder: Path, models: TinyModels, **about: Any) -> EvaluateConfig:
    tiny = {"engine": "transformers", "model": str(models.generator), "batch_size": 8}
    generators = [generator("policy", **tiny, max_model_len=48), generator("reference", **tiny)]
    values = {
        "ingest": {"source": str(write_jsonl(folder / "p.jsonl", prompts(2)))},
        "generate": {"samples": 1, "generators": generators},
        "score": {"scorers": [scorer()]},
        "harness": about,
        "store": str(folder / "store"),
    }
    return EvaluateConfig.model_validate(values)


@installed
def test_both_models_are_run_on_ones_own_tasks_and_a_rerun_runs_nothing(
    local_ray: Any, tiny_models: TinyModels, tmp_path: Path, definitions: Path
) -> None:
    config = configure(tmp_path, tiny_models, tasks=["next_chosen", "next_written"], include_path=str(definitions))
    store = Store(tmp_path / "store")
    assert dict(checks(config))["harness next_chosen, next_written"]() == "lm_eval 0.4.13"
    found = harness(config, store)
    assert found["version"] == "lm_eval 0.4.13" and set(found["tasks"]) == {"next_chosen", "next_written"}
    for task, metric in (("next_chosen", "acc"), ("next_written", "exact_match")):
        result = found["tasks"][task]
        assert result["examples"] == EXAMPLES and result["fewshot"] == 0
        sides = result["metrics"][metric]
        assert set(sides) == {"policy", "reference"}
        for side in sides.values():
            assert side["value"] * EXAMPLES == pytest.approx(round(side["value"] * EXAMPLES))
            assert side["standard_error"] >= 0
    before = files_below(tmp_path / "store")
    assert len([path for path in before if path.startswith("harness/")]) == 2
    assert harness(config, store) == found and files_below(tmp_path / "store") == before
    json.dumps(found, allow_nan=False)
    report = {"policy": "p", "reference": "r", "prompts": 2, "samples": 1, "scorers": {}, "harness": found}
    report["mean_tokens"] = {"policy": 1.0, "reference": 1.0}
    assert "## Tasks of lm_eval 0.4.13" in evaluate_markdown({**report, "cost": NO_COST})


@installed
def test_a_task_that_is_nowhere_and_a_folder_without_definitions_are_told(tmp_path: Path, definitions: Path) -> None:
    assert harness_found(HarnessConfig(tasks=["gsm8k", "arc_easy", "mmlu_*"])).startswith("lm_eval ")
    with pytest.raises(ConfigError, match=r"harness\.tasks: no task 'gsm8q'"):
        harness_found(HarnessConfig(tasks=["gsm8k", "gsm8q"]))
    with pytest.raises(ConfigError, match=r"harness\.include_path: '.*' is no folder with YAML"):
        harness_found(HarnessConfig(tasks=["gsm8k"], include_path=str(tmp_path / "none")))
    assert harness_found(HarnessConfig(tasks=["next_chosen"], include_path=str(definitions)))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install prefsieve\[harness\]"):
        harness_found(HarnessConfig(tasks=["gsm8k"]))


def test_the_harness_needs_real_models(tmp_path: Path) -> None:
    values = {
        "ingest": {"source": "p.jsonl"},
        "generate": {"generators": [generator("policy"), generator("reference")]},
        "score": {"scorers": [scorer()]},
        "harness": {"tasks": ["gsm8k"]},
    }
    with pytest.raises(ValueError, match="harness: generator 'policy' is fake; the harness needs real models"):
        EvaluateConfig.model_validate(values)
