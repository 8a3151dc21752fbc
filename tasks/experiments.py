"""The configuration of an experiment: subsets x objectives x seeds, trained alike and compared on held-out prompts.

A cell is one subset, one objective and one seed; an arm is all seeds of a subset and an objective. What would make the
comparison unfair (other steps, other batches for one arm) is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tasks.config import CurateConfig, PolicyConfig, RunConfig, TrainConfig, TrainingConfig
from tasks.sections import GenerateConfig, GeneratorConfig, IngestConfig, Name, ScoreConfig, Section, unique

_RANDOM = "-random"  # how the name of a size-matched random control ends
_ALIKE = ("max_steps", "epochs", "batch_size", "seed")  # of all arms, or they differ in more than their objective

# A list, so that a form has inputs for it; 5 is a word for 0, 1, 2, 3, 4.
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]],
    BeforeValidator(lambda value: list(range(value)) if type(value) is int else value),
]
Length = Literal["steps", "epochs"]
SubsetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@[0-9a-f]{8,64})?$")]


class ObjectiveConfig(Section):
    name: Name = Field("dpo", description="Your name for it, used by arms and in the report.")
    train: dict[str, Any] = Field(
        {},
        description="What is other than in `train`: another objective takes its own beta and options, not those there.",
    )


class ArmConfig(Section):
    subset: str = Field("", description="One of `subsets`; empty takes all.")
    objective: str = Field("", description="One of `objectives`; empty takes all.")


class HeldOutConfig(Section):
    """How all policies are judged: in the same way, against the model that they started from."""

    ingest: IngestConfig = Field(description="The held-out prompts. Nothing may be chosen by them.")
    generate: GenerateConfig = Field(
        description="One generator, the reference that policies are compared with; they are sampled as it is."
    )
    score: ScoreConfig = Field(description="What rates the answers.")
    scorer: str = Field("", description="Whose rewards decide; empty takes the first. Others are shown beside.")

    @model_validator(mode="after")
    def _one_reference(self) -> HeldOutConfig:
        if len(self.generate.generators) != 1:
            raise ValueError("evaluate.generate: give one generator, the reference; policies are sampled as it is")
        if self.generate.adaptive:
            raise ValueError("evaluate.generate.adaptive is for curate; here all prompts get the same samples")
        if self.score.comparing:
            raise ValueError(
                f"evaluate.score: {self.score.comparing[0].name!r} is a pairwise judge, which gives no rewards; use "
                "mode: pointwise here, and `prefsieve evaluate` for pairwise judges"
            )
        scorers = [scorer.name for scorer in self.score.scorers]
        if self.scorer and self.scorer not in scorers:
            raise ValueError(f"evaluate.scorer: {self.scorer!r} is not one of {', '.join(scorers)}")
        return self

    @property
    def reference(self) -> GeneratorConfig:
        return self.generate.generators[0]

    @property
    def decider(self) -> str:
        return self.scorer or self.score.scorers[0].name


@dataclass(frozen=True)
class Arm:
    subset: str
    objective: str

    def __str__(self) -> str:
        return f"{self.subset} x {self.objective}"


@dataclass(frozen=True)
class Cell:
    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} x seed {self.seed}"


class ExperimentConfig(RunConfig):
    """Subsets, objectives and seeds in; which of them won, and how surely, out."""

    name: Name = Field(description="The report is kept under this name.")
    subsets: list[SubsetName] = Field(min_length=1, description="Published subsets, NAME or NAME@VERSION.")
    objectives: list[ObjectiveConfig] = Field([ObjectiveConfig()], min_length=1, description="Ways to train on each.")
    seeds: Seeds = Field([0, 1, 2, 3, 4], min_length=1, description="Trainings per arm; 5 stands for 0 to 4.")
    length: Length = Field(
        "steps", description="What all cells have as many of: optimiser steps (train.max_steps), or epochs."
    )
    policy: PolicyConfig = Field(description="The model that every training starts from, and resources for one.")
    train: TrainingConfig = Field(TrainingConfig(), description="Settings of all trainings; seed is set by `seeds`.")
    evaluate: HeldOutConfig
    baseline: ArmConfig | None = Field(
        None, description="What arms are compared with; empty: the random control of each subset, else the first."
    )
    arms: list[ArmConfig] = Field([], description="Only these combinations; empty takes all.")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Share of errors allowed over all differences together.")
    at_once: int = Field(0, ge=0, le=1024, description="Trainings at once; 0: as many as there is room for.")
    curate: CurateConfig | None = Field(None, description="Publishes the subsets first, if they are not there.")

    @model_validator(mode="after")
    def _references(self) -> ExperimentConfig:
        names = [subset.partition("@")[0] for subset in self.subsets]
        unique("subsets", self.subsets)
        unique("objectives", self.objective_names)
        unique("seeds", [str(seed) for seed in self.seeds])
        for field, chosen in (("arms", self.arms), ("baseline", [self.baseline] if self.baseline else [])):
            for arm in chosen:
                _known(f"{field}: subset", arm.subset, self.subsets)
                _known(f"{field}: objective", arm.objective, self.objective_names)
        if self.baseline and len(self._matching([self.baseline])) != 1:
            raise ValueError("baseline: names no arm, or several; give subset and objective of one")
        if self.curate:
            if self.curate.store or self.curate.ray_address != "local":
                raise ValueError("curate: store and ray_address are those of the experiment; remove them there")
            published = [name for subset in self.curate.subset for name in subset.names()]
            if not set(published) & set(names):
                raise ValueError(f"curate publishes {', '.join(published)}: none of them is in `subsets`")
        return self

    @model_validator(mode="after")
    def _fair(self) -> ExperimentConfig:
        if self.length == "steps" and not self.train.max_steps:
            raise ValueError("length: steps needs train.max_steps, the same for all; or set length: epochs")
        if self.length == "epochs" and self.train.max_steps:
            raise ValueError("length: epochs goes by train.epochs; remove train.max_steps")
        if "seed" in self.train.model_fields_set:
            raise ValueError("train.seed is set by `seeds`; remove it")
        for objective in self.objectives:
            for field in _ALIKE:
                if field in objective.train:
                    raise ValueError(
                        f"objectives {objective.name!r}: {field} must be the same for all arms; set it in `train`"
                    )
            try:
                self._training(objective, 0)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, ("train", *first["loc"])))
                message = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"objectives {objective.name!r}: {field}: {message}") from error
        return self

    @property
    def objective_names(self) -> list[str]:
        return [objective.name for objective in self.objectives]

    def grid(self) -> list[Arm]:
        """The arms, subset by subset."""
        return self._matching(self.arms or [ArmConfig()])

    def cells(self) -> Iterator[Cell]:
        for arm in self.grid():
            for seed in self.seeds:
                yield Cell(arm, seed)

    def baseline_of(self, arm: Arm) -> Arm | None:
        """What an arm is compared with; None for one that is compared with nothing.

        By default the random control of its subset under the same objective; that control, under a further objective,
        is compared with itself under the first.
        """
        grid = self.grid()
        if self.baseline:
            (base,) = self._matching([self.baseline])
        else:
            control = control_of(arm.subset, self.subsets)
            on_control = [other for other in grid if other.subset == control]
            alike = [other for other in on_control if other.objective == arm.objective and arm.subset != control]
            base = [*alike, *on_control, *grid][0]
        return base if base != arm else None

    def curating(self) -> dict[str, Any]:
        """The parameters of the curate run, in this experiment's store and cluster, at its prices."""
        assert self.curate
        mine = {field: getattr(self, field) for field in RunConfig.model_fields}
        return {field: getattr(self.curate, field) for field in CurateConfig.model_fields} | mine

    def training(self, cell: Cell, name: str, subset: str) -> TrainConfig:
        """The cell as `train` takes it. subset: NAME@VERSION."""
        (objective,) = [one for one in self.objectives if one.name == cell.arm.objective]
        return TrainConfig(
            name=name,
            subset=subset,
            policy=self.policy,
            train=self._training(objective, cell.seed),
            store=self.store,
            ray_address=self.ray_address,
        )

    def generators(self, policies: dict[str, str]) -> GenerateConfig:
        """The reference and the policies, sampled alike. policies: generator name -> NAME@VERSION."""
        reference = self.evaluate.reference
        made = [
            reference.model_copy(update={"name": name, "model": f"policy:{version}", "revision": ""})
            for name, version in policies.items()
        ]
        return self.evaluate.generate.model_copy(update={"generators": [reference, *made]})

    def _training(self, objective: ObjectiveConfig, seed: int) -> TrainingConfig:
        # What was not said is left to the objective, whose defaults differ; another one's scale of beta means nothing.
        base = self.train.model_dump(exclude_unset=True)
        if objective.train.get("objective", self.train.objective) != self.train.objective:
            base = {key: value for key, value in base.items() if key not in ("beta", "options")}
        return TrainingConfig.model_validate({**base, **objective.train, "seed": seed})

    def _matching(self, chosen: list[ArmConfig]) -> list[Arm]:
        return [
            Arm(subset, objective)
            for subset in self.subsets
            for objective in self.objective_names
            if any(arm.subset in ("", subset) and arm.objective in ("", objective) for arm in chosen)
        ]


def control_of(subset: str, subsets: list[str]) -> str:
    """The random control among subsets that is nearest by name: NAME-random for NAME and NAME-..., else the first one;
    without any the first subset."""
    name = subset.partition("@")[0]
    controls = {other: other.partition("@")[0].removesuffix(_RANDOM) for other in subsets if _is_random(other)}
    if subset in controls:
        return subset
    own = [other for other, stem in controls.items() if name == stem or name.startswith(f"{stem}-")]
    return max(own, key=lambda other: len(controls[other]), default=next(iter([*controls, *subsets])))


def _is_random(subset: str) -> bool:
    return subset.partition("@")[0].endswith(_RANDOM)


def _known(where: str, name: str, known: list[str]) -> None:
    if name and name not in known:
        raise ValueError(f"{where}: {name!r} is not one of {', '.join(known)}")
