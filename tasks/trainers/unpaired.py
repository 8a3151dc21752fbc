"""TRL's KTO trainer, whose processes need not share a disk."""

from __future__ import annotations

from datasets import Dataset
from trl import KTOTrainer

from tasks.trainers.pairs import scored

_NAMES = ("ref_logps", "ref_KL_logps")  # TRL's


class UnpairedTrainer(KTOTrainer):
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """With the reference's log-probabilities of every completion, and of its neighbour's for the divergence."""
        for column, values in scored(self, dataset, batch_size, _NAMES).items():
            dataset = dataset.add_column(column, values)
        return dataset
