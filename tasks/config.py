"""The configuration: one bounded pydantic model per stage, checked as a whole before anything starts.

The flows take these models as parameters, so Prefect's UI draws its form from the titles and descriptions here and
validates with the same rules as the command line. Cross-references (which scorer a pairing ranks by) are checked here
too: a wrong name must not cost GPU time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_STORE = ".prefsieve/store"


def _unique(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} is used twice; names must differ")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnsConfig(Section):
    prompt: str = Field("prompt", description="Column with the prompt: a text, or a list of chat messages.")
    source: str = Field("source", description="Column that says where a row comes from. May be absent.")
    keep: list[str] = Field([], description="Further columns that function scorers need, such as the answer.")


class IngestConfig(Section):
    source: str = Field(description="File, folder, glob, s3:// URL, or data set name on the Hugging Face hub.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "disk", "hub"] = Field(
        "auto", description="auto goes by the ending; disk is a save_to_disk folder; hub a data set name."
    )
    split: str = Field("train", description="Split to take, for disk and hub.")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="Which columns hold what.")
    limit: int = Field(0, ge=0, description="Take only the first rows; 0 takes all.")
    max_chars: int = Field(100_000, ge=1, description="A longer prompt is quarantined.")
    max_quarantined: float = Field(0.1, ge=0, le=1, description="Stop when a larger share of the rows is bad.")
    shard_size: int = Field(
        256, ge=1, description="Prompts per shard, the unit of work. What was cut smaller before stays so."
    )


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


class DimensionConfig(Section):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="snake_case; kept as the column dimension.NAME.")
    description: str = Field(min_length=1, description="What the judge is to look at.")


_RUBRIC = [  # the dimensions of arXiv 2604.08723; the wording is ours
    DimensionConfig(
        name="factuality", description="Are its claims true, as far as the prompt or common knowledge tell?"
    ),
    DimensionConfig(
        name="strategy_coherence", description="Is there one sensible plan, kept to from beginning to end?"
    ),
    DimensionConfig(
        name="step_coherence", description="Does each step follow from those before, without gaps or leaps?"
    ),
    DimensionConfig(
        name="numerical_precision",
        description="Are numbers, units and calculations right and exact? Where none are needed, rate highest.",
    ),
    DimensionConfig(name="signal_to_noise", description="How much of it serves the answer, not filler or repetition?"),
]


class JudgeConfig(Section):
    """What a judge is asked, and the endpoint that answers. The second half does not change what is computed."""

    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise",
        description="Rate each response alone, or compare the responses to a prompt by twos, in both orders.",
    )
    dimensions: list[DimensionConfig] = Field(
        _RUBRIC, min_length=1, max_length=32, description="What is rated; pairwise, what the comparison goes by."
    )
    low: int = Field(1, ge=0, le=100, description="Lowest rating, pointwise.")
    high: int = Field(5, ge=0, le=100, description="Highest rating, pointwise.")
    instructions: str = Field("", description="Put before the rubric, for example what the prompts are about.")
    max_tokens: int = Field(256, ge=1, description="Longest reply in tokens, thinking included.")
    temperature: float = Field(0.0, ge=0, le=10, description="0 is greedy.")

    base_url: str = Field("", description="OpenAI-compatible endpoint, engine openai, such as http://HOST:8000/v1.")
    api_key_env: str = Field("", description="NAME of the environment variable with the key; empty sends none.")
    timeout: float = Field(120, gt=0, le=3600, description="Seconds for one reply.")
    retries: int = Field(5, ge=0, le=100, description="Further tries after 429, 5xx, time-outs and lost connections.")
    concurrency: int = Field(16, ge=1, le=1000, description="Requests at once, per worker.")

    @model_validator(mode="after")
    def _rubric_and_endpoint(self) -> JudgeConfig:
        _unique("judge: dimensions", [dimension.name for dimension in self.dimensions])
        if self.low >= self.high:
            raise ValueError(f"judge: low {self.low} must be below high {self.high}")
        if self.base_url and not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", self.base_url):
            raise ValueError(
                "judge: base_url is no http:// or https:// URL, or holds a password; name the key in api_key_env"
            )
        if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", self.api_key_env):  # the value may be a key: do not show it
            raise ValueError(
                "judge: api_key_env is the NAME of an environment variable, such as JUDGE_API_KEY, not a key"
            )
        return self


class ScorerConfig(ModelConfig):
    name: Name = Field(description="Your name for it, used by pairings and reports.")
    type: Literal["reward_model", "function", "judge"] = Field(
        "reward_model", description="A model's logit, your function, or a language model's ratings."
    )
    engine: Literal["transformers", "vllm", "openai", "fake"] = Field(
        "transformers", description="Runs the model. A judge's is openai where it has a base_url, else vllm."
    )
    function: str = Field("", description="package.module:name or path/to/file.py:name, called as f(prompt, text).")
    judge: JudgeConfig = Field(JudgeConfig(), description="What a judge is asked, type judge only.")

    @model_validator(mode="before")
    @classmethod
    def _engine_of_a_judge(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "judge" and "engine" not in values:
            judge = values.get("judge")
            url = judge.get("base_url") if isinstance(judge, dict) else getattr(judge, "base_url", "")
            return {**values, "engine": "openai" if url else "vllm"}
        return values

    @model_validator(mode="after")
    def _has_its_part(self) -> ScorerConfig:
        where = f"scorer {self.name!r}"
        if self.type == "function" and ":" not in self.function:
            raise ValueError(f"{where}: type function needs `function`, such as checks/answers.py:score")
        if self.type == "reward_model" and self.engine == "openai":
            raise ValueError(f"{where}: engine openai is for type judge; a reward_model runs on transformers or vllm")
        if self.type == "judge" and self.engine == "transformers":
            raise ValueError(f"{where}: engine transformers cannot hold a judge to its rubric; use openai or vllm")
        if self.type != "function" and self.engine != "fake" and not self.model:
            wanted = "the name the endpoint serves it by" if self.engine == "openai" else "a folder or a hub name"
            raise ValueError(f"{where}: type {self.type} needs `model`: {wanted}")
        if self.type == "judge" and self.engine == "openai" and not self.judge.base_url:
            raise ValueError(f"{where}: engine openai needs `judge.base_url`, such as http://127.0.0.1:8000/v1")
        if self.type == "judge" and self.engine != "openai" and self.judge.base_url:
            raise ValueError(f"{where}: judge.base_url is for engine openai, not {self.engine}; remove one of them")
        return self


class ScoreConfig(Section):
    scorers: list[ScorerConfig] = Field(min_length=1, description="One or more sources of rewards.")
    max_missing: float = Field(0.05, ge=0, le=1, description="Stop when a larger share of the rewards is not finite.")

    @model_validator(mode="after")
    def _unique_names(self) -> ScoreConfig:
        _unique("scorers", [scorer.name for scorer in self.scorers])
        return self


class PairingConfig(Section):
    name: Name = Field("pairs", description="Your name for this table of pairs, used by subsets.")
    rule: Literal["best_vs_worst", "generator_delta"] = Field(
        "best_vs_worst", description="By reward among all samples, or the stronger generator against the weaker."
    )
    generators: list[Name] = Field(
        [], description="Whose samples take part; empty takes all. generator_delta: the stronger, then the weaker."
    )
    scorer: Name | None = Field(None, description="Whose rewards decide; empty takes the first scorer.")
    reward_scale: float = Field(
        1.0, ge=0, description="T in PVar's sigmoid((r_i - r_j) / T). 0 takes the pooled deviation within prompts."
    )

    @model_validator(mode="after")
    def _two_generators(self) -> PairingConfig:
        if self.rule == "generator_delta" and len(self.generators) != 2:
            raise ValueError(f"pairing {self.name!r}: generator_delta needs `generators: [stronger, weaker]`")
        _unique(f"pairing {self.name!r}: generators", self.generators)
        return self


class SubsetConfig(Section):
    name: Name = Field(description="Published under this name.")
    pairs: Name | None = Field(None, description="Which pairing to take from; empty takes the first.")
    rank: Literal["pvar", "margin", "random"] = Field("pvar", description="What orders the pairs.")
    keep: Literal["top", "bottom"] = Field("top", description="Which end of the order to keep.")
    fraction: float | None = Field(None, gt=0, le=1, description="Share of the pairs to keep.")
    count: int | None = Field(None, ge=1, description="Or: how many pairs to keep.")
    seed: int = Field(0, ge=0, lt=2**31, description="Breaks ties, and orders rank: random.")

    @model_validator(mode="after")
    def _one_size(self) -> SubsetConfig:
        if (self.fraction is None) == (self.count is None):
            raise ValueError(f"subset {self.name!r}: give either `fraction` or `count`")
        return self


class PublishConfig(Section):
    rows_per_file: int = Field(50_000, ge=1, description="Rows per Parquet file.")
    license: str = Field("other", description="License named in the data set card.")


class RunConfig(Section):
    store: str = Field("", description="Folder or s3:// URL; empty takes PREFSIEVE_STORE, else .prefsieve/store.")
    ray_address: str = Field("local", description="local starts Ray here; auto joins the cluster this process is in.")

    @property
    def store_url(self) -> str:
        return self.store or os.environ.get("PREFSIEVE_STORE", DEFAULT_STORE)


class CurateConfig(RunConfig):
    """Prompts in, published subsets out."""

    ingest: IngestConfig
    generate: GenerateConfig
    score: ScoreConfig
    pair: list[PairingConfig] = Field([PairingConfig()], min_length=1)
    subset: list[SubsetConfig] = Field(min_length=1)
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _references(self) -> CurateConfig:
        generators = [generator.name for generator in self.generate.generators]
        scorers = [scorer.name for scorer in self.score.scorers]
        pairings = [pairing.name for pairing in self.pair]
        _unique("pair", pairings)
        _unique("subset", [subset.name for subset in self.subset])
        for pairing in self.pair:
            for name in pairing.generators:
                _known(f"pair {pairing.name!r}: generators", name, generators)
            if pairing.scorer:
                _known(f"pair {pairing.name!r}: scorer", pairing.scorer, scorers)
            taking_part = len(pairing.generators or generators)
            if pairing.rule == "best_vs_worst" and taking_part * self.generate.samples < 2:
                raise ValueError(f"pair {pairing.name!r}: best_vs_worst needs generate.samples >= 2")
        for subset in self.subset:
            if subset.pairs:
                _known(f"subset {subset.name!r}: pairs", subset.pairs, pairings)
        return self


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
