"""curate: prompts in, published subsets out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import markdown, reporting, stages
from tasks.cluster import disconnecting
from tasks.config import (
    CurateConfig,
    GenerateConfig,
    IngestConfig,
    PairingConfig,
    PublishConfig,
    ScoreConfig,
    SubsetConfig,
)
from tasks.store import Store

_PAIR = [PairingConfig()]
_PUBLISH = PublishConfig()


@flow(name="curate")
def curate(
    ingest: IngestConfig,
    generate: GenerateConfig,
    score: ScoreConfig,
    subset: list[SubsetConfig],
    pair: list[PairingConfig] = _PAIR,
    publish: PublishConfig = _PUBLISH,
    store: str = "",
    ray_address: str = "local",
) -> dict[str, Any]:
    """Generate and score completions, rank prompts, and publish subsets of preference pairs.

    Args:
        ingest: Where the prompts come from.
        generate: Which models answer them, and how often.
        score: What rates the answers.
        subset: Which pairs to publish, under which names.
        pair: How pairs are made from rated answers.
        publish: Form of the published files.
        store: Folder or s3:// URL that keeps everything; empty takes PREFSIEVE_STORE.
        ray_address: local starts Ray here; auto joins the cluster that this process is part of.
    """
    config = CurateConfig(
        ingest=ingest,
        generate=generate,
        score=score,
        subset=subset,
        pair=pair,
        publish=publish,
        store=store,
        ray_address=ray_address,
    )
    url = config.store_url
    with disconnecting():
        stages.check(config)
        prompts = stages.ingest(config.ingest, url)
        completions = stages.generate(config.generate, prompts, url, config.ray_address)
        rewards = stages.score(config.score, completions, url, config.ray_address)
        pairs = stages.pair(config.pair, rewards, url)
        selections = stages.subset(config.subset, pairs, url)
        versions = stages.publish(config, selections, url)
    report: dict[str, Any] = {
        "store": Store(url).url,
        "subsets": [reporting.subset_row(Store(url), version) for version in versions],
        "stages": [
            reporting.stage_row("ingest", prompts.counts, prompts.work),
            reporting.stage_row("generate", completions.counts, completions.work),
            reporting.stage_row("score", rewards.counts, rewards.work),
            *(reporting.stage_row(f"pair {table.name}", table.counts, table.work) for table in pairs),
            *(reporting.stage_row(f"subset {taken.name}", taken.counts, taken.work) for taken in selections),
            *(reporting.stage_row(f"publish {version.name}", version.counts, version.work) for version in versions),
        ],
    }
    reporting.show_counts("curate", report["stages"])
    reporting.show_report("curate", markdown.curate_markdown(report))
    return report
