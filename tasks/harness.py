"""harness: tasks of lm-evaluation-harness on policy and reference, for what they can do rather than what is preferred.

An optional extra (`pip install prefsieve[harness]`). Models are run by transformers, whatever engine generates: on the
generator's GPU, when it has one. A model's results are kept in the store by the model, the tasks, the definitions in
include_path and the harness's version, so they are paid for once; data that a task reads from elsewhere is the task's
affair, which has a version of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks import models
from tasks.cluster import check_room, connect, reraise, telling
from tasks.config import EvaluateConfig, HarnessConfig
from tasks.errors import ConfigError
from tasks.progress import Meter, Report, silent
from tasks.records import SCHEMA_VERSION, digest
from tasks.sections import GeneratorConfig
from tasks.store import Store

_BOOTSTRAPS = 1000  # of metrics whose error has no formula
_YAML = (".yaml", ".yml")


def harness(config: EvaluateConfig, store: Store, report: Report = silent) -> dict[str, Any]:
    """{"version", "gpu_seconds", "tasks": {task: {"examples", "fewshot", "metrics": {metric: {"policy": ...,
    "reference": ...}}}}}; of each side {"value", "standard_error"}. Results in the store held no GPU now."""
    assert config.harness
    found = harness_found(config.harness)
    generators = {generator.name: generator for generator in config.generate.generators}
    sides = {"policy": config.evaluate.policy, "reference": config.evaluate.reference}
    meter = Meter(report, "harness", len(sides), "models")
    results, held = {}, 0.0
    for side, name in sides.items():
        started = time.monotonic()
        results[side], made = _of_model(config.harness, generators[name], store, config.ray_address)
        held += made * generators[name].gpus * (time.monotonic() - started)
        meter.add(1)
    tasks: dict[str, Any] = {}
    for side, by_task in results.items():
        for task, result in by_task.items():
            about = {"examples": result["examples"], "fewshot": result["fewshot"], "metrics": {}}
            metrics = tasks.setdefault(task, about)["metrics"]
            for metric, value in result["metrics"].items():
                metrics.setdefault(metric, {})[side] = value
    return {"version": found, "gpu_seconds": held, "tasks": tasks}


def harness_found(config: HarnessConfig) -> str:
    """The harness's version; ConfigError when it is not installed, or a task is nowhere to be found."""
    spec = importlib.util.find_spec("lm_eval")  # not imported: that takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("harness: lm-evaluation-harness is not installed; install prefsieve[harness]")
    folders = [Path(next(iter(spec.submodule_search_locations))) / "tasks"]
    if config.include_path:
        own = Path(os.path.expanduser(config.include_path))
        if not os.path.isdir(own) or not any(file.suffix in _YAML for file in own.rglob("*")):
            raise ConfigError(f"harness.include_path: {config.include_path!r} is no folder with YAML definitions")
        folders.insert(0, own)
    for name in config.tasks:
        if "*" not in name and not any(_mentions(folder, name) for folder in folders):
            raise ConfigError(f"harness.tasks: no task {name!r} in the harness or in include_path; check the spelling")
    return f"lm_eval {version('lm_eval')}"


def _mentions(folder: Path, name: str) -> bool:
    """Whether a definition below the folder has this name for a task, a group or a tag."""
    word = re.compile(r"(?:^|[\s:\-\[,\"'])" + re.escape(name) + r"(?:$|[\s\],\"'])", re.MULTILINE)
    return any(
        word.search(file.read_text(encoding="utf-8", errors="replace"))
        for file in folder.rglob("*")
        if file.suffix in _YAML
    )


def _of_model(
    config: HarnessConfig, generator: GeneratorConfig, store: Store, address: str
) -> tuple[dict[str, Any], bool]:
    """Results by task, from the store or made now, in an actor with the generator's resources; and whether now."""
    generator = models.pinned("generate", generator, store)
    path = f"harness/{digest(_facts(config, generator, store))}.json"
    known = store.exists(path)
    if not known:
        ray = connect(address)
        check_room(ray, generator)
        actor = ray.remote(HarnessWorker).options(num_cpus=generator.cpus, num_gpus=generator.gpus)
        worker = actor.remote(config, generator, store.url)
        try:
            with reraise(ray):
                store.create_json(path, ray.get(worker.run.remote()))
        finally:
            ray.kill(worker)
    return store.read_object(path), not known


def _facts(config: HarnessConfig, generator: GeneratorConfig, store: Store) -> dict[str, Any]:
    """All that decides the results."""
    own = sorted(Path(os.path.expanduser(config.include_path)).rglob("*")) if config.include_path else []
    return {
        "schema": SCHEMA_VERSION,
        "stage": "harness",
        "version": version("lm_eval"),
        "model": models.identity("generate", generator, store),
        "dtype": generator.dtype,
        "max_model_len": generator.max_model_len,
        "system_prompt": generator.system_prompt,
        "definitions": [digest(file.read_bytes().hex()) for file in own if file.is_file()],
        **config.model_dump(exclude={"include_path"}),
    }


class HarnessWorker:
    """One model in the harness."""

    def __init__(self, config: HarnessConfig, generator: GeneratorConfig, store_url: str) -> None:
        self.config, self.generator, self.store = config, generator, Store(store_url)

    def run(self) -> dict[str, Any]:
        with telling():
            return run_tasks(self.config, self.generator, models.local(self.generator.model, self.store))


def run_tasks(config: HarnessConfig, generator: GeneratorConfig, model: str) -> dict[str, Any]:
    """Run the tasks here; {task: {"examples", "fewshot", "metrics": {metric: {"value", "standard_error"}}}}."""
    import lm_eval

    about = {
        "pretrained": model,
        "dtype": generator.dtype,
        "trust_remote_code": generator.trust_remote_code,
        "use_safetensors": True,
        **({"revision": generator.revision} if generator.revision else {}),
        **({"max_length": generator.max_model_len} if generator.max_model_len else {}),
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=about,
        tasks=list(config.tasks),
        num_fewshot=None if config.num_fewshot < 0 else config.num_fewshot,
        batch_size=generator.batch_size,
        device="cuda" if generator.gpus else "cpu",
        limit=config.limit or None,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
        system_instruction=generator.system_prompt or None,
        apply_chat_template=config.chat_template,
        gen_kwargs={"max_gen_toks": config.max_gen_tokens} if config.max_gen_tokens else None,
        task_manager=_task_manager(config),
    )
    assert found
    return {task: _read(task, result, found) for task, result in sorted(found["results"].items())}


def _task_manager(config: HarnessConfig) -> Any:
    """The harness's own definitions are thousands, and are read only when they are wanted."""
    from lm_eval.tasks import TaskManager

    if config.include_path:
        own = TaskManager(include_path=os.path.expanduser(config.include_path), include_defaults=False)
        if set(config.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=os.path.expanduser(config.include_path) if config.include_path else None)


def _read(task: str, result: dict[str, Any], found: Any) -> dict[str, Any]:
    """`metric,filter` and `metric_stderr,filter` of the harness, side by side."""
    metrics = {}
    for key, value in result.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = result.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            metrics[name] = {"value": value, "standard_error": error if isinstance(error, int | float) else None}
    examples = found.get("n-samples", {}).get(task, {}).get("effective")
    return {"examples": examples, "fewshot": found.get("n-shot", {}).get(task), "metrics": metrics}
