"""The configuration: one bounded pydantic model per stage, checked as a whole before anything starts.

The flows take these models as parameters, so Prefect's UI draws its form from the titles and descriptions here and
validates with the same rules as the command line. Cross-references (which scorer a pairing ranks by) are checked here
too: a wrong name must not cost GPU time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_STORE = ".prefsieve/store"
PAIR_SCORE = "score"  # what the scores of imported pairs are called


def _unique(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} is used twice; names must differ")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ColumnsConfig(Section):
    prompt: str = Field("prompt", description="Column with the prompt: a text, or a list of chat messages.")
    source: str = Field("source", description="Column that says where a row comes from. May be absent.")
    keep: list[str] = Field([], description="Further columns, for function scorers and strata, such as the answer.")


class SourceConfig(Section):
    stage: ClassVar[str]

    source: str = Field(description="File, folder, glob, s3:// URL, or data set name on the Hugging Face hub.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "disk", "hub"] = Field(
        "auto", description="auto goes by the ending; disk is a save_to_disk folder; hub a data set name."
    )
    split: str = Field("train", description="Split to take, for disk and hub.")
    limit: int = Field(0, ge=0, description="Take only the first rows; 0 takes all.")
    max_chars: int = Field(100_000, ge=1, description="A longer prompt, or imported completion, is quarantined.")
    max_quarantined: float = Field(0.1, ge=0, le=1, description="Stop when a larger share of the rows is bad.")
    shard_size: int = Field(
        256, ge=1, description="Prompts per shard, the unit of work. What was cut smaller before stays so."
    )


class IngestConfig(SourceConfig):
    stage: ClassVar[str] = "ingest"

    columns: ColumnsConfig = Field(ColumnsConfig(), description="Which columns hold what.")


class RatingConfig(Section):
    """Ratings that came with the completions; they stand under their name as a scorer's rewards do."""

    name: Name = Field(description="Your name for it, used by pairings and reports.")
    column: str = Field("", description="Its column, or path.to.it in nested completions; empty takes the name.")
    transform: Literal["none", "logit"] = Field("none", description="logit for probabilities: ln(p / (1 - p)).")
    clip: float = Field(
        0.0, ge=0, lt=0.5, description="Of logit: p is kept in [clip, 1 - clip]. At 0 a p of 0 or 1 is no rating."
    )


class ImportColumnsConfig(ColumnsConfig):
    completions: str = Field("completions", description="Nested: a list of completions per row.")
    generator: str = Field("generator", description="Who wrote a completion. May be absent.")
    text: str = Field("text", description="The completion: a text or chat messages. Nested without completions: lists.")
    chosen: str = Field("chosen", description="Pairs: the preferred completion, with or without its prompt.")
    rejected: str = Field("rejected", description="Pairs: the other one.")
    chosen_score: str = Field("score_chosen", description="Pairs: its score. May be absent.")
    rejected_score: str = Field("score_rejected", description="Pairs: the other one's score. May be absent.")


class ImportConfig(SourceConfig):
    """Completions that exist already, rated or in pairs."""

    stage: ClassVar[str] = "import"

    form: Literal["auto", "long", "nested", "pairs"] = Field(
        "auto", description="long: a row per completion; nested: lists in a row per prompt; auto goes by the columns."
    )
    columns: ImportColumnsConfig = Field(ImportColumnsConfig(), description="Which columns hold what.")
    ratings: list[RatingConfig] = Field([], description="Columns with ratings. Pairs have their score columns.")
    tokenizer: str = Field("", description="Folder or hub name that counts tokens; empty counts words and marks.")

    @model_validator(mode="after")
    def _unique_names(self) -> ImportConfig:
        _unique("import.ratings", [rating.name for rating in self.ratings])
        return self


