"""The configuration's sections about data and engines: what is read, which models answer, what rates the answers.

tasks/config.py has the others and puts them together.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from tasks.errors import ConfigError
from tasks.urls import Place, secret_setting

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
# A number, so that a form has an input for it; `auto` is a word for 0.
RewardScale = Annotated[float, BeforeValidator(lambda value: 0.0 if value == "auto" else value)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def unique(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} is used twice; names must differ")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class PricesConfig(Section):
    """What the work is paid by. Decides nothing but what reports say of costs."""

    gpu_hour: float = Field(0.0, ge=0, description="Of one GPU for an hour, whether it is busy or not.")
    million_tokens: float = Field(
        0.0, ge=0, description="Of a million tokens of judges behind endpoints, prompts and replies alike."
    )
    currency: str = Field("USD", pattern=r"^[A-Za-z]{1,8}$", description="Of both prices.")


class ColumnsConfig(Section):
    prompt: str = Field("prompt", description="Column with the prompt: a text, or a list of chat messages.")
    source: str = Field("source", description="Column that says where a row comes from. May be absent.")
    keep: list[str] = Field([], description="Further columns, for function scorers and strata, such as the answer.")


class SourceConfig(Section):
    stage: ClassVar[str]

    source: Place = Field(description="File, folder, glob, s3:// URL, or data set name on the Hugging Face hub.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "disk", "hub"] = Field(
        "auto", description="auto goes by the ending; disk is a save_to_disk folder; hub a data set name."
    )
    split: str = Field("train", description="Split to take, for disk and hub.")
    limit: int = Field(0, ge=0, description="Take only the first rows; 0 takes all.")
    max_chars: int = Field(
        100_000,
        ge=1,
        description="A longer prompt, or imported completion, is quarantined; kept columns from ten times this on.",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _no_bare_name(cls, values: Any) -> Any:
        if isinstance(values, str):
            raise ValueError(f"a rating has fields; write {{name: {values}}}, and its column where that is another")
        return values


def check_pair_ratings(ratings: list[RatingConfig]) -> None:
    """Of pairs, which have a score for each side; ConfigError when something else is asked for."""
    if len(ratings) > 1 or any(rating.column for rating in ratings):
        raise ConfigError(
            "import.ratings: pairs have one rating, of two columns: name these in columns.chosen_score and "
            "columns.rejected_score; their rating has a name and a transform, no column. Set `form` for other rows"
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
    ratings: list[RatingConfig] = Field(
        [], description="Columns with ratings. Pairs have one, of columns.chosen_score and rejected_score."
    )
    repeats: Literal["samples", "ratings"] = Field(
        "samples",
        description="A text that a generator has twice for a prompt: another sample that came out alike, or the same "
        "completion rated again, whose ratings are averaged. Of pairs, equal ones count once.",
    )
    tokenizer: Place = Field("", description="Folder or hub name that counts tokens; empty counts words and marks.")

    @model_validator(mode="after")
    def _ratings(self) -> ImportConfig:
        unique("import.ratings", [rating.name for rating in self.ratings])
        if self.form == "pairs":
            check_pair_ratings(self.ratings)
        return self


class ModelConfig(Section):
    """A model, and the workers that hold it. Workers and their resources do not change what is computed."""

    model: Place = Field("", description="Folder, hub name, or policy:NAME[@VERSION] from the store.")
    revision: str = Field("", description="Branch, tag or commit on the hub; empty for the default.")
    dtype: Dtype = Field("auto", description="Numeric type of the weights.")
    max_model_len: int = Field(0, ge=0, description="Longest sequence in tokens; 0 for the model's own.")
    trust_remote_code: bool = Field(False, description="Run code that ships with the model. Only if you trust it.")
    workers: int = Field(1, ge=1, le=1024, description="Engines at once.")
    max_workers: int = Field(
        0, ge=0, le=1024, description="More of them while there is work and room in the cluster; 0 stays at workers."
    )
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves per engine.")
    gpus: float = Field(
        0,
        ge=0,
        description="GPUs that Ray reserves per engine: a part of one, or several of a node, over which vLLM splits "
        "the model.",
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Custom resources of Ray per engine, such as a kind of node."
    )
    deadline: float = Field(
        1800, gt=0, description="Seconds for one step of the engine; after that it counts as hung and is started again."
    )
    start_deadline: float = Field(
        7200, gt=0, description="Seconds for the start of an engine, which may have to download its model."
    )
    batch_size: int = Field(64, ge=1, description="Sequences at once, transformers engine only.")
    engine_args: dict[str, Any] = Field({}, description="Further arguments of the engine, for example vLLM's.")

    @field_validator("engine_args")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        if name := secret_setting(value):
            raise ValueError(
                f"{name} looks like a secret, which would be shown and kept; remove it: a judge's key comes from the "
                "variable that judge.api_key_env names, the hub's from HF_TOKEN"
            )
        return value

    @model_validator(mode="after")
    def _parts_of_one_gpu_only(self) -> ModelConfig:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus: {self.gpus:g} is neither a part of one GPU nor a number of whole ones")
        return self

    @property
    def parallel(self) -> tuple[int, int]:
        """Of an engine that splits its model: over how many GPUs each layer (tensor), and all layers (pipeline).

        ValueError unless there is a GPU for each part, or none at all, as on vLLM's CPU build.
        """
        pipeline = self.engine_args.get("pipeline_parallel_size", 1)
        tensor = self.engine_args.get("tensor_parallel_size")
        if not all(isinstance(size, int) and size > 0 for size in (pipeline, 1 if tensor is None else tensor)):
            raise ValueError("engine_args: tensor_parallel_size and pipeline_parallel_size are whole numbers above 0")
        if tensor is None:
            tensor = max(1, int(self.gpus) // pipeline)
        if self.gpus and tensor * pipeline != max(1, self.gpus):
            raise ValueError(
                f"gpus: {self.gpus:g}, but tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} takes "
                f"{tensor * pipeline}; set gpus: {tensor * pipeline}"
            )
        return tensor, pipeline


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
        if self.engine == "vllm":
            _ = self.parallel
        return self


class AdaptiveConfig(Section):
    """Samples in rounds: more for prompts near the cut of a subset, no more for those surely in or out."""

    fraction: float = Field(0.1, gt=0, lt=1, description="Share of the prompts that the subset will take, by PVar.")
    quality: float = Field(
        1.0, gt=0, le=1, description="Share to keep of the mean PVar of the subset that `samples` for all would give."
    )
    scorer: str = Field("", description="Whose rewards decide; empty takes the first scorer.")
    reward_scale: RewardScale = Field(1.0, ge=0, description="T of PVar, as in `pair`.")
    ladder: list[Annotated[int, Field(ge=2, le=1024)]] = Field(
        [3, 5, 10, 20],
        min_length=2,
        description="Numbers of samples at which prompts may stop; more steps save more and take more rounds.",
    )

    @model_validator(mode="after")
    def _rises(self) -> AdaptiveConfig:
        if sorted(set(self.ladder)) != self.ladder:
            raise ValueError(f"generate.adaptive.ladder {self.ladder} must rise from step to step")
        return self


class GenerateConfig(Section):
    samples: int = Field(8, ge=1, le=1024, description="Completions per prompt and generator.")
    generators: list[GeneratorConfig] = Field(min_length=1, description="One or more models that answer the prompts.")
    adaptive: AdaptiveConfig | None = Field(None, description="Fewer samples for the same top subset by PVar.")
    max_refused: float = Field(0.1, ge=0, le=1, description="Stop when engines refuse a larger share of the prompts.")

    @model_validator(mode="after")
    def _unique_names(self) -> GenerateConfig:
        unique("generators", [generator.name for generator in self.generators])
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
    verdicts: Literal[3, 5] = Field(
        3, description="Pairwise: better, worse or a tie; 5 also tells much better and much worse, for arena scores."
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
        unique("judge: dimensions", [dimension.name for dimension in self.dimensions])
        if self.low >= self.high:
            raise ValueError(f"judge: low {self.low} must be below high {self.high}")
        if self.base_url and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", self.base_url):
            raise ValueError(
                "judge: base_url is no http:// or https:// URL, or holds a password or a query; name the variable with "
                "the key in api_key_env"
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
        "transformers",
        description="Runs the model. Left out, it is transformers; a judge's is openai with a base_url, else vllm.",
    )
    function: str = Field("", description="package.module:name or path/to/file.py:name, called as f(prompt, text).")
    judge: JudgeConfig = Field(JudgeConfig(), description="What a judge is asked, type judge only.")

    @property
    def compares(self) -> bool:
        """A pairwise judge: in an evaluation it compares the two sides, and gives no rewards."""
        return self.type == "judge" and self.judge.mode == "pairwise"

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
        if self.engine == "vllm":
            _ = self.parallel
        return self


class EnsembleConfig(Section):
    """Mean of its members' rewards, each z-scored over all completions of a pairing."""

    name: Name = Field(description="Your name for it, used by pairings and reports.")
    members: list[str] = Field(min_length=2, description="Scorers: NAME, or NAME:DIMENSION of a judge.")


class ScoreConfig(Section):
    scorers: list[ScorerConfig] = Field(min_length=1, description="One or more sources of rewards.")
    max_missing: float = Field(0.05, ge=0, le=1, description="Stop when a larger share of the rewards is not finite.")

    @property
    def comparing(self) -> list[ScorerConfig]:
        """The pairwise judges."""
        return [scorer for scorer in self.scorers if scorer.compares]

    @property
    def rating(self) -> ScoreConfig:
        """Without the pairwise judges; it may be empty."""
        return self.model_copy(update={"scorers": [scorer for scorer in self.scorers if not scorer.compares]})

    @model_validator(mode="after")
    def _unique_names(self) -> ScoreConfig:
        unique("scorers", [scorer.name for scorer in self.scorers])
        return self
