"""curate: prompts in, published subsets out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import markdown, reporting, stages
from flows.running import run_on_ray
from tasks.cluster import disconnecting
from tasks.config import CurateConfig, PairingConfig, PublishConfig, SubsetConfig
from tasks.explain import overlap
from tasks.sections import EnsembleConfig, GenerateConfig, ImportConfig, IngestConfig, PricesConfig, ScoreConfig
from tasks.store import Store

_PAIR = [PairingConfig()]
_PUBLISH = PublishConfig()
_PRICES = PricesConfig()


@flow(name="curate")
@run_on_ray
def curate(
    subset: list[SubsetConfig],
    ingest: IngestConfig | None = None,
    import_: ImportConfig | None = None,
    generate: GenerateConfig | None = None,
    score: ScoreConfig | None = None,
    ensembles: list[EnsembleConfig] | None = None,
    pair: list[PairingConfig] = _PAIR,
    publish: PublishConfig = _PUBLISH,
    store: str = "",
    ray_address: str = "local",
    prices: PricesConfig = _PRICES,
) -> dict[str, Any]:
    """Generate and score completions, or import them; rank prompts; publish subsets of preference pairs.

    Args:
        subset: Which pairs to publish, under which names.
        ingest: Where the prompts come from.
        import_: Or: where completions come from that exist already, rated or in pairs.
        generate: Which models answer the prompts, and how often.
        score: What rates the answers.
        ensembles: Scorers made of others.
        pair: How pairs are made from rated answers.
        publish: Form of the published files.
        store: Folder or s3:// URL that keeps everything; empty takes PREFSIEVE_STORE.
        ray_address: local starts Ray here; auto and HOST:PORT join a cluster; http://HEAD:8265 runs as a job there.
        prices: What GPUs and endpoints cost, for the report.
    """
    config = CurateConfig(
        ingest=ingest,
        import_=import_,
        generate=generate,
        score=score,
        ensembles=ensembles or [],
        subset=subset,
        pair=pair,
        publish=publish,
        store=store,
        ray_address=ray_address,
        prices=prices,
    )
    url = config.store_url
    with disconnecting():
        stages.check(config)
        if config.import_:
            rewards = stages.import_(config.import_, url)
            if config.score:
                rewards = rewards.joined(stages.score(config.score, rewards.completions, url, config.ray_address))
        else:
            assert config.ingest and config.generate and config.score
            prompts = stages.ingest(config.ingest, url)
            if config.generate.adaptive:
                adapted = stages.adapt(config.generate, config.score, prompts, url, config.ray_address)
                rewards = stages.score(config.score, adapted.completions, url, config.ray_address).after(adapted)
            else:
                completions = stages.generate(config.generate, prompts, url, config.ray_address)
                rewards = stages.score(config.score, completions, url, config.ray_address)
        pairs = stages.pair(config, rewards, url)
        selections = stages.subset(config.subset, pairs, url)
        versions = stages.publish(config, selections, url)
        rows = reporting.rows_up_to(rewards)
        rows += [reporting.stage_row(f"pair {table.name}", table.counts, table.work) for table in pairs]
        rows += [reporting.stage_row(f"subset {taken.name}", taken.counts, taken.work) for taken in selections]
        rows += [reporting.stage_row(f"publish {version.name}", version.counts, version.work) for version in versions]
        cost = reporting.cost_of("curate", rows, config.prices, versions)
    report: dict[str, Any] = {
        "store": Store(url).url,
        "subsets": [reporting.subset_row(Store(url), version) for version in versions],
        "overlap": overlap(selections, Store(url)),
        "rounds": list(rewards.completions.rounds),
        "stages": rows,
        "cost": cost,
    }
    reporting.show_counts("curate", report["stages"])
    reporting.show_report("curate", markdown.curate_markdown(report))
    return report
