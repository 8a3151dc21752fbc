"""The configuration: one bounded pydantic model per stage, checked as a whole before anything starts.

The flows take these models as parameters, so Prefect's UI draws its form from the titles and descriptions here and
validates with the same rules as the command line. Cross-references (which scorer a pairing ranks by) are checked here
too: a wrong name must not cost GPU time. The sections about data and engines are in tasks/sections.py.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, WithJsonSchema, field_validator, model_validator

from tasks.sections import (
    EnsembleConfig,
    GenerateConfig,
    ImportConfig,
    IngestConfig,
    Name,
    PricesConfig,
    RewardScale,
    ScoreConfig,
    Section,
    unique,
)
from tasks.training import PolicyConfig, TrainingConfig, micro_batch
from tasks.urls import Place

DEFAULT_STORE = ".prefsieve/store"
PAIR_SCORE = "score"  # what the scores of imported pairs are called


class PairingConfig(Section):
    name: Name = Field("pairs", description="Your name for this table of pairs, used by subsets.")
    rule: Literal["best_vs_worst", "best_vs_random", "random_pair", "generator_delta", "labelled"] = Field(
        "best_vs_worst",
        description="By reward among all samples; the stronger generator over the weaker; or as imported pairs say.",
    )
    generators: list[str] = Field(
        [], description="Whose samples take part; empty takes all. generator_delta: the stronger, then the weaker."
    )
    scorer: str | None = Field(
        None, description="Whose rewards decide: NAME, or NAME:DIMENSION of a judge; empty takes the first."
    )
    reward_scale: RewardScale = Field(
        1.0,
        ge=0,
        description="T in PVar's sigmoid((r_i - r_j) / T); 0, or auto, takes the pooled deviation within prompts.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Draws for best_vs_random and random_pair.")

    @model_validator(mode="after")
    def _consistent(self) -> PairingConfig:
        if self.rule == "generator_delta" and len(self.generators) != 2:
            raise ValueError(f"pairing {self.name!r}: generator_delta needs `generators: [stronger, weaker]`")
        unique(f"pairing {self.name!r}: generators", self.generators)
        return self


class FilterStep(Section):
    """Keeps the pairs whose metric lies in a range; a pair without the metric is dropped."""

    filter: str = Field(description="A metric such as margin or length_difference, or a text column such as source.")
    min: float | None = Field(None, description="At least this.")
    max: float | None = Field(None, description="At most this.")
    within: float | None = Field(None, ge=0, description="At most this far from 0, on either side.")
    quantiles: tuple[float, float] | None = Field(
        None, description="Between these shares of the pairs that the step gets, such as [0.2, 0.8]."
    )
    values: list[str] | None = Field(None, min_length=1, description="One of these, for text columns.")

    @model_validator(mode="after")
    def _one_test(self) -> FilterStep:
        numeric = (self.min, self.max, self.within, self.quantiles)
        if all(test is None for test in (*numeric, self.values)):
            raise ValueError(f"filter {self.filter!r}: give min, max, within, quantiles or values")
        if self.values is not None and any(test is not None for test in numeric):
            raise ValueError(f"filter {self.filter!r}: values are for text, min, max, within and quantiles for numbers")
        if self.quantiles and not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"filter {self.filter!r}: quantiles {list(self.quantiles)} must rise within 0 and 1")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"filter {self.filter!r}: min {self.min:g} is above max {self.max:g}")
        return self


class RankStep(Section):
    """Keeps one end of an order; ties fall by a seeded hash of the prompt."""

    rank: str = Field(description="A metric such as pvar or margin; or random.")
    keep: Literal["top", "bottom"] = Field("top", description="Which end of the order to keep.")
    fraction: float | None = Field(None, gt=0, le=1, description="Share of the pairs to keep.")
    count: int | None = Field(None, ge=1, description="Or: how many pairs to keep.")
    tokens: int | None = Field(None, ge=1, description="Or: as many pairs as have this many tokens on both sides.")
    by: str | None = Field(None, description="Do so within each value of a column, such as source or field.difficulty.")
    quotas: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="With `by` and a count or tokens: each value's share of it; empty shares by size."
    )

    @model_validator(mode="after")
    def _one_size(self) -> RankStep:
        if sum(size is not None for size in (self.fraction, self.count, self.tokens)) != 1:
            raise ValueError(f"rank {self.rank!r}: give one of fraction, count and tokens")
        if self.quotas and (self.by is None or self.fraction is not None):
            raise ValueError(f"rank {self.rank!r}: quotas share out a count or tokens, and need `by`")
        if sum(self.quotas.values()) > 1 + 1e-9:
            raise ValueError(f"rank {self.rank!r}: quotas {self.quotas} add up to more than 1")
        return self


Control = Literal["random", "bottom", "margin_matched", "length_matched"]


def _kind_of_step(step: Any) -> str | None:
    named = step if isinstance(step, dict) else step.__dict__ if isinstance(step, Section) else {}
    kinds = [kind for kind in ("filter", "rank") if kind in named]
    return kinds[0] if len(kinds) == 1 else None


# One object with the fields of both: Prefect's form has no inputs for a choice of objects.
_STEP_SCHEMA: dict[str, Any] = {
    "title": "Step",
    "description": "Either filter, with min, max, within, quantiles or values; or rank, with a size.",
    "type": "object",
    "additionalProperties": False,
    "properties": {**FilterStep.model_json_schema()["properties"], **RankStep.model_json_schema()["properties"]},
}

Step = Annotated[
    Annotated[FilterStep, Tag("filter")] | Annotated[RankStep, Tag("rank")],
    Discriminator(
        _kind_of_step,
        custom_error_type="step",
        custom_error_message="a step is `filter: METRIC` with min, max, within, quantiles or values, or `rank: METRIC` "
        "with keep and fraction, count or tokens",
    ),
    WithJsonSchema(_STEP_SCHEMA),
]


class SubsetConfig(Section):
    """Which pairs to publish: steps, each working on what the one before left."""

    name: Name = Field(description="Published under this name.")
    pairs: Name | None = Field(None, description="Which pairing to take from; empty takes the first.")
    steps: list[Step] = Field(min_length=1, description="Filters and rankings, in order.")
    controls: list[Control] = Field([], description="Subsets of equal size to compare with, published as NAME-CONTROL.")
    seed: int = Field(0, ge=0, lt=2**31, description="Breaks ties, and draws what is random.")

    @model_validator(mode="after")
    def _controls_have_a_ranking(self) -> SubsetConfig:
        if len(set(self.controls)) < len(self.controls):
            raise ValueError(f"subset {self.name!r}: a control is named twice")
        if self.controls and not any(isinstance(step, RankStep) for step in self.steps):
            raise ValueError(f"subset {self.name!r}: controls need a `rank` step; filters alone take all that pass")
        if "bottom" in self.controls and not any(
            isinstance(step, RankStep) and step.rank != "random" for step in self.steps
        ):
            raise ValueError(f"subset {self.name!r}: the control `bottom` needs a `rank` step by a metric")
        return self

    def names(self) -> list[str]:
        """Of all that is published: the subset, then its controls."""
        return [self.name, *(control_name(self.name, control) for control in self.controls)]


def control_name(subset: str, control: str) -> str:
    return f"{subset}-{control.replace('_', '-')}"


class PublishConfig(Section):
    rows_per_file: int = Field(50_000, ge=1, description="Rows per Parquet file.")
    license: str = Field("other", description="License named in the data set card.")


class RunConfig(Section):
    store: Place = Field("", description="Folder or s3:// URL; empty takes PREFSIEVE_STORE, else .prefsieve/store.")
    ray_address: str = Field(
        "local",
        description="local starts Ray here; auto and HOST:PORT join a cluster; http://HEAD:8265 runs as a job there.",
    )
    prices: PricesConfig = Field(PricesConfig(), description="What GPUs and endpoints cost, for the report.")

    @field_validator("ray_address")
    @classmethod
    def _an_address(cls, value: str) -> str:
        if not re.fullmatch(r"local|auto|[^/@\s]+:\d{1,5}|https?://[^/@?#\s]+/?", value):
            raise ValueError(
                "give local, auto, HOST:PORT of a cluster to join, or http://HEAD:8265 of its dashboard; tokens go "
                "into the environment"
            )
        return value

    @property
    def store_url(self) -> str:
        return self.store or os.environ.get("PREFSIEVE_STORE", DEFAULT_STORE)


# Of the table of pairs; per further scorer there are margin.NAME, tau.NAME and flipped.NAME.
METRICS = (
    "pvar",
    "pvar_error",
    "pvar_posterior",
    "pvar_posterior_error",
    "rewards_finite",
    "score_chosen",
    "score_rejected",
    "margin",
    "generator_delta",
    "disagreement",
    "chosen_tokens",
    "rejected_tokens",
    "length_difference",
)
TEXT_COLUMNS = ("source", "chosen_generator", "rejected_generator")
PER_SCORER = ("margin", "tau", "flipped")
FIELD = "field."  # before the name of a kept column


class CurateConfig(RunConfig):
    """Prompts, or completions that exist already, in; published subsets out."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    ingest: IngestConfig | None = None
    import_: ImportConfig | None = Field(None, alias="import")
    generate: GenerateConfig | None = None
    score: ScoreConfig | None = None
    ensembles: list[EnsembleConfig] = Field([], description="Scorers made of others.")
    pair: list[PairingConfig] = Field([PairingConfig()], min_length=1)
    subset: list[SubsetConfig] = Field(min_length=1)
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _one_beginning(self) -> CurateConfig:
        if (self.ingest is None) == (self.import_ is None):
            raise ValueError("give either `ingest`, for prompts, or `import`, for completions that exist already")
        if self.ingest and not (self.generate and self.score):
            raise ValueError(
                "`ingest` needs `generate` and `score`: models that answer the prompts, and what rates them"
            )
        if self.import_ and self.generate:
            raise ValueError("`import` brings its completions along; remove `generate`, or import prompts by `ingest`")
        if self.generate and self.generate.adaptive and self.score:
            scorers = {scorer.name: scorer for scorer in self.score.scorers}
            name = self.generate.adaptive.scorer or next(iter(scorers))
            _known("generate.adaptive: scorer", name, list(scorers))
            if scorers[name].type == "judge" and scorers[name].judge.mode == "pairwise":
                raise ValueError(
                    f"generate.adaptive: scorer {name!r} compares within a round only, so rounds cannot go by it; use "
                    "mode: pointwise, or another scorer"
                )
            if len(self.generate.generators) > 1:
                raise ValueError("generate.adaptive: give one generator; PVar is over the samples of one policy")
        return self

    @property
    def scorers(self) -> list[str]:
        """Names of all sources of rewards, ensembles last. Whether there are pairs with scores is known once read."""
        imported = [rating.name for rating in self.import_.ratings] if self.import_ else []
        if self.import_ and not imported and self.import_.form in ("auto", "pairs"):
            imported = [PAIR_SCORE]
        scored = [scorer.name for scorer in self.score.scorers] if self.score else []
        return [*imported, *scored, *(ensemble.name for ensemble in self.ensembles)]

    @model_validator(mode="after")
    def _references(self) -> CurateConfig:
        scorers, pairings = self.scorers, [pairing.name for pairing in self.pair]
        unique(f"scorers, ratings and ensembles (the scores of imported pairs are called {PAIR_SCORE!r})", scorers)
        unique("pair", pairings)
        unique("subset", [name for subset in self.subset for name in subset.names()])
        for ensemble in self.ensembles:
            for member in ensemble.members:
                singles = scorers[: len(scorers) - len(self.ensembles)]
                _known(f"ensemble {ensemble.name!r}: members", member.partition(":")[0], singles)
        for pairing in self.pair:
            self._check_pairing(pairing)
        for subset in self.subset:
            if subset.pairs:
                _known(f"subset {subset.name!r}: pairs", subset.pairs, pairings)
            for step in subset.steps:
                self._check_step(subset.name, step)
        return self

    def subset_of_each_name(self) -> list[SubsetConfig]:
        """One per published name: each subset stands once for itself and once for each of its controls."""
        return [subset for subset in self.subset for _ in subset.names()]

    def _check_pairing(self, pairing: PairingConfig) -> None:
        where = f"pair {pairing.name!r}"
        if pairing.scorer:
            _known(f"{where}: scorer", pairing.scorer.partition(":")[0], self.scorers)
        if not self.scorers and pairing.rule not in ("labelled", "generator_delta"):
            raise ValueError(
                f"{where}: rule {pairing.rule} goes by rewards, and there are none; name the columns with ratings, as "
                "in import.ratings: [{name: score}], or add a scorer under `score`"
            )
        if not self.generate:
            return
        for scorer in self.score.scorers if self.score else []:
            if scorer.type == "judge" and scorer.judge.mode == "pairwise" and self.generate.samples < 2:
                raise ValueError(f"scorer {scorer.name!r}: mode pairwise needs generate.samples >= 2 to compare")
        generators = [generator.name for generator in self.generate.generators]
        for name in pairing.generators:
            _known(f"{where}: generators", name, generators)
        if pairing.rule == "labelled":
            raise ValueError(f"{where}: rule labelled is for imported pairs; use best_vs_worst")
        if pairing.rule != "generator_delta" and len(pairing.generators or generators) * self.generate.samples < 2:
            raise ValueError(f"{where}: {pairing.rule} needs generate.samples >= 2")

    def _check_step(self, subset: str, step: FilterStep | RankStep) -> None:
        columns = (self.ingest or self.import_).columns  # type: ignore[union-attr]
        fields = [f"{FIELD}{name}" for name in columns.keep]
        metrics = [*METRICS, *(f"{metric}.{scorer}" for scorer in self.scorers for metric in PER_SCORER)]
        texts = [*TEXT_COLUMNS, *fields]
        if isinstance(step, FilterStep):
            known = texts if step.values else [*metrics, *fields]
            _known(f"subset {subset!r}: filter", step.filter.partition(":")[0], known)
            return
        _known(f"subset {subset!r}: rank", step.rank.partition(":")[0], [*metrics, "random", *fields])
        if step.by:
            _known(f"subset {subset!r}: by", step.by, texts)


