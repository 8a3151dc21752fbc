"""experiment: subsets, objectives and seeds in; which of them won, and how surely, out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import markdown, reporting, stages
from flows.curate import curate as run_curate
from flows.running import run_on_ray
from tasks.cluster import disconnecting
from tasks.config import CurateConfig, PolicyConfig, TrainingConfig
from tasks.experiments import ArmConfig, ExperimentConfig, HeldOutConfig, Length, ObjectiveConfig, Seeds, SubsetName
from tasks.sections import Name, PricesConfig
from tasks.store import Store

_OBJECTIVES = [ObjectiveConfig()]
_SEEDS = [0, 1, 2, 3, 4]
_TRAIN = TrainingConfig()
_PRICES = PricesConfig()


@flow(name="experiment")
@run_on_ray
def experiment(
    name: Name,
    subsets: list[SubsetName],
    policy: PolicyConfig,
    evaluate: HeldOutConfig,
    objectives: list[ObjectiveConfig] = _OBJECTIVES,
    seeds: Seeds = _SEEDS,
    length: Length = "steps",
    train: TrainingConfig = _TRAIN,
    baseline: ArmConfig | None = None,
    arms: list[ArmConfig] | None = None,
    alpha: float = 0.05,
    at_once: int = 0,
    curate: CurateConfig | None = None,
    store: str = "",
    ray_address: str = "local",
    prices: PricesConfig = _PRICES,
) -> dict[str, Any]:
    """Train every subset by every objective under every seed, and compare the policies on held-out prompts.

    Args:
        name: The report is kept under this name.
        subsets: Published subsets, NAME or NAME@VERSION.
        policy: The model that every training starts from, and the resources for one.
        evaluate: Held-out prompts, the reference whose sampling all policies share, and what rates the answers.
        objectives: Ways to train on each subset.
        seeds: Trainings per subset and objective.
        length: What all trainings have as many of, optimiser steps or epochs.
        train: Settings of all trainings.
        baseline: What arms are compared with; empty takes the random control of each subset, else the first.
        arms: Only these combinations of subset and objective; empty takes all.
        alpha: Share of errors allowed over all differences together.
        at_once: Trainings at once; 0 takes as many as there is room for.
        curate: Publishes the subsets first, if they are not there.
        store: Folder or s3:// URL that keeps everything; empty takes PREFSIEVE_STORE.
        ray_address: local starts Ray here; auto and HOST:PORT join a cluster; http://HEAD:8265 runs as a job there.
        prices: What GPUs and endpoints cost, for the report.
    """
    config = ExperimentConfig(
        name=name,
        subsets=subsets,
        policy=policy,
        evaluate=evaluate,
        objectives=objectives,
        seeds=seeds,
        length=length,
        train=train,
        baseline=baseline,
        arms=arms or [],
        alpha=alpha,
        at_once=at_once,
        curate=curate,
        store=store,
        ray_address=ray_address,
        prices=prices,
    )
    url = config.store_url
    with disconnecting():
        stages.check(config)
        published = run_curate(**config.curating()) if config.curate else {"subsets": [], "stages": []}
        subsets_meant = {row["name"]: row["version"] for row in published["subsets"]}
        policies = stages.train_cells(config, subsets_meant, url)
        prompts = stages.ingest(config.evaluate.ingest, url)
        generators = config.generators(policies.names)
        completions = stages.generate(generators, prompts, url, config.ray_address, in_turn=True)
        rewards = stages.score(config.evaluate.score, completions, url, config.ray_address)
        result, costs = stages.compare(config, policies, rewards, url)
        rows = [reporting.stage_row("train", policies.counts, policies.work), *reporting.rows_up_to(rewards)]
        cost = reporting.cost_of("experiment", rows, config.prices, before=published["stages"])
    kept = stages.keep(config, result, costs, url)
    report = {
        "store": Store(url).url,
        "version": str(kept),
        "place": Store(url).full(kept.place),
        **result,
        "costs": costs,
        "trained": policies.trained,
        "stages": rows,
        "cost": cost,
    }
    reporting.show_counts("experiment", report["stages"])
    reporting.show_report("experiment", markdown.experiment_markdown(report))
    return report
