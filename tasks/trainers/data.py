"""A published subset as training data: pairs that fit, with what their objective needs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from numpy.typing import NDArray

from tasks.config import TrainConfig
from tasks.engines.chat import writes_marks
from tasks.errors import RunError
from tasks.records import Counts
from tasks.training import TEXTS, check_columns


def load_pairs(config: TrainConfig, data: Path, tokenizer: Any, cache: Path) -> tuple[Dataset, Counts]:
    """The pairs that fit into max_length, and how many there were. TRL would cut the longer ones, and drop the longest,
    without a word. It would also take a special token that a text writes for the template's own, and teach the policy
    to begin turns: those pairs are left out too.

    data: folder with the version's Parquet files; cache: folder for what `datasets` keeps.
    """
    files = sorted(str(file) for file in data.glob("*.parquet"))
    pairs = load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    settings = config.train.settings
    needs = check_columns(config.train, config.subset, pairs.column_names)
    pairs = pairs.select_columns([*TEXTS, *needs])
    if getattr(settings, "swapped", False):
        pairs = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    max_length = config.train.max_length
    plain = pairs.filter(lambda row: not writes_marks(tokenizer, _texts(row)))
    fitting = plain.filter(lambda row: _tokens(tokenizer, row) <= max_length)
    dropped = {"longer than max_length": len(plain) - len(fitting), "writes a special token": len(pairs) - len(plain)}
    if not len(fitting):
        why = f"are longer than max_length {max_length}; raise it"
        if not len(plain):
            why = "write a special token of the model's tokenizer, such as the one that ends a turn"
        raise RunError(f"train: all {len(pairs)} pairs {why}")
    return fitting, Counts(len(pairs), len(fitting), {reason: number for reason, number in dropped.items() if number})


def numbers(pairs: Dataset, names: list[str]) -> dict[str, NDArray[np.float64]]:
    """Columns of numbers, NaN where there is none; [pairs] each."""
    return {name: np.array(pairs.with_format("numpy")[name][:], dtype=np.float64) for name in names}


def unpaired(pairs: Dataset, seed: int) -> Dataset:
    """Prompt, completion and label of both sides of every pair, shuffled: a chosen and a rejected one in turn.

    KTO takes rows as they come, and meets each prompt with its neighbour's completion: the two sides of one pair stand
    half the data set apart.
    """
    order = np.random.default_rng(seed).permutation(len(pairs))
    turned = np.roll(order, len(pairs) // 2)
    chosen, rejected = pairs.select(order), pairs.select(turned)
    sides = [(chosen["prompt"][:], chosen["chosen"][:], True), (rejected["prompt"][:], rejected["rejected"][:], False)]
    rows = [
        {"prompt": prompt, "completion": completion, "label": label}
        for both in zip(*(zip(p, c, [label] * len(p), strict=True) for p, c, label in sides), strict=True)
        for prompt, completion, label in both
    ]
    return Dataset.from_list(rows)


def _texts(row: dict[str, Any]) -> list[str]:
    return [message["content"] for column in TEXTS for message in row[column]]


def _tokens(tokenizer: Any, row: dict[str, Any]) -> int:
    """Tokens of the prompt with the longer response."""
    sides = [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    return max(len(tokenizer.apply_chat_template(side, tokenize=True, return_dict=False)) for side in sides)