class ModelConfig(Section):
    """A model, and the workers that hold it. Workers and their resources do not change what is computed."""

    model: str = Field("", description="Folder, hub name, or policy:NAME[@VERSION] from the store.")
    revision: str = Field("", description="Branch, tag or commit on the hub; empty for the default.")
    dtype: Dtype = Field("auto", description="Numeric type of the weights.")
    max_model_len: int = Field(0, ge=0, description="Longest sequence in tokens; 0 for the model's own.")
    trust_remote_code: bool = Field(False, description="Run code that ships with the model. Only if you trust it.")
    workers: int = Field(1, ge=1, le=1024, description="Engines at once.")
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves per engine.")
    gpus: float = Field(0, ge=0, description="GPUs that Ray reserves per engine.")
    batch_size: int = Field(64, ge=1, description="Sequences at once, transformers engine only.")
    engine_args: dict[str, Any] = Field({}, description="Further arguments of the engine, for example vLLM's.")


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0, le=10, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens of this total probability.")
    top_k: int = Field(0, ge=0, description="0 keeps all tokens.")
    max_tokens: int = Field(512, ge=1, description="Longest completion in tokens.")


class GeneratorConfig(ModelConfig):
    name: Name = Field(description="Your name for it, used by pairings and reports.")
    engine: Literal["transformers", "vllm", "fake"] = Field("transformers", description="fake is for dry runs.")
    system_prompt: str = Field("", description="Put before every prompt.")
    sampling: SamplingConfig = Field(SamplingConfig(), description="How tokens are drawn.")
    seed: int = Field(0, ge=0, lt=2**31, description="Another seed gives other samples.")

    @model_validator(mode="after")
    def _has_model(self) -> GeneratorConfig:
        if self.engine != "fake" and not self.model:
            raise ValueError(f"generator {self.name!r}: engine {self.engine!r} needs `model`: a folder or a hub name")
        return self


class GenerateConfig(Section):
    samples: int = Field(8, ge=1, le=1024, description="Completions per prompt and generator.")
    generators: list[GeneratorConfig] = Field(min_length=1, description="One or more models that answer the prompts.")
    max_refused: float = Field(0.1, ge=0, le=1, description="Stop when engines refuse a larger share of the prompts.")

    @model_validator(mode="after")
    def _unique_names(self) -> GenerateConfig:
        _unique("generators", [generator.name for generator in self.generators])
        for generator in self.generators:
            if generator.engine == "vllm" and generator.sampling.temperature == 0 and self.samples > 1:
                raise ValueError(
                    f"generator {generator.name!r}: at temperature 0 all samples are equal, and vLLM refuses more than "
                    "one; set samples: 1 or a temperature"
                )
        return self


class ScorerConfig(ModelConfig):
    name: Name = Field(description="Your name for it, used by pairings and reports.")
    type: Literal["reward_model", "function"] = Field("reward_model", description="A model's logit, or your function.")
    engine: Literal["transformers", "vllm", "fake"] = Field("transformers", description="Runs the reward model.")
    function: str = Field("", description="package.module:name or path/to/file.py:name, called as f(prompt, text).")

    @model_validator(mode="after")
    def _has_its_part(self) -> ScorerConfig:
        if self.type == "function" and ":" not in self.function:
            raise ValueError(f"scorer {self.name!r}: type function needs `function`, such as checks/answers.py:score")
        if self.type == "reward_model" and self.engine != "fake" and not self.model:
            raise ValueError(f"scorer {self.name!r}: type reward_model needs `model`: a folder or a hub name")
        return self


class EnsembleConfig(Section):
    """Mean of its members' rewards, each z-scored over all completions of a pairing."""

    name: Name = Field(description="Your name for it, used by pairings and reports.")
    members: list[str] = Field(min_length=2, description="Scorers: NAME, or NAME:DIMENSION of a judge.")


