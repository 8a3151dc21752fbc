"""What a subset takes, in words, from its configuration as plain data (so that a manifest can be described too)."""

from __future__ import annotations

import math
from typing import Any


def describe(subset: dict[str, Any]) -> str:
    """What a subset takes, in words: the top 10 % by pvar, after margin at least 0."""
    steps = subset.get("steps") or []
    words = [describe_step(step, subset.get("seed") or 0) for step in steps]
    ranks = [place for place, step in enumerate(steps) if step.get("rank")]
    if not ranks:
        return f"all pairs with {_listed(words)}" if words else "all pairs"
    last = ranks[-1]
    before = f", after {_listed(words[:last])}" if last else ""
    then = f", then {_listed(words[last + 1 :])}" if words[last + 1 :] else ""
    return words[last] + before + then


def describe_step(step: dict[str, Any], seed: int = 0) -> str:
    """One step: `margin at least 0`, or `the top 10 % by pvar`."""
    return _rank_words(step, seed) if step.get("rank") else _filter_words(step)


def _filter_words(step: dict[str, Any]) -> str:
    metric, low, high = step.get("filter") or "?", step.get("min"), step.get("max")
    words = []
    if low is not None and high is not None:
        words.append(f"{metric} from {number(low)} to {number(high)}")
    elif low is not None:
        words.append(f"{metric} at least {number(low)}")
    elif high is not None:
        words.append(f"{metric} at most {number(high)}")
    if step.get("within") is not None:
        words.append(f"|{metric}| at most {number(step['within'])}")
    if step.get("quantiles"):
        words.append(f"{metric} between its quantiles {' and '.join(number(q) for q in step['quantiles'])}")
    if step.get("values"):
        words.append(f"{metric} {' or '.join(str(value) for value in step['values'])}")
    return " and ".join(words) or f"any {metric}"


def _rank_words(step: dict[str, Any], seed: int) -> str:
    random = step["rank"] == "random"
    if step.get("fraction") is not None:
        amount = f"{100 * step['fraction']:.4g} %"
    else:
        amount = number(step.get("count")) if step.get("count") is not None else "pairs"
    words = f"a random {amount}" if random else f"the {step.get('keep') or 'top'} {amount} by {step['rank']}"
    if random and amount == "pairs":
        words = "random pairs"
    if step.get("tokens") is not None:
        words += f" within {step['tokens']:,} tokens"
    if step.get("quotas"):
        shares = ", ".join(f"{value} {100 * share:.4g} %" for value, share in step["quotas"].items())
        words += f" ({step.get('by') or 'quotas'}: {shares})"
    elif step.get("by"):
        words += f" within each {step['by']}"
    return words + (f" (seed {seed})" if random else "")


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def number(value: Any) -> str:
    """A number for people: four digits, thousands apart, `none` where there is none."""
    if value is None:
        return "none"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