class TrainConfig(RunConfig):
    """A published subset in, a trained policy out."""

    name: Name = Field(description="The trained policy is kept under this name.")
    subset: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@[0-9a-f]{8,64})?$",
        description="Published subset, NAME or NAME@VERSION. Never a path: a policy must be able to name its data.",
    )
    policy: PolicyConfig
    train: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _shared_batches(self) -> TrainConfig:
        micro_batch(self.train, self.policy)
        return self


class CompareConfig(Section):
    policy: Name = Field("policy", description="Name of the generator under test.")
    reference: Name = Field("reference", description="Name of the generator it is compared with.")
    difficulty: str = Field("", description="Kept column with a number per prompt, for the length-controlled fit.")
    style: bool = Field(False, description="Also control for headers, lists, bold and code blocks; reads all texts.")


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness, run on policy and reference."""

    tasks: list[str] = Field(min_length=1, description="Names of tasks, such as gsm8k, or of your own definitions.")
    include_path: str = Field("", description="Folder with task definitions (YAML) of your own.")
    limit: int = Field(0, ge=0, description="Only the first so many examples of each task; 0 takes all.")
    num_fewshot: int = Field(-1, ge=-1, description="Examples shown before each question; -1 as the task says.")
    chat_template: bool = Field(True, description="Put questions into the model's chat template.")
    max_gen_tokens: int = Field(0, ge=0, description="Longest answer in tokens; 0 as the task says.")


class EvaluateConfig(RunConfig):
    """Held-out prompts in; rewards, win rate and lengths of a policy against a reference out."""

    ingest: IngestConfig
    generate: GenerateConfig
    score: ScoreConfig
    evaluate: CompareConfig = CompareConfig()
    harness: HarnessConfig | None = None

    @model_validator(mode="after")
    def _references(self) -> EvaluateConfig:
        if self.generate.adaptive:
            raise ValueError("generate.adaptive is for curate; an evaluation takes the same samples of every prompt")
        generators = {generator.name: generator for generator in self.generate.generators}
        _known("evaluate: policy", self.evaluate.policy, list(generators))
        _known("evaluate: reference", self.evaluate.reference, list(generators))
        if self.evaluate.policy == self.evaluate.reference:
            raise ValueError("evaluate: policy and reference must be different generators")
        if self.evaluate.difficulty and self.evaluate.difficulty not in self.ingest.columns.keep:
            raise ValueError(
                f"evaluate: difficulty: column {self.evaluate.difficulty!r} is not kept; name it in ingest.columns.keep"
            )
        for name in (self.evaluate.policy, self.evaluate.reference):
            if self.harness and generators[name].engine == "fake":
                raise ValueError(f"harness: generator {name!r} is fake; the harness needs real models")
        return self


def is_dashboard(address: str) -> bool:
    """Whether a flow with this `ray_address` runs as a job of the cluster, not in this process."""
    return address.startswith(("http://", "https://"))


def is_local_path(name: str) -> bool:
    """A model or data name that can only be meant as a path on this machine."""
    return name.startswith(("/", "./", "../", "~")) or os.path.exists(name)


def _known(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not one of {', '.join(known)}")
