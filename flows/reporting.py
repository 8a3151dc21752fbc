"""What a run shows while it goes and when it is done, as Prefect artifacts and logs: progress, counts, the report."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from typing import Any, cast
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from tasks import costs, prometheus
from tasks.card import dropped_words, selection_words
from tasks.progress import Progress, Report, silent
from tasks.records import Counts, Rewards, Version, Work
from tasks.sections import PricesConfig
from tasks.store import Store
from tasks.versions import read_manifest

_ARTIFACT_EVERY = 2.0  # seconds between two updates of a progress artifact
_LOG_EVERY = 10.0
_PATIENCE = 10.0  # seconds that an end waits for what it shows; Prefect's client itself tries for a minute


@contextlib.contextmanager
def progress_artifact(stage: str) -> Iterator[Report]:
    """A reporter that keeps one progress artifact up to date, and draws a bar on a terminal, or logs now and then."""
    terminal = _terminal()
    with _bar(stage, terminal) if terminal else contextlib.nullcontext(silent) as draw:
        yield from _reporting(stage, draw, lines=terminal is None)


def _reporting(stage: str, draw: Report, lines: bool) -> Iterator[Report]:
    """The end is logged, and shown: by a server that is slow, while the run goes on."""
    logger = get_run_logger()
    artifact: UUID | None = None
    shown = logged = -math.inf
    last: Progress | None = None
    showing: threading.Thread | None = None

    def show(progress: Progress) -> None:
        nonlocal artifact
        percent = 100 * progress.done / progress.total if progress.total else 0.0
        if artifact is None:
            made = create_progress_artifact(percent, key=f"{stage}-progress", description=str(progress))
            artifact = cast(UUID, made)
        else:
            update_progress_artifact(artifact, percent, description=str(progress))

    def report(progress: Progress) -> None:
        nonlocal shown, logged, last, showing
        last, now = progress, time.monotonic()
        draw(progress)
        if now - shown >= _ARTIFACT_EVERY and not (showing and showing.is_alive()):
            shown = now
            showing = _beside(lambda: show(progress))
        if lines and progress.done and now - logged >= _LOG_EVERY and not progress.finished:
            logged = now
            logger.info("%s: %s", progress.stage, progress)

    yield report
    if last:
        done = Progress(last.stage, last.done, last.done, last.unit, last.rate, last.reused, last.note)
        _ended(_beside(lambda: show(done), after=showing))
        logger.info("%s: %s", done.stage, done)


def _terminal() -> Console | None:
    """Where Prefect's log goes, if somebody looks at it: a bar of the same console does not get into its lines."""
    for handler in logging.getLogger().handlers:
        console = getattr(handler, "console", None)
        if isinstance(console, Console) and console.is_terminal:
            return console
    return None


@contextlib.contextmanager
def _bar(stage: str, console: Console) -> Iterator[Report]:
    # Prefect's console knows no style of a bar by name.
    bar_column = BarColumn(style="grey37", complete_style="cyan", finished_style="green", pulse_style="cyan")
    columns = (TextColumn("{task.description:>8}"), bar_column, TextColumn("{task.fields[words]}"))
    with Bars(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(stage, total=None, words="")
        yield lambda now: bars.update(bar, completed=now.done, total=now.total or None, words=str(now))


def _beside(tell: Callable[[], Any], after: threading.Thread | None = None) -> threading.Thread:
    """Tell Prefect's server something while the work goes on: one that is gone costs what it would have shown."""
    context, logger = copy_context(), get_run_logger()

    def attempt() -> None:
        if after:
            after.join()
        try:
            context.run(tell)
        except Exception as error:
            logger.warning("Prefect's server could not be told how far this is: %s", error)

    thread = threading.Thread(target=attempt, name="artifact", daemon=True)
    thread.start()
    return thread


def _ended(telling: threading.Thread) -> bool:
    """Whether it does within a moment."""
    telling.join(_PATIENCE)
    return not telling.is_alive()


def stage_row(stage: str, counts: Counts, work: Work) -> dict[str, Any]:
    """One stage as a row of the counts table."""
    return {
        "stage": stage,
        "in": counts.into,
        "out": counts.out,
        "dropped": dict(sorted(counts.dropped.items())),
        "engine_starts": work.engine_starts,
        "requests": work.requests,
        "tokens": work.tokens,
        "paid_tokens": work.paid_tokens,
        "retries": work.retries,
        "engine_restarts": work.engine_restarts,
        "gpu_seconds": round(work.gpu_seconds, 2),
        "shards_made": work.shards_made,
        "shards_reused": work.shards_reused,
        "seconds": round(work.seconds, 2),
    }


def rows_up_to(rewards: Rewards) -> list[dict[str, Any]]:
    """The stages that rewards came by: ingest, generate and score, or import, and score if anything was scored."""
    completions = rewards.completions
    prompts = completions.prompts
    score = [stage_row("score", rewards.counts, rewards.work)] if rewards.scorers else []
    if completions.authors:
        return [stage_row("import", completions.counts, completions.work), *score]
    generate = stage_row("generate", completions.counts, completions.work)
    return [stage_row("ingest", prompts.counts, prompts.work), generate, *score]


def subset_row(store: Store, version: Version) -> dict[str, Any]:
    """One published subset as a row of the report."""
    content = read_manifest(store, version)["content"]
    return {
        "name": version.name,
        "version": version.version,
        "selection": selection_words(content),
        "pairing": content["pairing"]["rule"],
        "pairs": content["summary"]["rows"],
        **{key: content["summary"][f"mean_{key}"] for key in ("pvar", "margin", "chosen_tokens", "rejected_tokens")},
    }


def show_published(name: str, version: str, pairs: int, store: str) -> None:
    """An event for a version that was not there before, for whoever waits for one.

    A run that follows a job tells what the job may have told already; by its id the server counts an event once.
    """
    emit_event(
        "prefsieve.subset.published",
        resource={"prefect.resource.id": f"prefsieve.subset.{name}", "prefect.resource.name": f"{name}@{version}"},
        payload={"version": f"{name}@{version}", "pairs": pairs, "store": store},
        id=uuid5(NAMESPACE_URL, f"{store}/subsets/{name}/{version}"),
    )


def cost_of(
    flow: str,
    stages: list[dict[str, Any]],
    prices: PricesConfig,
    versions: Sequence[Version] = (),
    before: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What the run cost, and per pair of what it published.

    Prometheus is told as well, but for what came before: stages of a run inside of this one, which told it itself.
    """
    prometheus.show_cost(flow, costs.cost_of(stages, {}, prices)["amount"], prices.currency)
    cost = costs.cost_of([*before, *stages], {version.name: version.counts.out for version in versions}, prices)
    for subset, each in cost["per_pair"].items():
        prometheus.show_cost_per_pair(subset, each["amount"], prices.currency)
    return cost


def show_counts(flow: str, stages: list[dict[str, Any]]) -> None:
    """The table artifact of counts and drops."""
    rows = [{**row, "dropped": dropped_words(row["dropped"])} for row in stages]
    about = "Rows in, out and dropped, and the work done, by stage"
    _ended(_beside(lambda: create_table_artifact(rows, key=f"{flow}-counts", description=about)))


def show_report(flow: str, markdown: str) -> None:
    """The report artifact."""
    about = f"Report of {flow}"
    _ended(_beside(lambda: create_markdown_artifact(markdown, key=f"{flow}-report", description=about)))
