"""What a selection is, as markdown: its steps with examples, what sets it apart, its length, its control, its overlap.

The words are those of the data set card (tasks/card.py). Texts and names that people wrote are escaped, so that they
are shown and not read as markdown.
"""

from __future__ import annotations

import re
from typing import Any

from tasks.card import control_words, delta_words, length_verdict, scale_words, share
from tasks.describe import number

_EXAMPLES = 2  # per drop reason
_OVERLAPS = 20  # pairs of subsets
_TONES = {"warning": "**Warning.** ", "notice": "**Note.** "}


def explained(content: dict[str, Any], controls: dict[str, dict[str, Any]] | None = None) -> list[str]:
    """Steps, metrics, length and control of one subset.

    content: of its manifest, `explanation` and `length_unit` will do; controls: the explanations of its own, by name,
    whose means then stand beside.
    """
    explanation = content.get("explanation")
    if not explanation:
        summary = content.get("summary") or {}
        return [*table([{key.removeprefix("mean_"): value for key, value in summary.items()}]), ""]
    tone, words = length_verdict(content)
    control = control_words(explanation["control"])
    return [
        *([plain(control), ""] if control else []),
        *funnel(explanation["steps"]),
        *(f"- **{name}**: {plain(control_words(told['control']))}" for name, told in (controls or {}).items()),
        "",
        *table(_compared(explanation, controls) if controls else _metrics(explanation)),
        "",
        _TONES.get(tone, "") + plain(words),
        "",
    ]


def _metrics(explanation: dict[str, Any]) -> list[dict[str, Any]]:
    """Means inside and outside, that of the ranking's metric first."""
    rows = []
    for name in _order(explanation):
        inside, outside = (explanation["metrics"][name][side] for side in ("inside", "outside"))
        apart = None if inside is None or outside is None else inside - outside
        rows.append({"mean of": name, "inside": inside, "outside": outside, "difference": apart})
    return rows


def _compared(explanation: dict[str, Any], controls: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with the means of the controls in columns of their own."""
    rows = []
    for name in _order(explanation):
        means = explanation["metrics"][name]
        row = {"mean of": name, "inside": means["inside"], "outside": means["outside"]}
        for told in controls.values():
            row[f"control: {told['control']['kind']}"] = told["metrics"].get(name, {}).get("inside")
        rows.append(row)
    return rows


def _order(explanation: dict[str, Any]) -> list[str]:
    return sorted(explanation["metrics"], key=lambda name: name != explanation["ranked_by"])


def funnel(steps: list[dict[str, Any]]) -> list[str]:
    """What went in and came out of each step or stage, with a line for each reason and a few examples below it."""
    lines = []
    for step in steps:
        name = step.get("step") or step.get("stage") or step.get("name")
        lines.append(f"- **{plain(name)}**: {number(step['into'])} in, {number(step['out'])} out")
        for reason, n in step["dropped"].items():
            lines.append(f"  - {number(n)} {plain(reason.removesuffix(f' ({name})'))}")
            for example in (step.get("examples") or {}).get(reason, [])[:_EXAMPLES]:
                lines.append(f"    - {_example(example)}")
    return lines


def _example(example: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {number(value)}" for name, value in example["metrics"].items() if value is not None)
    return f"`{example['prompt_id'][:8]}` {plain(cut(example['prompt'], 45))} ({plain(metrics)})"


def pairing_lines(pairing: dict[str, Any]) -> list[str]:
    """How pairs were made, and what was measured of scorers and generators on the way."""
    rule, scorer = pairing.get("rule"), pairing.get("scorer")
    told = [f"By `{rule}`" + (f", scored by `{scorer}`." if scorer else ".") if rule else ""]
    told += [plain(scale_words(pairing.get("reward_scale"))), plain(delta_words(pairing.get("generator_delta")))]
    means = [
        f"{name} {number(value)}" for name, value in (pairing.get("mean_reward") or {}).items() if value is not None
    ]
    told += [f"Mean reward: {plain(', '.join(means))}."] if means else []
    lines = [" ".join(words for words in told if words), ""]
    agreement = [
        {
            "scorers": plain(" and ".join(row["scorers"])),
            "Kendall's tau": row["kendall_tau"],
            "flipped": share(row["flipped"]),
            "prompts": row["prompts"],
        }
        for row in pairing.get("agreement") or []
    ]
    return [*lines, *table(agreement), ""] if agreement else lines


def overlap_lines(rows: list[dict[str, Any]], alone: bool = False) -> list[str]:
    """Which subsets share prompts, most first; alone: all rows are of one subset, which need not be named."""
    if not rows:
        return []
    known = sorted((row for row in rows if row["shared"]), key=lambda row: -row["of_smaller"])
    shown = [
        {
            **({} if alone else {"subset": row["subset"]}),
            "with" if alone else "and": row["other"],
            "shared prompts": row["shared"],
            "of the smaller": share(row["of_smaller"]),
        }
        for row in known[:_OVERLAPS]
    ]
    told = [f"{row['other']}: not known: {plain(row['why'])}" for row in rows if row["shared"] is None]
    none, less = sum(row["shared"] == 0 for row in rows), len(known) - len(shown)
    what = "Subsets" if alone else "Combinations of two subsets"
    told += [f"{what} that share less: {less:,}."] if less else []
    told += [f"{what} that share no prompt: {none:,}."] if none else []
    return ["## Prompts in common", "", *([*table(shown), ""] if shown else []), *told, ""]


# --- pieces of markdown


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a markdown table; the columns are the first row's keys."""
    if not rows:
        return ["(none)"]
    header = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in header) + " |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", number(value)).replace("\n", " ")


def plain(value: Any) -> str:
    """A text as markdown that shows it as it is."""
    return re.sub(r"([\\`*\[\]<>|#~$!&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", str(value))


def short(messages: list[dict[str, str]], length: int = 100) -> str:
    return plain(cut(" ".join(message["content"] for message in messages), length))


def cut(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + " ..."
