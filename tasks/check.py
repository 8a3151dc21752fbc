"""check: what would fail later, found out before an engine starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tasks import models
from tasks.config import (
    CurateConfig,
    EvaluateConfig,
    GeneratorConfig,
    ImportConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
)
from tasks.errors import ConfigError
from tasks.imports import preview
from tasks.sources import find_source
from tasks.store import Store
from tasks.versions import find_version

Check = tuple[str, Callable[[], str]]  # what is looked at; finds out, or raises ConfigError or RunError


def check(config: RunConfig, probe: bool = True) -> dict[str, str]:
    """What was found out, by what was looked at; raises at the first thing that is wrong."""
    return {what: find_out() for what, find_out in checks(config, probe)}


def checks(config: RunConfig, probe: bool = True) -> Iterator[Check]:
    """The store first, then everything that the configuration names. Without a probe nothing is written."""
    store = Store(config.store_url)
    yield f"store {config.store_url}", store.check if probe else store.reach
    if isinstance(config, TrainConfig):
        yield f"subset {config.subset}", lambda: str(find_version(store, config.subset))
        yield f"model {config.policy.model}", lambda: models.identity("policy.model", config.policy, store)
    if isinstance(config, CurateConfig) and config.import_:
        source = config.import_
        yield f"completions {source.source}", lambda: _understood(source)
    if isinstance(config, CurateConfig | EvaluateConfig):
        if config.ingest:
            prompts = config.ingest
            yield f"prompts {prompts.source}", lambda: find_source(prompts)
        for i, generator in enumerate(config.generate.generators if config.generate else []):
            yield f"generator {generator.name}", _generator(generator, f"generate.generators.{i}", store)
        for i, scorer in enumerate(config.score.scorers if config.score else []):
            yield f"scorer {scorer.name}", _scorer(scorer, f"score.scorers.{i}", store)
        yield "models and functions", lambda: _distinct(config, store)


def _understood(config: ImportConfig) -> str:
    seen = preview(config)
    bad = f", {len(seen['bad'])} of the first {seen['looked_at']} rows bad" if seen["bad"] else ""
    return f"form {seen['form']}{bad}"


def _distinct(config: CurateConfig | EvaluateConfig, store: Store) -> str:
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


def _generator(generator: GeneratorConfig, field: str, store: Store) -> Callable[[], str]:
    def find_out() -> str:
        _engine_installed(f"{field}.engine", generator.engine)
        if generator.engine == "fake":
            return "fake engine"
        return f"{generator.engine}, {models.identity(f'{field}.model', generator, store)}"

    return find_out


def _scorer(scorer: ScorerConfig, field: str, store: Store) -> Callable[[], str]:
    def find_out() -> str:
        if scorer.type == "function":
            models.load_function(scorer)
            return f"function in {models.function_source(scorer)}"
        _engine_installed(f"{field}.engine", scorer.engine)
        if scorer.engine == "fake":
            return "fake engine"
        return f"{scorer.engine}, {models.identity(f'{field}.model', scorer, store)}"

    return find_out


def _engine_installed(field: str, engine: str) -> None:
    import importlib.util

    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{field}: vllm is not installed; install prefsieve[gpu] or prefsieve[cpu]")
