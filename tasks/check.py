"""check: what would fail later, found out before an engine starts."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tasks import models
from tasks.config import CurateConfig, EvaluateConfig, RunConfig, TrainConfig, is_dashboard
from tasks.duel import missing_duels, sides_of
from tasks.errors import ConfigError, RunError
from tasks.experiments import ExperimentConfig, HeldOutConfig
from tasks.generate import missing_completions
from tasks.harness import harness_found
from tasks.imports import known_import, preview
from tasks.ingest import known_prompts
from tasks.records import Completions
from tasks.samples import wanted, wanted_of
from tasks.score import files_to_rate, missing_rewards
from tasks.sections import GeneratorConfig, ImportConfig, ScorerConfig
from tasks.sources import find_source
from tasks.store import Store
from tasks.training import PolicyConfig, TrainingConfig, check_columns
from tasks.versions import find_version

Evaluated = CurateConfig | EvaluateConfig | HeldOutConfig
Check = tuple[str, Callable[[], str]]  # what is looked at; finds out, or raises ConfigError or RunError


def check(config: RunConfig, probe: bool = True) -> dict[str, str]:
    """What was found out, by what was looked at; raises at the first thing that is wrong."""
    return {what: find_out() for what, find_out in checks(config, probe)}


def checks(config: RunConfig, probe: bool = True) -> Iterator[Check]:
    """The store first, then everything that the configuration names. Without a probe nothing is written.

    What has to be installed is the cluster's affair where the run is a job there, which checks it again.
    """
    store, here = Store(config.store_url), not is_dashboard(config.ray_address)
    yield f"store {config.store_url}", store.check if probe else store.reach
    if isinstance(config, ExperimentConfig):
        yield from _experiment(config, store, here)
        return
    yield from _named(config, store, here)


def _experiment(config: ExperimentConfig, store: Store, here: bool) -> Iterator[Check]:
    """What curate will publish need not be there; a policy that is evaluated need not be either."""
    curate = config.curate
    published = [name for subset in curate.subset for name in subset.names()] if curate else []
    for subset in config.subsets:
        if subset not in published:
            trains = [
                config.training(cell, "cell", subset).train for cell in config.cells() if cell.arm.subset == subset
            ]
            yield f"subset {subset}", lambda subset=subset, trains=trains: _subset(subset, trains, store)  # type: ignore[misc]
    yield f"model {config.policy.model}", lambda: _policy(config.policy, store, here)
    if curate:
        yield from _named(curate, store, here)
    evaluate = config.evaluate
    yield f"held-out prompts {evaluate.ingest.source}", lambda: find_source(evaluate.ingest)
    yield "reference", _generator(evaluate.reference, "evaluate.generate.generators.0", store, here)
    for i, scorer in enumerate(evaluate.score.scorers):
        yield f"held-out scorer {scorer.name}", _scorer(evaluate, scorer, f"evaluate.score.scorers.{i}", store, here)
    yield "models and functions of the evaluation", lambda: _distinct(evaluate, store)


def _named(config: RunConfig, store: Store, here: bool) -> Iterator[Check]:
    """What the other flows name."""
    if isinstance(config, TrainConfig):
        yield f"subset {config.subset}", lambda: _subset(config.subset, [config.train], store)
        yield f"model {config.policy.model}", lambda: _policy(config.policy, store, here)
    if isinstance(config, CurateConfig) and config.import_:
        source = config.import_
        yield f"completions {source.source}", lambda: _understood(source)
    if isinstance(config, CurateConfig | EvaluateConfig):
        if config.ingest:
            prompts = config.ingest
            yield f"prompts {prompts.source}", lambda: find_source(prompts)
        for i, generator in enumerate(config.generate.generators if config.generate else []):
            yield f"generator {generator.name}", _generator(generator, f"generate.generators.{i}", store, here)
        for i, scorer in enumerate(config.score.scorers if config.score else []):
            yield f"scorer {scorer.name}", _scorer(config, scorer, f"score.scorers.{i}", store, here)
        if isinstance(config, EvaluateConfig) and config.harness:
            tasks_of = config.harness
            yield f"harness {', '.join(tasks_of.tasks)}", lambda: harness_found(tasks_of)
        yield "models and functions", lambda: _distinct(config, store)


def _subset(name: str, trainings: list[TrainingConfig], store: Store) -> str:
    """The version that is meant, when it has the columns that its trainings go by."""
    version = find_version(store, name)
    for file in store.list(f"{version.place}/data")[:1]:
        for train in trainings:
            check_columns(train, str(version), store.columns(file))
    return str(version)


def _understood(config: ImportConfig) -> str:
    seen = preview(config)
    bad = f", {len(seen['bad'])} of the first {seen['looked_at']} rows bad" if seen["bad"] else ""
    return f"form {seen['form']}{bad}"


def _distinct(config: Evaluated, store: Store) -> str:
    """A model under two names would be paid for twice, and be preferred to itself."""
    generators = config.generate.generators if config.generate else []
    scorers = config.score.scorers if config.score else []
    models.check_distinct("generate.generators", _fingerprints(generators, models.generator_fingerprint, store))
    models.check_distinct("score.scorers", _fingerprints(scorers, models.scorer_fingerprint, store))
    return "none stands under two names"


def _fingerprints(configs: Sequence[Any], fingerprint: Callable[[Any, Store], str], store: Store) -> dict[str, str]:
    """By name, of those that exist: what does not has its own check."""
    found = {}
    for config in configs:
        with contextlib.suppress(ConfigError):
            found[config.name] = fingerprint(config, store)
    return found


def _generator(generator: GeneratorConfig, field: str, store: Store, here: bool) -> Callable[[], str]:
    def find_out() -> str:
        _engine_installed(f"{field}.engine", generator.engine, here)
        if generator.engine == "fake":
            return "fake engine"
        return f"{generator.engine}, {models.identity(f'{field}.model', generator, store)}"

    return find_out


def _scorer(config: Evaluated, scorer: ScorerConfig, field: str, store: Store, here: bool) -> Callable[[], str]:
    def find_out() -> str:
        if scorer.type == "function":
            models.load_function(scorer)
            return f"function in {models.function_source(scorer)}"
        _engine_installed(f"{field}.engine", scorer.engine, here)
        if scorer.engine == "fake":
            return "fake engine"
        if scorer.engine == "openai":
            return _endpoint(config, scorer, store)
        return f"{scorer.engine}, {models.identity(f'{field}.model', scorer, store)}"

    return find_out


def _endpoint(config: Evaluated, scorer: ScorerConfig, store: Store) -> str:
    """An endpoint that is gone is no fault where nothing is left to ask it."""
    from tasks.engines.openai import served

    try:
        return f"openai, {served(scorer)}"
    except (ConfigError, RunError):
        if not _all_rated(config, scorer, store):
            raise
        return "openai, not there, and not needed: all is rated"


def _all_rated(config: Evaluated, scorer: ScorerConfig, store: Store) -> bool:
    completions = _known_completions(config, store)
    if completions is None:
        return False
    fingerprint = models.scorer_fingerprint(scorer, store)
    if isinstance(config, EvaluateConfig) and scorer.compares:
        sides = sides_of(config.evaluate, completions)
        return not missing_duels(store, fingerprint, sides, list(wanted_of(store, completions)))
    files = [item for item, _ in files_to_rate(completions, store)]
    return not missing_rewards(store, scorer, fingerprint, files)


def _known_completions(config: Evaluated, store: Store) -> Completions | None:
    """What a run would score, when it is all there."""
    if isinstance(config, CurateConfig) and config.import_:
        known = known_import(config.import_, store)
        return known.completions if known else None
    if isinstance(config, HeldOutConfig):  # it names the reference alone, not the policies
        return None
    assert config.ingest and config.generate
    prompts = known_prompts(config.ingest, store)
    if prompts is None or config.generate.adaptive:
        return None
    fingerprints = {g.name: models.generator_fingerprint(g, store) for g in config.generate.generators}
    shards = list(wanted(store, prompts, config.generate.samples))
    if any(missing_completions(store, generator, shards) for generator in fingerprints.values()):
        return None
    return Completions(prompts, config.generate.samples, fingerprints, prompts.counts)


def _policy(config: PolicyConfig, store: Store, here: bool) -> str:
    _installed("policy", "trl", "training", here)
    return models.identity("policy.model", config, store)


def _engine_installed(field: str, engine: str, here: bool) -> None:
    if package := {"vllm": "vllm", "transformers": "torch"}.get(engine):
        _installed(field, package, "gpu] or prefsieve[cpu", here)


def _installed(field: str, package: str, extra: str, here: bool) -> None:
    if here and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{field}: {package} is not installed; install prefsieve[{extra}], or hand the run to a cluster that has "
            "it, by ray_address: http://HEAD:8265"
        )
