"""What the built models do on held-out prompts: accuracy by length and source, rewards, the reward model's agreement.

Agreement is the share of (right, wrong) pairs of samples of one prompt, over all generators, in which the reward
model's logit puts the right one above the wrong one. Most wrong samples are slips; counted over distinct texts, so that
a rare fault weighs as much as a common one, agreement is lower. A gap is that difference of logits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from examples.tinyworld import generators, reward, task

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    from examples.tinyworld.build import Recipe


def measure(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    models: Mapping[str, LlamaForCausalLM],
    scorer: LlamaForSequenceClassification,
    items: Sequence[task.Item],
) -> dict[str, Any]:
    """The table that world.json holds and the README shows."""
    prompts = [item.prompt for item in items]
    table: dict[str, Any] = {"generators": {}}
    texts: list[list[str]] = [[] for _ in items]
    values: list[list[float]] = [[] for _ in items]
    for name, model in models.items():
        completions = generators.sample(model, tokenizer, prompts, recipe.calibration_samples, recipe.seed + 9)
        logits = reward.rewards(scorer, tokenizer, prompts, completions)
        for place, (row, rewards) in enumerate(zip(completions, logits, strict=True)):
            texts[place] += row
            values[place] += rewards
        table["generators"][name] = _describe(items, completions, logits)
    table["reward_model"] = agreement(items, texts, values)
    return table


def _describe(
    items: Sequence[task.Item], completions: Sequence[Sequence[str]], logits: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """One generator's accuracy, slips and mean reward, and how many prompts it gets right always, never or at times."""
    rates = [share(text == item.answer for text in texts) for item, texts in zip(items, completions, strict=True)]
    slips = [share(t == task.slip(i.string) for t in texts) for i, texts in zip(items, completions, strict=True)]
    by_length, by_source = defaultdict(list), defaultdict(list)
    for item, rate in zip(items, rates, strict=True):
        by_length[item.difficulty].append(rate)
        by_source[item.source].append(rate)
    return {
        "accuracy": round(fmean(rates), 4),
        "slips": round(fmean(slips), 4),
        "accuracy_by_length": {length: round(fmean(by_length[length]), 3) for length in sorted(by_length)},
        "accuracy_by_source": {source: round(fmean(by_source[source]), 3) for source in sorted(by_source)},
        "always_right": round(share(rate == 1 for rate in rates), 3),
        "mixed": round(share(0 < rate < 1 for rate in rates), 3),
        "never_right": round(share(rate == 0 for rate in rates), 3),
        "mean_reward": round(fmean(value for row in logits for value in row), 3),
    }


def agreement(
    items: Sequence[task.Item], completions: Sequence[Sequence[str]], logits: Sequence[Sequence[float]]
) -> dict[str, float]:
    """How often, and by how much, the reward model puts a right completion above a wrong one of the same prompt."""
    gaps: list[float] = []
    distinct: list[float] = []
    for item, texts, values in zip(items, completions, logits, strict=True):
        rewards = dict(zip(texts, values, strict=True))
        if item.answer in rewards:
            best = rewards.pop(item.answer)
            distinct += [best - reward for reward in rewards.values()]
            gaps += [best - rewards[text] for text in texts if text != item.answer] * texts.count(item.answer)
    gaps.sort()
    if not gaps:  # a world too small to have a right completion beside a wrong one
        return {"pairs": 0}
    return {
        "pairs": len(gaps),
        "agreement": round(share(gap > 0 for gap in gaps), 4),
        "agreement_distinct_texts": round(share(gap > 0 for gap in distinct), 4),
        "median_gap": round(gaps[len(gaps) // 2], 2),
        "gap_5th_percentile": round(gaps[len(gaps) // 20], 2),
        "gap_95th_percentile": round(gaps[len(gaps) * 19 // 20], 2),
    }


def share(flags: Iterable[bool]) -> float:
    """The share of true flags."""
    return fmean(float(flag) for flag in flags)
