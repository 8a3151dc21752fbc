"""The stages as Prefect tasks: one task per stage, whatever the number of rows.

Results are small handles. What is done is known by the store alone, so Prefect's cache is off. Only faults of the
network are tried again: a wrong configuration or a failing model would fail again.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

import tasks.adapt
import tasks.cells
import tasks.check
import tasks.compare
import tasks.duel
import tasks.evaluate
import tasks.experiment_report
import tasks.generate
import tasks.harness
import tasks.imports
import tasks.ingest
import tasks.pair
import tasks.publish
import tasks.score
import tasks.subset
import tasks.train
from flows.markdown import experiment_text
from flows.reporting import progress_artifact, show_published
from tasks.cells import Policies
from tasks.config import CompareConfig, CurateConfig, EvaluateConfig, RunConfig, SubsetConfig, TrainConfig
from tasks.errors import is_network_fault
from tasks.experiment_report import Experiment
from tasks.experiments import ExperimentConfig
from tasks.prometheus import show_dropped
from tasks.records import Completions, Duels, Pairs, PromptSet, Rewards, Selection, Version
from tasks.sections import GenerateConfig, ImportConfig, IngestConfig, ScoreConfig
from tasks.store import UNCONDITIONAL, Store

T = TypeVar("T", PromptSet, Completions, Rewards, Duels, Pairs, Selection)


def _is_network_fault(task: Any, run: Any, state: Any) -> bool:
    return is_network_fault(state.result(raise_on_failure=False))


def _counted(stage: str, handle: T) -> T:
    """What a stage made, its drops told to Prometheus."""
    show_dropped(stage, handle.counts.dropped)
    return handle


_STAGE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": 10,
    "retry_condition_fn": _is_network_fault,
}


@task(name="check", task_run_name="check", **_STAGE)
def check(config: RunConfig) -> dict[str, str]:
    """Is the store usable, and does everything exist that the configuration names?"""
    found = tasks.check.check(config)
    for what, words in found.items():
        get_run_logger().log(logging.WARNING if words == UNCONDITIONAL else logging.INFO, "%s: %s", what, words)
    return found


@task(name="ingest", task_run_name="ingest", **_STAGE)
def ingest(config: IngestConfig, store: str) -> PromptSet:
    with progress_artifact("ingest") as report:
        return _counted("ingest", tasks.ingest.ingest(config, Store(store), report))


@task(name="import", task_run_name="import", **_STAGE)
def import_(config: ImportConfig, store: str) -> Rewards:
    with progress_artifact("import") as report:
        return _counted("import", tasks.imports.import_(config, Store(store), report))


@task(name="generate", task_run_name="generate", **_STAGE)
def generate(
    config: GenerateConfig, prompts: PromptSet, store: str, ray_address: str, in_turn: bool = False
) -> Completions:
    with progress_artifact("generate") as report:
        return _counted(
            "generate", tasks.generate.generate(config, prompts, Store(store), report, ray_address, in_turn=in_turn)
        )


@task(name="adapt", task_run_name="adapt", **_STAGE)
def adapt(config: GenerateConfig, scoring: ScoreConfig, prompts: PromptSet, store: str, ray_address: str) -> Rewards:
    """generate and score in rounds."""
    with progress_artifact("adapt") as report:
        return _counted("adapt", tasks.adapt.adapt(config, scoring, prompts, Store(store), report, ray_address))


@task(name="score", task_run_name="score", **_STAGE)
def score(config: ScoreConfig, completions: Completions, store: str, ray_address: str) -> Rewards:
    with progress_artifact("score") as report:
        return _counted("score", tasks.score.score(config, completions, Store(store), report, ray_address))


@task(name="pair", task_run_name="pair", **_STAGE)
def pair(config: CurateConfig, rewards: Rewards, store: str) -> list[Pairs]:
    with progress_artifact("pair") as report:
        tables = [tasks.pair.pair(rule, rewards, Store(store), report, config.ensembles) for rule in config.pair]
        return [_counted("pair", table) for table in tables]


@task(name="subset", task_run_name="subset", **_STAGE)
def subset(configs: list[SubsetConfig], pairs: list[Pairs], store: str) -> list[Selection]:
    """Every subset, each followed by its controls."""
    tables = {table.name: table for table in pairs}
    with progress_artifact("subset") as report:
        return [
            _counted("subset", selection)
            for config in configs
            for selection in tasks.subset.subset(config, tables[config.pairs or pairs[0].name], Store(store), report)
        ]


@task(name="publish", task_run_name="publish", **_STAGE)
def publish(config: CurateConfig, selections: list[Selection], store: str) -> list[Version]:
    published = []
    with progress_artifact("publish") as report:
        for subset, selection in zip(config.subset_of_each_name(), selections, strict=True):
            version = tasks.publish.publish(config.publish, subset, selection, Store(store), report)
            if version.work.shards_made:  # told at once: what a later one fails over is not told again
                show_published(version.name, version.version, version.counts.out, Store(store).url)
            published.append(version)
    return published


@task(name="train", task_run_name="train", **_STAGE)
def train(config: TrainConfig, store: str) -> Version:
    with progress_artifact("train") as report:
        return tasks.train.train(config, Store(store), report)


@task(name="duel", task_run_name="duel", **_STAGE)
def duel(config: ScoreConfig, compare: CompareConfig, completions: Completions, store: str, ray_address: str) -> Duels:
    """What pairwise judges say of policy against reference."""
    with progress_artifact("duel") as report:
        return _counted("duel", tasks.duel.duel(config, compare, completions, Store(store), report, ray_address))


@task(name="evaluate", task_run_name="evaluate", **_STAGE)
def evaluate(config: CompareConfig, rewards: Rewards, store: str, duels: Duels | None = None) -> dict[str, Any]:
    with progress_artifact("evaluate") as report:
        return tasks.evaluate.evaluate(config, rewards, Store(store), report, duels)


@task(name="harness", task_run_name="harness", **_STAGE)
def harness(config: EvaluateConfig, store: str) -> dict[str, Any]:
    """lm-evaluation-harness on policy and reference."""
    with progress_artifact("harness") as report:
        return tasks.harness.harness(config, Store(store), report)


@task(name="train", task_run_name="train", **_STAGE)
def train_cells(config: ExperimentConfig, published: dict[str, str], store: str) -> Policies:
    """Every training of an experiment. published: name -> version, of a curate run just before."""
    with progress_artifact("train") as report:
        subsets = tasks.cells.resolved(config, Store(store), published)
        return tasks.cells.train_cells(config, subsets, Store(store), report)


@task(name="compare", task_run_name="compare", **_STAGE)
def compare(
    config: ExperimentConfig, policies: Policies, rewards: Rewards, store: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment's result, and its costs."""
    with progress_artifact("compare") as report:
        return tasks.compare.compare(config, policies, rewards, Store(store), report)


@task(name="report", task_run_name="report", **_STAGE)
def keep(config: ExperimentConfig, result: dict[str, Any], costs: dict[str, Any], store: str) -> Experiment:
    """The experiment's report, in the store."""
    return tasks.experiment_report.keep(config, result, costs, experiment_text(result, costs), Store(store))
