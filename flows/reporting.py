"""What a run shows while it goes and when it is done, as Prefect artifacts and logs: progress, counts, the report."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.card import dropped_words, selection_words
from tasks.progress import Progress, Report
from tasks.records import Counts, Rewards, Version, Work
from tasks.store import Store
from tasks.versions import read_manifest

_ARTIFACT_EVERY = 2.0  # seconds between two updates of a progress artifact
_LOG_EVERY = 10.0
_PATIENCE = 10.0  # seconds that an end waits for what it shows; Prefect's client itself tries for a minute


@contextlib.contextmanager
def progress_artifact(stage: str) -> Iterator[Report]:
    """A reporter that keeps one progress artifact up to date and logs now and then; the end is always shown."""
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
        if now - shown >= _ARTIFACT_EVERY and not (showing and showing.is_alive()):
            shown = now
            showing = _beside(lambda: show(progress))
        if progress.done and now - logged >= _LOG_EVERY and not progress.finished:
            logged = now
            logger.info("%s: %s", progress.stage, progress)

    yield report
    if last:
        done = Progress(last.stage, last.done, last.done, last.unit, last.rate, last.reused, last.note)
        if showing is None or _ended(showing):
            _ended(_beside(lambda: show(done)))
        logger.info("%s: %s", done.stage, done)


def _beside(tell: Callable[[], Any]) -> threading.Thread:
    """Tell Prefect's server something while the work goes on: one that is gone costs what it would have shown."""
    context, logger = copy_context(), get_run_logger()

    def attempt() -> None:
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


def show_counts(flow: str, stages: list[dict[str, Any]]) -> None:
    """The table artifact of counts and drops."""
    rows = [{**row, "dropped": dropped_words(row["dropped"])} for row in stages]
    about = "Rows in, out and dropped, and the work done, by stage"
    _ended(_beside(lambda: create_table_artifact(rows, key=f"{flow}-counts", description=about)))


def show_report(flow: str, markdown: str) -> None:
    """The report artifact."""
    about = f"Report of {flow}"
    _ended(_beside(lambda: create_markdown_artifact(markdown, key=f"{flow}-report", description=about)))
