"""train: a published subset in, a trained policy out."""

from __future__ import annotations

import json
from typing import Any

from prefect import flow

from flows import markdown, reporting, stages
from flows.running import run_on_ray
from tasks.cluster import disconnecting
from tasks.config import PolicyConfig, TrainConfig, TrainingConfig
from tasks.sections import PricesConfig
from tasks.store import Store
from tasks.versions import read_manifest

_TRAIN = TrainingConfig()
_PRICES = PricesConfig()


@flow(name="train")
@run_on_ray
def train(
    name: str,
    subset: str,
    policy: PolicyConfig,
    train: TrainingConfig = _TRAIN,
    store: str = "",
    ray_address: str = "local",
    prices: PricesConfig = _PRICES,
) -> dict[str, Any]:
    """Train a policy on a published subset.

    Args:
        name: The trained policy is kept under this name.
        subset: Published subset, NAME or NAME@VERSION.
        policy: The model to start from, and the resources for training.
        train: Objective and settings.
        store: Folder or s3:// URL that keeps everything; empty takes PREFSIEVE_STORE.
        ray_address: local starts Ray here; auto and HOST:PORT join a cluster; http://HEAD:8265 runs as a job there.
        prices: What GPUs and endpoints cost, for the report.
    """
    config = TrainConfig(
        name=name,
        subset=subset,
        policy=policy,
        train=train,
        store=store,
        ray_address=ray_address,
        prices=prices,
    )
    url = config.store_url
    with disconnecting():
        stages.check(config)
        trained = stages.train(config, url)
        rows = [reporting.stage_row("train", trained.counts, trained.work)]
        cost = reporting.cost_of("train", rows, config.prices)
    content = read_manifest(Store(url), trained)["content"]
    steps = [json.loads(line) for line in Store(url).read(f"{trained.place}/metrics.jsonl").splitlines()]
    report = {
        "store": Store(url).url,
        "policy": str(trained),
        "subset": content["parents"]["subset"],
        "pairs": trained.counts.out,
        "dropped": dict(trained.counts.dropped),
        "steps": len(steps),
        "first": _brief(steps[0]),
        "last": _brief(steps[-1]),
        "stages": rows,
        "cost": cost,
    }
    reporting.show_counts("train", report["stages"])
    reporting.show_report("train", markdown.train_markdown(report))
    return report


def _brief(step: dict[str, Any]) -> dict[str, float]:
    names = {"loss": "loss", "rewards/margins": "implicit_margin", "rewards/accuracies": "implicit_accuracy"}
    return {name: step[key] for key, name in names.items() if key in step}
