"""How a policy is trained: the sections `policy` and `train` of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from tasks.errors import ConfigError
from tasks.objectives.settings import SETTINGS, Objective
from tasks.sections import Section
from tasks.urls import Place

TEXTS = ("prompt", "chosen", "rejected")  # of a published subset


def _objective(name: str) -> str:
    if name not in SETTINGS:
        raise ValueError(f"{name!r} is not one of {', '.join(SETTINGS)}")
    return name


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights; they are merged into the policy that is published."""

    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="Their outputs are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' inputs.")
    target_modules: list[str] = Field([], description="Names of the layers; empty takes all linear ones but the head.")


class TrainingConfig(Section):
    """How to train; the defaults suit full fine-tuning of a small model by DPO."""

    objective: Annotated[str, AfterValidator(_objective)] = Field(
        "dpo", description="Training objective.", json_schema_extra={"enum": list(SETTINGS)}
    )
    beta: float | None = Field(
        None, gt=0, description="The objective's beta; its scale differs between objectives. Empty takes its default."
    )
    options: dict[str, Any] = Field({}, description="Further settings of the objective, such as label_smoothing.")
    order: Literal["auto", "shuffled", "margin"] = Field(
        "auto", description="Shuffled, or largest margin first; auto: as the objective wants it."
    )
    lora: LoraConfig | None = Field(None, description="Train adapters of low rank; empty trains all weights.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak; falls along a cosine.")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="Share of the steps in which it rises to the peak.")
    epochs: float = Field(1.0, gt=0, description="Passes over the subset, unless max_steps is set.")
    max_steps: int = Field(0, ge=0, description="Optimiser steps; 0 goes by epochs.")
    batch_size: int = Field(32, ge=1, description="Pairs per optimiser step, over all workers.")
    micro_batch_size: int = Field(8, ge=1, description="Pairs per forward pass of a worker; divides batch_size.")
    max_length: int = Field(1024, ge=2, description="Longest prompt + response in tokens; longer pairs are dropped.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    save_steps: int = Field(0, ge=0, description="Checkpoint interval in steps; 0 saves ten times in a run.")
    report_to: list[str] = Field(
        ["tensorboard"],
        description="Trackers that also get the metrics: tensorboard (kept in the store), wandb, mlflow, trackio ...",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Order of the pairs.")

    @cached_property
    def settings(self) -> Objective:
        """The objective's own settings, its defaults filled in."""
        return SETTINGS[self.objective].model_validate({**self.options, **({"beta": self.beta} if self.beta else {})})

    @model_validator(mode="after")
    def _objective_can_be_told_so(self) -> TrainingConfig:
        if "beta" in self.options:
            raise ValueError("options: beta has a place of its own, beside objective")
        try:
            _ = self.settings
        except ValidationError as error:
            wrong = error.errors()[0]
            known = ", ".join(name for name in SETTINGS[self.objective].model_fields if name != "beta") or "none"
            where = ".".join(map(str, wrong["loc"])) or "options"
            raise ValueError(
                f"options of objective {self.objective!r}: {where}: {wrong['msg']}; it has: {known}"
            ) from None
        return self

    @model_validator(mode="after")
    def _order_of_pairs(self) -> TrainingConfig:
        if self.order == "margin" and self.settings.unpaired:
            raise ValueError(f"order: margin is for pairs; {self.objective} takes single completions, shuffled")
        return self

    @model_validator(mode="after")
    def _micro_batches(self) -> TrainingConfig:
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        return self

    @property
    def by_margin(self) -> bool:
        """Whether the pairs come sorted, largest margin first."""
        return (self.settings.order if self.order == "auto" else self.order) == "margin"

    @property
    def seeded(self) -> bool:
        """Whether the seed decides anything: sorted pairs come in one order, only adapters begin at random."""
        return self.lora is not None or not self.by_margin

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the weights: not how often they are saved, nor what memory they are made in."""
        left_out = {"save_steps", "gradient_checkpointing", "report_to", "beta", "options", "order"}
        left_out.add("epochs" if self.max_steps else "max_steps")
        left_out |= set() if self.seeded else {"seed"}
        order = "margin" if self.by_margin else "shuffled"
        return {**self.model_dump(exclude=left_out), "order": order, "settings": self.settings.model_dump()}


class PolicyConfig(Section):
    model: Place = Field(description="Folder or hub name of the model to start from, or policy:NAME[@VERSION].")
    revision: str = Field("", description="Branch, tag or commit on the hub; empty for the default.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 computes and publishes in it; the weights that are trained stay float32."
    )
    trust_remote_code: bool = Field(False, description="Run code that ships with the model. Only if you trust it.")
    workers: int = Field(1, ge=1, description="Training processes that share each batch, on one or more nodes.")
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves for each of them.")
    gpus: float = Field(0, ge=0, le=1, description="GPUs that Ray reserves for each of them.")


def micro_batch(train: TrainingConfig, policy: PolicyConfig) -> int:
    """Pairs per forward pass of a worker: as configured, or what its share of a batch is, if that is less.

    Raises ValueError where the workers cannot share a batch evenly.
    """
    share, rest = divmod(train.batch_size, policy.workers)
    micro = min(train.micro_batch_size, share)
    if rest or share % max(1, micro):
        raise ValueError(
            f"policy.workers {policy.workers} and train.micro_batch_size {train.micro_batch_size} do not share a "
            f"batch_size of {train.batch_size} evenly; workers x micro_batch_size must divide it"
        )
    return micro


def check_columns(train: TrainingConfig, subset: str, columns: Sequence[str]) -> list[str]:
    """The columns that a training goes by; ConfigError where the subset has not all of them."""
    needs = list(dict.fromkeys([*train.settings.needs, *(["margin"] if train.by_margin else [])]))
    missing = [name for name in needs if name not in columns]
    if missing:
        raise ConfigError(
            f"objective {train.objective!r} needs the column {missing[0]!r}, and {subset} has none; it has: "
            f"{', '.join(name for name in columns if name not in TEXTS)}"
        )
    return needs