class ScoreConfig(Section):
    scorers: list[ScorerConfig] = Field(min_length=1, description="One or more sources of rewards.")
    max_missing: float = Field(0.05, ge=0, le=1, description="Stop when a larger share of the rewards is not finite.")

    @model_validator(mode="after")
    def _unique_names(self) -> ScoreConfig:
        _unique("scorers", [scorer.name for scorer in self.scorers])
        return self


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
    reward_scale: float | Literal["auto"] = Field(
        1.0, description="T in PVar's sigmoid((r_i - r_j) / T); auto takes the pooled deviation within prompts."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Draws for best_vs_random and random_pair.")

    @model_validator(mode="after")
    def _consistent(self) -> PairingConfig:
        if self.rule == "generator_delta" and len(self.generators) != 2:
            raise ValueError(f"pairing {self.name!r}: generator_delta needs `generators: [stronger, weaker]`")
        if self.reward_scale != "auto" and self.reward_scale <= 0:
            raise ValueError(f"pairing {self.name!r}: reward_scale {self.reward_scale:g} must be above 0, or auto")
        _unique(f"pairing {self.name!r}: generators", self.generators)
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


Step = Annotated[
    Annotated[FilterStep, Tag("filter")] | Annotated[RankStep, Tag("rank")],
    Discriminator(
        _kind_of_step,
        custom_error_type="step",
        custom_error_message="a step is `filter: METRIC` with min, max, within, quantiles or values, or `rank: METRIC` "
        "with keep and fraction, count or tokens",
    ),
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
    store: str = Field("", description="Folder or s3:// URL; empty takes PREFSIEVE_STORE, else .prefsieve/store.")
    ray_address: str = Field("local", description="local starts Ray here; auto joins the cluster this process is in.")

    @property
    def store_url(self) -> str:
        return self.store or os.environ.get("PREFSIEVE_STORE", DEFAULT_STORE)


# Of the table of pairs; per further scorer there are margin.NAME, tau.NAME and flipped.NAME.
METRICS = (
    "pvar",
    "pvar_error",
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
        _unique(f"scorers, ratings and ensembles (the scores of imported pairs are called {PAIR_SCORE!r})", scorers)
        _unique("pair", pairings)
        _unique("subset", [name for subset in self.subset for name in subset.names()])
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
        if not self.generate:
            return
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


class TrainingConfig(Section):
    """How to train; the defaults suit full fine-tuning of a small model by DPO."""

    objective: Literal["dpo"] = Field("dpo", description="Training objective.")
    beta: float = Field(0.1, gt=0, description="DPO's beta, on summed log-probabilities (0.01-0.5).")
    learning_rate: float = Field(1e-6, gt=0, description="Peak; falls along a cosine.")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="Share of the steps in which it rises to the peak.")
    epochs: float = Field(1.0, gt=0, description="Passes over the subset, unless max_steps is set.")
    max_steps: int = Field(0, ge=0, description="Optimiser steps; 0 goes by epochs.")
    batch_size: int = Field(32, ge=1, description="Pairs per optimiser step.")
    micro_batch_size: int = Field(8, ge=1, description="Pairs per forward pass; divides batch_size.")
    max_length: int = Field(1024, ge=2, description="Longest prompt + response in tokens; longer pairs are dropped.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    save_steps: int = Field(0, ge=0, description="Checkpoint interval in steps; 0 saves ten times in a run.")
    seed: int = Field(0, ge=0, lt=2**31, description="Order of the pairs.")

    @model_validator(mode="after")
    def _micro_batches(self) -> TrainingConfig:
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        return self


class PolicyConfig(Section):
    model: str = Field(description="Folder or hub name of the model to start from, or policy:NAME[@VERSION].")
    revision: str = Field("", description="Branch, tag or commit on the hub; empty for the default.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Numeric type of weights and training.")
    trust_remote_code: bool = Field(False, description="Run code that ships with the model. Only if you trust it.")
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves for training.")
    gpus: float = Field(0, ge=0, le=1, description="GPUs that Ray reserves for training.")


class TrainConfig(RunConfig):
    """A published subset in, a trained policy out."""

    name: Name = Field(description="The trained policy is kept under this name.")
    subset: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@[0-9a-f]{8,64})?$",
        description="Published subset, NAME or NAME@VERSION. Never a path: a policy must be able to name its data.",
    )
    policy: PolicyConfig
    train: TrainingConfig = TrainingConfig()


class CompareConfig(Section):
    policy: Name = Field("policy", description="Name of the generator under test.")
    reference: Name = Field("reference", description="Name of the generator it is compared with.")


class EvaluateConfig(RunConfig):
    """Held-out prompts in; rewards, win rate and lengths of a policy against a reference out."""

    ingest: IngestConfig
    generate: GenerateConfig
    score: ScoreConfig
    evaluate: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _references(self) -> EvaluateConfig:
        names = [generator.name for generator in self.generate.generators]
        _known("evaluate: policy", self.evaluate.policy, names)
        _known("evaluate: reference", self.evaluate.reference, names)
        if self.evaluate.policy == self.evaluate.reference:
            raise ValueError("evaluate: policy and reference must be different generators")
        return self


def is_local_path(name: str) -> bool:
    """A model or data name that can only be meant as a path on this machine."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def _known(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not one of {', '.join(known)}")
