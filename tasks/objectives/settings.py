"""What each objective can be told, with its defaults; checked before anything starts, and without torch.

`beta` means something else for each: of summed log-ratios (DPO and its relatives: 0.01 to 0.5), of length-normalised
ones (dpo_norm: 5 to 10; ipo), of mean log-probabilities without a reference (SimPO, AMaPO, ConfPO: 2 to 10). Each has
its own default, and they cannot be compared.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tasks.sections import Section, unique

Reference = Literal["none", "sums", "tokens"]


def margin_column(name: str) -> str:
    """Column of a scorer's margins in a published subset; `margin` is that of the scorer that decided."""
    return name if name == "margin" or name.startswith("margin.") else f"margin.{name}"


MarginName = Annotated[str, Field(min_length=1), AfterValidator(margin_column)]
Weight = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=0.5)]


class Objective(Section):
    """reference: what the loss needs of the reference's log-probabilities; order: how the pairs are given; unpaired:
    trained on single completions, each labelled desirable or not."""

    reference: ClassVar[Reference] = "sums"
    order: ClassVar[Literal["shuffled", "margin"]] = "shuffled"
    unpaired: ClassVar[bool] = False

    beta: float = Field(0.1, gt=0, description="Strength of the preference term, of summed log-ratios.")

    @property
    def needs(self) -> list[str]:
        """Columns of the published subset without which the objective has no meaning."""
        return []

    @property
    def trl(self) -> str:
        """TRL's own loss of this objective, by its name there; empty where it has none."""
        return ""

    @property
    def by_batch(self) -> bool:
        """Whether a loss depends on what else stands in a forward pass, and so on how a batch is split."""
        return False


class WithMargin(Objective):
    margin: MarginName = Field("margin", description="Column to go by: margin, or the NAME of another scorer.")

    @property
    def needs(self) -> list[str]:
        return [self.margin]


class Dpo(Objective):
    label_smoothing: Share = Field(0.0, description="Share of pairs whose label is taken to be wrong.")
    swapped: bool = Field(False, description="Take rejected for chosen and chosen for rejected, as TIS-DPO's helper.")

    @property
    def trl(self) -> str:
        return "" if self.label_smoothing else "sigmoid"


class DpoNorm(Objective):
    beta: float = Field(5.0, gt=0, description="Of length-normalised log-ratios, 5 to 10.")

    @property
    def trl(self) -> str:
        return "sigmoid_norm"


class Ipo(Objective):
    beta: float = Field(0.1, gt=0, description="The gap of length-normalised log-ratios is drawn to 1 / (2 beta).")

    @property
    def trl(self) -> str:
        return "ipo"


class Simpo(Objective):
    reference: ClassVar[Reference] = "none"

    beta: float = Field(2.0, gt=0, description="Of mean log-probabilities, 2 to 10.")
    gamma: float = Field(1.0, ge=0, description="Reward margin that is asked for; beta times 0.25 to 0.5 in practice.")


class Kto(Objective):
    unpaired: ClassVar[bool] = True

    desirable_weight: float = Field(0.0, ge=0, description="Of desirable completions; 0 is from the label counts.")
    undesirable_weight: float = Field(0.0, ge=0, description="Of undesirable completions; 0 is from the label counts.")

    @property
    def trl(self) -> str:
        return "kto"

    @property
    def by_batch(self) -> bool:
        return True


class Sft(Objective):
    reference: ClassVar[Reference] = "none"

    beta: float = Field(0.1, gt=0, description="No part of the loss; only scales rewards that TRL logs.")
    average: Literal["pairs", "tokens"] = Field(
        "pairs", description="Each response counts alike, or each token of a batch does, as in TRL's sft loss."
    )

    @property
    def trl(self) -> str:
        return "sft" if self.average == "tokens" else ""

    @property
    def by_batch(self) -> bool:
        return self.average == "tokens"


class Mixdpo(Objective):
    order: ClassVar[Literal["shuffled", "margin"]] = "margin"

    beta: float = Field(0.01, gt=0, description="Of summed log-ratios.")
    label_smoothing: Share = Field(0.1, description="eps of the DPO branch; 0.1 in the paper's runs.")
    quantile: float = Field(0.12, ge=0, le=1, description="Share of pairs, of the smallest margins, trained by SFT.")
    threshold: float | None = Field(None, description="Instead: pairs with a margin below this are trained by SFT.")

    @property
    def needs(self) -> list[str]:
        return ["margin"]


class Amapo(Objective):
    reference: ClassVar[Reference] = "none"

    beta: float = Field(2.0, gt=0, description="Of mean log-probabilities, 2 to 3.")

    @property
    def by_batch(self) -> bool:
        return True


class Madpo(WithMargin):
    c_max: float = Field(4.0, gt=1, description="How far the margin of a hard pair is raised, at most.")
    c_min: float = Field(0.0, ge=0, lt=1, description="How far that of an easy pair is lowered; 0 is 1 / c_max.")
    slope: float = Field(1.0, gt=0, description="lambda of the paper: how fast it goes from c_max to c_min.")
    tau: float = Field(6.907, gt=0, description="Reward margin that is left as it is: smaller ones are hard pairs.")


class Gdpo(WithMargin):
    temperature: float = Field(
        1.0, gt=0, description="Reward scale T in p = s(margin / T); far above the margins, hardly anything is learned."
    )
    shares: str = Field("", description="Column with p itself, such as a share of votes for chosen; no margin then.")

    @property
    def needs(self) -> list[str]:
        return [self.shares or self.margin]


class Dadpo(WithMargin):
    pass


class Crpo(Objective):
    weights: dict[MarginName, Weight] = Field(
        {"margin": 1.0},
        min_length=1,
        description="lambda of each: of margin, or of another scorer by its NAME.",
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _each_once(cls, weights: Any) -> Any:
        if isinstance(weights, dict):
            unique("weights", [margin_column(str(name)) for name in weights])
        return weights

    @property
    def needs(self) -> list[str]:
        return list(self.weights)


class Confpo(Objective):
    reference: ClassVar[Reference] = "none"

    beta: float = Field(1.5, gt=0, description="Of mean log-probabilities of the tokens that are kept, 1.5 to 10.")
    gamma: float = Field(1.6, ge=0, description="Reward margin that is asked for.")


class Tisdpo(Objective):
    reference: ClassVar[Reference] = "tokens"

    low: float = Field(0.7, ge=0, description="Weight of a response's least important token.")
    high: float = Field(1.3, gt=0, description="Weight of its most important one.")

    @model_validator(mode="after")
    def _in_order(self) -> Tisdpo:
        if self.low > self.high:
            raise ValueError(f"tisdpo: low {self.low} is above high {self.high}")
        return self


SETTINGS: dict[str, type[Objective]] = {
    "dpo": Dpo,
    "dpo_norm": DpoNorm,
    "ipo": Ipo,
    "simpo": Simpo,
    "kto": Kto,
    "sft": Sft,
    "mixdpo": Mixdpo,
    "amapo": Amapo,
    "madpo": Madpo,
    "gdpo": Gdpo,
    "dadpo": Dadpo,
    "crpo": Crpo,
    "confpo": Confpo,
    "tisdpo": Tisdpo,
}
