"""What each objective can be told, with its defaults; checked before anything starts, and without torch.

`beta` means something else for each: of summed log-ratios (DPO and its relatives: 0.01 to 0.5), of length-normalised
ones (dpo_norm: 5 to 10), of mean log-probabilities without a reference (SimPO, AMaPO, ConfPO: 2 to 10). Each has its
own default, and they cannot be compared.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tasks.sections import Section

Reference = Literal["none", "sums", "tokens"]


class Objective(Section):
    """reference: what the loss needs of the reference's log-probabilities; order: how the pairs are given."""

    reference: ClassVar[Reference] = "sums"
    order: ClassVar[Literal["shuffled", "margin"]] = "shuffled"

    beta: float = Field(0.1, gt=0, description="Strength of the preference term.")

    @property
    def needs(self) -> list[str]:
        """Columns of the published subset without which the objective has no meaning."""
        return []

    @property
    def trl(self) -> str:
        """TRL's own loss of this objective, by its name there; empty where it has none."""
        return ""


class Dpo(Objective):
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs whose label is taken to be wrong.")

    @property
    def trl(self) -> str:
        return "" if self.label_smoothing else "sigmoid"


class Mixdpo(Objective):
    order: ClassVar[Literal["shuffled", "margin"]] = "margin"

    beta: float = Field(0.01, gt=0, description="Of summed log-ratios.")
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="eps of the DPO branch; 0.1 in the paper's runs.")
    quantile: float = Field(0.12, ge=0, le=1, description="Share of pairs, of the smallest margins, trained by SFT.")
    threshold: float | None = Field(None, description="Instead: pairs with a margin below this are trained by SFT.")

    @property
    def needs(self) -> list[str]:
        return ["margin"]


SETTINGS: dict[str, type[Objective]] = {
    "dpo": Dpo,
    "mixdpo": Mixdpo,
}
