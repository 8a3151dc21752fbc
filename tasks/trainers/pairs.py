"""TRL's DPO trainer for every objective on pairs: TRL's own loss where it has one, ours where it does not.

Ours need more than TRL's batches hold. What they need per pair comes from the objective's `columns`, once, when the
reference's log-probabilities are there; a collator takes it along, and `_compute_loss` gives it to the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOTrainer

from tasks.config import TrainConfig
from tasks.errors import RunError
from tasks.objectives import module
from tasks.objectives.batch import PairBatch, Side
from tasks.objectives.numbers import column as column_of
from tasks.trainers.data import numbers

SUMS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names
TOKENS = ("reference_tokens", "weights")  # by token, lists; each with a column per side, such as chosen_weights
_OURS = "pair."  # before the names of the objective's columns

Columns = dict[str, list[Any]]


class Kept:
    """What the store keeps of earlier trainings: log-probabilities by name."""

    def __init__(self, read: Callable[[str], Columns | None], write: Callable[[str, Columns], None]) -> None:
        self.read, self.write = read, write

    def columns(self, name: str, make: Callable[[], Columns], main: bool) -> Columns:
        """What is kept, or what `make` gives; all processes of a training go the same way."""
        found = [self.read(name) if main else None]
        broadcast_object_list(found)
        if found[0] is not None:
            return found[0]
        made = make()
        if main:
            self.write(name, made)
        return made


class PairTrainer(DPOTrainer):
    def __init__(self, config: TrainConfig, kept: Kept, helpers: Sequence[Callable[[], Any]], **arguments: Any) -> None:
        """helpers: load the models whose log-probabilities weigh the tokens."""
        self.config, self.kept, self.helpers = config, kept, helpers
        self.settings = config.train.settings
        self.objective: Any = module(config.train.objective)
        super().__init__(**arguments)

    # --- what the loss needs besides texts

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """With the columns that the loss needs, in the order of training. TRL calls it with tokenised pairs."""
        made = dict.fromkeys(SUMS, [0.0] * len(dataset))
        if self.settings.reference != "none":
            made = self.kept.columns("sums", lambda: self._sums(dataset, batch_size), self._main)
            self._agree(dataset.select(range(min(batch_size, len(dataset)))), made)
        if self.settings.reference == "tokens":
            made |= self.kept.columns("tokens", lambda: self._tokens(dataset, batch_size), self._main)
        if hasattr(self.objective, "columns"):
            made |= {_OURS + column: values for column, values in self._columns(dataset, made).items()}
        for column, values in made.items():
            dataset = dataset.add_column(column, values)
        if self.config.train.by_margin:
            margin = column_of(numbers(dataset, ["margin"]), "margin")
            dataset = dataset.select(np.argsort(-margin, kind="stable"))
        self.data_collator: Any = _Collator(self.data_collator, list(made))
        return dataset

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _sums(self, dataset: Dataset, batch_size: int) -> Columns:
        return scored(self, dataset, batch_size, SUMS)

    def _agree(self, first: Dataset, made: Columns) -> None:
        """Kept log-probabilities must be those of this model, or every objective would train on noise."""
        again = scored(self, first, len(first), SUMS)
        near = 0.05 if self.args.bf16 else 0.001
        for column in SUMS:
            for kept, found in zip(made[column], again[column], strict=False):
                if abs(kept - found) > near * max(1.0, abs(found)) + 0.01:
                    raise RunError(
                        f"train: the reference gives a response a log-probability of {found:.4f}, kept is {kept:.4f}: "
                        "policy and reference differ; remove what the store keeps under references/"
                    )

    def _tokens(self, dataset: Dataset, batch_size: int) -> Columns:
        """By token: the reference's log-probabilities, and weights by those of the helper models."""
        reference = self._by_token(self.model, dataset, batch_size)
        helpers = [
            self._by_token(load().eval().to(self.accelerator.device), dataset, batch_size) for load in self.helpers
        ]
        made: Columns = {}
        for side in ("chosen", "rejected"):
            made[f"{side}_reference_tokens"] = reference[side]
            made[f"{side}_weights"] = [
                self.objective.token_weights(np.array(plus), np.array(minus), side == "chosen", self.settings).tolist()
                for plus, minus in zip(helpers[0][side], helpers[1][side], strict=True)
            ]
        return made

    def _by_token(self, model: Any, dataset: Dataset, batch_size: int) -> Columns:
        """Log-probabilities of every response's tokens, by a model as it is now."""
        made: Columns = {"chosen": [], "rejected": []}
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            inputs = self.data_collator(rows)
            inputs = {key: value.to(self.accelerator.device) for key, value in inputs.items()}
            with torch.no_grad(), self.accelerator.autocast():
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            taken = logits[:, :-1].float().log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[:, :, 0]
            mask = inputs["completion_mask"][:, 1:].bool()
            found = [taken[i][mask[i]].tolist() for i in range(len(taken))]
            made["chosen"] += found[: len(rows)]
            made["rejected"] += found[len(rows) :]
        return made

    def _columns(self, dataset: Dataset, made: Columns) -> Columns:
        data = numbers(dataset, self.settings.needs)
        data |= {name.removesuffix("_logps"): np.array(made[name], dtype=np.float64) for name in SUMS}
        for side in ("chosen", "rejected"):
            data[f"{side}_length"] = np.array([len(ids) for ids in dataset[f"{side}_ids"]], dtype=np.float64)
        return {name: values.tolist() for name, values in self.objective.columns(data, self.settings).items()}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, _Collator):
            known: list[str] = self._signature_columns or []
            self._signature_columns: Any = list(dict.fromkeys([*known, *self.data_collator.extra]))

    # --- the loss

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if self.settings.trl or return_outputs:
            plain = {key: value for key, value in inputs.items() if not key.startswith(_OURS)}
            return super()._compute_loss(model, plain, return_outputs)
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        log_probs = model(**texts, use_cache=False, labels=labels, fused_lm_head=True).log_probs
        mask = mask[:, 1:]
        log_probs = log_probs[:, -mask.size(1) :]  # prompt-learning adapters prepend positions of their own
        by_token = {name: _spread(inputs[name], mask) for name in TOKENS if name in inputs}

        def side(i: int) -> Side:
            tokens = {name: values.chunk(2)[i] for name, values in by_token.items()}
            return Side(log_probs.chunk(2)[i], mask.chunk(2)[i], inputs[SUMS[i]], **tokens)

        columns = {key.removeprefix(_OURS): value for key, value in inputs.items() if key.startswith(_OURS)}
        batch = PairBatch(side(0), side(1), columns=columns, gather=self.accelerator.gather)
        loss = self.objective.loss(batch, self.settings).mean()
        self._log_batch(model, batch, inputs)
        return loss

    def _log_batch(self, model: Any, batch: PairBatch, inputs: dict[str, Tensor]) -> None:
        """TRL's metrics, those that go by the responses' log-probabilities; without a reference, rewards are means."""
        mode = "train" if model.training else "eval"
        alone = self.settings.reference == "none"
        rewards = (side.mean if alone else side.ratio for side in (batch.chosen, batch.rejected))
        chosen, rejected = (self.beta * reward.detach() for reward in rewards)
        found = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": batch.chosen.sum.detach(),
            "logps/rejected": batch.rejected.sum.detach(),
        }
        gathered = self.accelerator.gather(torch.stack(list(found.values()), dim=1)).mean(dim=0).tolist()
        for name, value in zip(found, gathered, strict=True):
            self._metrics[mode][name].append(value)
        tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens if mode == "train" else 0
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def scored(trainer: Any, dataset: Dataset, batch_size: int, names: Sequence[str]) -> Columns:
    """What the trainer's `compute_ref_log_probs` gives for every row; all processes share the work and get all of it.

    TRL's own loop hands results on through a file that all processes must reach.
    """
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=trainer.data_collator, shuffle=False)
    made: Columns = {name: [] for name in names}
    for batch in trainer.accelerator.prepare(loader):
        found = trainer.compute_ref_log_probs(trainer.model, batch)
        gathered = trainer.accelerator.gather_for_metrics(tuple(found))
        for name, values in zip(names, gathered, strict=True):
            made[name] += values.float().cpu().tolist()
    return made


class _Collator:
    """TRL's collator, and the columns that it does not know."""

    def __init__(self, inner: Any, extra: list[str]) -> None:
        self.inner, self.extra = inner, [name for name in extra if name not in SUMS]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.inner(examples)
        for name in self.extra:
            if name.startswith(_OURS):
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        for name in TOKENS:
            if f"chosen_{name}" in self.extra:
                sides = [example[f"{side}_{name}"] for side in ("chosen", "rejected") for example in examples]
                batch[name] = torch.tensor([value for values in sides for value in values], dtype=torch.float32)
        return batch


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """values of all tokens, one after the other, at the places of a mask [sequences, tokens]."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask.bool(), values)
