"""evaluate: held-out prompts in; win rates, scores and lengths of a policy against a reference out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import markdown, reporting, stages
from flows.running import run_on_ray
from tasks.cluster import disconnecting
from tasks.config import CompareConfig, EvaluateConfig, HarnessConfig
from tasks.records import Counts, Work
from tasks.sections import GenerateConfig, IngestConfig, PricesConfig, ScoreConfig
from tasks.store import Store

_COMPARE = CompareConfig()
_PRICES = PricesConfig()


@flow(name="evaluate")
@run_on_ray
def evaluate(
    ingest: IngestConfig,
    generate: GenerateConfig,
    score: ScoreConfig,
    evaluate: CompareConfig = _COMPARE,
    harness: HarnessConfig | None = None,
    store: str = "",
    ray_address: str = "local",
    prices: PricesConfig = _PRICES,
) -> dict[str, Any]:
    """Compare a policy with a reference on held-out prompts.

    Args:
        ingest: The held-out prompts.
        generate: The two models; a trained policy is named policy:NAME[@VERSION].
        score: What rates their answers; a pairwise judge compares them.
        evaluate: Which of the two is under test.
        harness: Tasks of lm-evaluation-harness for both, such as gsm8k.
        store: Folder or s3:// URL that keeps everything; empty takes PREFSIEVE_STORE.
        ray_address: local starts Ray here; auto and HOST:PORT join a cluster; http://HEAD:8265 runs as a job there.
        prices: What GPUs and endpoints cost, for the report.
    """
    config = EvaluateConfig(
        ingest=ingest,
        generate=generate,
        score=score,
        evaluate=evaluate,
        harness=harness,
        store=store,
        ray_address=ray_address,
        prices=prices,
    )
    url = config.store_url
    with disconnecting():
        stages.check(config)
        prompts = stages.ingest(config.ingest, url)
        completions = stages.generate(config.generate, prompts, url, config.ray_address)
        rewards = stages.score(config.score.rating, completions, url, config.ray_address)
        duels = None
        if config.score.comparing:
            duels = stages.duel(config.score, config.evaluate, completions, url, config.ray_address)
        result = stages.evaluate(config.evaluate, rewards, url, duels)
        if config.harness:
            result = {**result, "harness": stages.harness(config, url)}
        rows = reporting.rows_up_to(rewards)
        rows += [reporting.stage_row("duel", duels.counts, duels.work)] if duels else []
        if config.harness:
            rows.append(
                reporting.stage_row("harness", Counts(2, 2), Work(gpu_seconds=result["harness"]["gpu_seconds"]))
            )
        cost = reporting.cost_of("evaluate", rows, config.prices)
    report = {"store": Store(url).url, **result, "stages": rows, "cost": cost}
    reporting.show_counts("evaluate", report["stages"])
    reporting.show_report("evaluate", markdown.evaluate_markdown(report))
    return report
