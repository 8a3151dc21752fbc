"""What a subset takes, in words, from its configuration as plain data (so that a manifest can be described too)."""

from __future__ import annotations

from typing import Any


def describe(subset: dict[str, Any]) -> str:
    """The top 10 % by pvar, after margin at least 0; then length_difference at most 100 from 0."""
    words = ""
    filters: list[str] = []
    for step in subset["steps"]:
        if "filter" in step:
            filters.append(describe_step(step))
            continue
        words += f", then {describe_step(step)}" if words else describe_step(step)
        if filters:
            words += f", after {_listed(filters)}"
            filters = []
    if filters:
        words = f"{words}, then those with {_listed(filters)}" if words else f"all with {_listed(filters)}"
    if "seed" in subset and any(step.get("rank") == "random" for step in subset["steps"]):
        words += f" (seed {subset['seed']})"
    return words


def describe_step(step: dict[str, Any]) -> str:
    """One step: `margin at least 0`, or `the top 10 % by pvar`."""
    return f"{step['filter']} {bounds(step)}" if "filter" in step else _ranking(step)


def bounds(step: dict[str, Any]) -> str:
    """What a filter asks for, without the metric's name."""
    if step.get("values") is not None:
        return f"one of {', '.join(step['values'])}"
    words = []
    if step.get("min") is not None:
        words.append(f"at least {step['min']:g}")
    if step.get("max") is not None:
        words.append(f"at most {step['max']:g}")
    if step.get("within") is not None:
        words.append(f"at most {step['within']:g} from 0")
    if step.get("quantiles") is not None:
        low, high = step["quantiles"]
        words.append(f"between its {100 * low:g} % and {100 * high:g} % quantiles")
    return _listed(words)


def _ranking(step: dict[str, Any]) -> str:
    if step.get("fraction") is not None:
        amount = f"{100 * step['fraction']:.4g} %"
    elif step.get("count") is not None:
        amount = f"{step['count']:,}"
    else:
        amount = f"{step['tokens']:,} tokens"
    words = f"a random {amount}" if step["rank"] == "random" else f"the {step['keep']} {amount} by {step['rank']}"
    if step.get("by"):
        words += f" within each {step['by']}"
        if step.get("quotas"):
            words += f" ({', '.join(f'{100 * share:g} % {value}' for value, share in step['quotas'].items())})"
    return words


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
