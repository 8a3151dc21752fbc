"""The data set card of a published subset: a README.md in the form that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

from tasks.config import PublishConfig

_TEMPLATE = """---
license: {license}
task_categories:
- text-generation
tags:
- preference
- dpo
- prefsieve
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
size_categories:
- {size}
---

# {name}

{rows:,} preference pairs: {selection}.

| | mean |
|---|---|
{means}

## How it was made

Pairs by `{rule}` from {samples} samples per prompt of {generators}, scored by `{scorer}`
(PVar at reward scale T = {scale:.4g}).

| stage | in | out | dropped |
|---|---|---|---|
{funnel}

## How to use it

```python
from datasets import load_dataset

pairs = load_dataset("parquet", data_files="data/*.parquet", split="train")
```

Columns: `prompt`, `chosen` and `rejected` are lists of chat messages, as TRL's DPOTrainer takes them. `score_chosen`,
`score_rejected` and their difference `margin` are rewards; `pvar` is the prompt's preference variance, in [0, 0.25];
`rank` is the place in the subset's ranking, 0 first; `prompt_id` is a digest of the prompt.
"""


def dataset_card(config: PublishConfig, content: dict[str, Any]) -> str:
    """The card's text, from the content of the version's manifest."""
    summary, pairing, subset = content["summary"], content["pairing"], content["subset"]
    return _TEMPLATE.format(
        license=config.license,
        size=_size(summary["rows"]),
        name=content["name"],
        rows=summary["rows"],
        selection=describe(subset),
        means="\n".join(_mean_row(key, value) for key, value in summary.items() if key.startswith("mean_")),
        rule=pairing["rule"],
        samples=content["parents"]["samples"],
        generators=", ".join(f"`{name}`" for name in pairing["generators"]),
        scorer=pairing["scorer"],
        scale=pairing["reward_scale"],
        funnel="\n".join(_funnel_row(step) for step in content["funnel"]),
    )


def describe(subset: dict[str, Any]) -> str:
    """What a subset takes, in words: the top 10 % by pvar."""
    amount = f"{100 * subset['fraction']:.4g} %" if subset["fraction"] is not None else f"{subset['count']:,}"
    if subset["rank"] == "random":
        return f"a random {amount} (seed {subset['seed']})"
    return f"the {subset['keep']} {amount} by {subset['rank']}"


def dropped_words(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "none"


def _mean_row(key: str, value: float | None) -> str:
    return f"| {key.removeprefix('mean_')} | {'none' if value is None else f'{value:.4f}'} |"


def _funnel_row(step: dict[str, Any]) -> str:
    return f"| {step['stage']} | {step['into']:,} | {step['out']:,} | {dropped_words(step['dropped'])} |"


def _size(rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < limit:
            return name
    return "1M<n<10M"
