"""What an experiment found, in words and as markdown; the words are also those of its page."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tasks.describe import number
from tasks.progress import duration

_VERDICTS = ("better", "worse", "not distinguishable")


def arm_name(arm: dict[str, Any]) -> str:
    return f"{arm['subset']} x {arm['objective']}"


def lead(result: dict[str, Any]) -> str:
    """The finding in a sentence."""
    found = Counter(arm["verdict"] for arm in result["arms"])
    if not result["comparisons"]:
        return "There is one arm, and nothing to compare it with."
    parts = [f"{found[verdict]} {verdict}" for verdict in _VERDICTS if found[verdict]]
    of = result["comparisons"]
    return f"Of {of} {'arm' if of == 1 else 'arms'} compared with a baseline: {', '.join(parts)}."


def sentence(arm: dict[str, Any], alpha: float) -> str:
    """One arm against its baseline."""
    found = arm["difference"]
    if not found:
        return "what others are compared with"
    bounds = f"{_signed(found['low'])} to {_signed(found['high'])}"
    words = f"{arm['verdict']}, {_signed(found['mean'])} against {arm['against']}"
    return f"{words}, interval {bounds} at {_percent(1 - found['level'])}"


def method(result: dict[str, Any]) -> str:
    """How the numbers were made."""
    return (
        f"Mean of scorer {result['scorer']} over {result['prompts']:,} held-out prompts, {result['samples']} samples "
        f"each, and {len(result['seeds'])} seeds. Intervals are by bootstrap over seeds and prompts; differences are "
        f"taken seed by seed and prompt by prompt, and corrected for {result['comparisons']} comparisons by Holm's "
        "method. Not distinguishable: the corrected interval holds 0. That is no proof that two arms are equal."
    )


def arm_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm, the reference last."""
    rows = []
    for arm in result["arms"]:
        reward = arm["reward"]
        wins = arm["win_rate"]["mean"]
        rows.append(
            {
                "arm": arm_name(arm),
                "pairs": arm["pairs"],
                result["scorer"]: reward["mean"],
                "sd of seeds": reward["deviation"],
                _percent(1 - result["alpha"]): span(reward),
                "wins": "none" if wins is None else f"{100 * wins:.1f} %",
                **arm["others"],
                "tokens": arm["tokens"],
                "verdict": arm["verdict"],
            }
        )
    reference = result["reference"]
    blank = {"pairs": "", "sd of seeds": "", _percent(1 - result["alpha"]): "", "wins": "", "verdict": ""}
    last = {"arm": f"{reference['name']} (untrained)", result["scorer"]: reference["reward"], **reference["others"]}
    rows.append({key: {**blank, **last, "tokens": reference["tokens"]}.get(key) for key in rows[0]})
    return rows


def cost_rows(costs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm: sums over its cells."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for cell in costs["cells"]:
        arms.setdefault(arm_name(cell), []).append(cell)
    return [
        {
            "arm": arm,
            "cells": len(cells),
            "steps": _sum(cells, "steps"),
            "training tokens": _sum(cells, "training_tokens"),
            "generated tokens": _sum(cells, "generated_tokens"),
            "training": seconds(_sum(cells, "train_seconds")),
            "evaluation": seconds(_sum(cells, "evaluate_seconds")),
        }
        for arm, cells in arms.items()
    ]


def experiment_lines(result: dict[str, Any], costs: dict[str, Any], table: Any) -> list[str]:
    """The report as markdown lines. table: rows -> lines."""
    warnings = [f"- **Warning.** {warning}" for warning in result["warnings"]]
    return [
        f"# Experiment {result['name']}",
        "",
        lead(result),
        "",
        *([*warnings, ""] if warnings else []),
        *table(arm_rows(result)),
        "",
        *(f"- **{arm_name(arm)}**: {sentence(arm, result['alpha'])}" for arm in result["arms"]),
        "",
        method(result),
        "",
        "## Costs",
        "",
        *table(cost_rows(costs)),
        "",
    ]


def span(found: dict[str, Any]) -> str:
    return "none" if found["low"] is None else f"{number(found['low'])} to {number(found['high'])}"


def seconds(value: float | None) -> str:
    return "not known" if value is None else duration(value)


def _sum(cells: list[dict[str, Any]], what: str) -> Any:
    values = [cell[what] for cell in cells]
    return None if None in values else sum(values)


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
