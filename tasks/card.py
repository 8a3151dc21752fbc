"""The data set card of a published subset: a README.md in the form that the Hugging Face hub reads.

Also the words in which a subset is spoken of, here, in its report and on the command line. The card is markdown with
YAML front matter; what people wrote (names of sources, reasons) is escaped, so it can be neither markup nor YAML.
Whatever a manifest does not say is left out.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import yaml

from tasks.config import PublishConfig
from tasks.describe import describe, number

CONFOUNDED = 0.2  # standard deviations of length between inside and outside from which a subset may be one of length
SOURCES_SHOWN = 20
_CLOSE = 0.9  # share of close matches below which a control is said to be matched in part only

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")

_USE = """## How to use it

```python
from datasets import load_dataset

pairs = load_dataset("parquet", data_files="data/*.parquet", split="train")
```

Columns: `prompt`, `chosen` and `rejected` are lists of chat messages, as TRL's DPOTrainer takes them. `score_chosen`,
`score_rejected` and their difference `margin` are rewards; `pvar` is the prompt's preference variance, in [0, 0.25];
`rank` is the place in the subset's ranking, 0 first; `prompt_id` is a digest of the prompt."""


def dataset_card(config: PublishConfig, content: dict[str, Any]) -> str:
    """The card's text, from the content of the version's manifest."""
    rows: int = (content.get("summary") or {}).get("rows") or 0
    front = {
        "license": _line(config.license) or "other",
        "pretty_name": _line(content.get("name") or "unnamed"),
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "prefsieve"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        "size_categories": [size_category(rows)],
    }
    explanation = content.get("explanation") or {}
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, width=1000) + "---",
        f"# {_escaped(content.get('name') or 'unnamed')}",
        f"{rows:,} preference pairs: {_escaped(selection_words(content), 2000)}.",
        _escaped(control_words(explanation.get("control")), 1000),
        _means(content),
        *_length(content),
        "## How it was made",
        _origin(content),
        _funnel("stage", content.get("funnel") or []),
        *_steps(explanation.get("steps") or []),
        _escaped(adaptive_words(content.get("adaptive")), 1000),
        *_sources(explanation.get("sources") or {}),
        *_scorers(content.get("pairing") or {}),
        _USE + _further_columns(explanation.get("metrics") or {}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def selection_words(content: dict[str, Any]) -> str:
    """What the subset takes, as its explanation says it, else from its configuration."""
    subset = content.get("subset")
    told = (content.get("explanation") or {}).get("description")
    return told or (describe(subset) if subset else "how they were selected is not recorded")


def control_words(control: dict[str, Any] | None) -> str:
    """What a subset is a control of and how well it matches; empty for one that is no control."""
    if not control:
        return ""
    matched = control.get("matched_on")
    words = f"A control of {control.get('of') or 'another subset'}"
    words += f", matched on {matched}" if matched else f" ({str(control.get('kind') or 'control').replace('_', ' ')})"
    if control.get("mean") is not None and control.get("target_mean") is not None:
        words += f": mean {matched or 'value'} {number(control['mean'])} against {number(control['target_mean'])} there"
    if control.get("close") is not None:
        words += f"; {share(control['close'])} of its pairs are close matches"
        if control["close"] < _CLOSE:
            words += f", so a part of the difference in {matched or 'what was matched'} remains"
    if control.get("pairs") is not None:
        words += f"; {control['pairs']:,} pairs against {control['target_pairs']:,} there, for no more were left"
    return words + "."


def length_verdict(content: dict[str, Any]) -> tuple[str, str]:
    """Whether the subset is one of long or short answers: (fine, notice, warning or unknown; the words for it)."""
    explanation = content.get("explanation") or {}
    r = explanation.get("length_correlation")
    if r is None:
        return "unknown", (
            "The correlation of the selection with the difference in length (chosen minus rejected) is not known: "
            "either it was not computed, or the selection or the difference is the same for all pairs."
        )
    means = (explanation.get("metrics") or {}).get("length_difference") or {}
    words = f"Being selected correlates with the difference in length (chosen minus rejected) at r = {r:+.2f}"
    if means.get("inside") is not None and means.get("outside") is not None:
        unit = content.get("length_unit") or "tokens"
        words += f" (mean {means['inside']:+,.4g} {unit} inside, {means['outside']:+,.4g} outside)"
    longer = "longer" if r > 0 else "shorter"
    shift, error = explanation.get("length_shift"), explanation.get("length_shift_error") or 0.0
    if shift is None:
        shift = r
    else:
        words += f", {shift:+.2f} ± {error:.2f} standard deviations apart"
    sure = abs(shift) > 2 * error
    if abs(shift) > CONFOUNDED and sure:
        return "warning", (
            f"{words}: the subset prefers pairs whose chosen answer is the {longer} one. What training gains from it "
            "may come from length. Compare by length-controlled win rate, or filter on |length_difference| first."
        )
    if abs(shift) > CONFOUNDED / 2 and sure:
        return "notice", f"{words}: a weak leaning to {longer} chosen answers."
    why = "" if sure else ", no more than chance gives a subset of this size"
    return "fine", f"{words}: no sign that the subset is one of {longer} answers{why}."


def samples_words(content: dict[str, Any]) -> str:
    """How many samples a prompt has: one number only where all have as many."""
    ladder, samples = (content.get("adaptive") or {}).get("ladder"), (content.get("parents") or {}).get("samples")
    if ladder:
        return f"{ladder[0]} to {ladder[-1]} samples per prompt"
    if samples is None:
        return ""
    imported = any(step.get("stage") == "import" for step in content.get("funnel") or [])
    return f"{'up to ' if imported else ''}{number(samples)} samples per prompt"


def scale_words(scale: float | None) -> str:
    """What the reward scale T means for PVar."""
    if scale is None:
        return ""
    return (
        f"PVar at reward scale T = {scale:.4g}: rewards {scale:.4g} apart count as a preference of 73 to 27. "
        "Values of PVar compare only where scorer and T are the same."
    )


def adaptive_words(adaptive: dict[str, Any] | None) -> str:
    """What adaptive sampling spent, and what is expected of it, in words; empty where there was none."""
    rounds = (adaptive or {}).get("rounds") or []
    if not rounds:
        return ""
    last = rounds[-1]
    made, fixed = last["completions"], last["fixed_completions"]
    return (
        f"Adaptive sampling: {made:,} completions ({last['tokens']:,} tokens) in {len(rounds)} rounds instead of "
        f"{fixed:,} ({last['fixed_tokens']:,} tokens, estimated) for {fixed // last['prompts']} per prompt: "
        f"{fixed / made:.2f} times fewer. Expected of the top by pvar_posterior: {share(last['expected_quality'])} of "
        f"the mean PVar, and {share(last['expected_overlap'])} of the prompts, of the subset that those would give."
    )


def delta_words(delta: dict[str, Any] | None) -> str:
    """The measured difference of two generators, in words; empty where none was measured."""
    if not delta or delta.get("delta") is None:
        return ""
    error = "" if delta.get("standard_error") is None else f" ± {number(delta['standard_error'])}"
    prompts = "" if delta.get("prompts") is None else f" over {delta['prompts']:,} prompts"
    return (
        f"Mean reward of {delta.get('stronger') or 'the stronger'} minus {delta.get('weaker') or 'the weaker'}: "
        f"{number(delta['delta'])}{error}{prompts}."
    )


def dropped_words(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n or 0:,} {reason}" for reason, n in dropped.items()) or "none"


def share(value: float | None) -> str:
    """A share in percent, 0 and 100 only where it is exactly that; `none` where there is none."""
    if value is None:
        return "none"
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def shares(sources: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Per source its counts, and its shares of all pairs inside and outside; the largest first, the rest as one row."""
    rows: list[dict[str, Any]] = [
        {"source": source, "inside": (n or {}).get("inside") or 0, "outside": (n or {}).get("outside") or 0}
        for source, n in sources.items()
    ]
    rows.sort(key=lambda row: (-row["inside"] - row["outside"], str(row["source"])))
    shown, rest = rows[:SOURCES_SHOWN], rows[SOURCES_SHOWN:]
    if rest:
        sums = {side: sum(row[side] for row in rest) for side in ("inside", "outside")}
        shown.append({"source": f"{len(rest):,} more", **sums})
    totals = {side: sum(row[side] for row in rows) for side in ("inside", "outside")}
    for row in shown:
        for side, total in totals.items():
            row[f"{side}_share"] = row[side] / total if total else None
    return shown


def size_category(rows: int) -> str:
    """The hub's word for so many rows."""
    if rows < 1_000:
        return "n<1K"
    for power, (low, high) in enumerate(pairwise(_SIZES), 4):
        if rows < 10**power:
            return f"{low}<n<{high}"
    return "n>1T"


def _means(content: dict[str, Any]) -> str:
    metrics = (content.get("explanation") or {}).get("metrics") or {}
    summary = {key[5:]: value for key, value in (content.get("summary") or {}).items() if key.startswith("mean_")}
    if not metrics:
        return _table(["", "mean"], [[name, number(value)] for name, value in summary.items()])
    names = [*metrics, *(name for name in summary if name not in metrics)]
    rows = []
    for name in names:
        means = metrics.get(name) or {}
        rows.append([name, number(means.get("inside", summary.get(name))), number(means.get("outside"))])
    return _table(["mean", "in this subset", "in the pairs left out"], rows)


def _length(content: dict[str, Any]) -> list[str]:
    tone, words = length_verdict(content)
    if tone == "unknown":
        return []
    return ["**Warning.** " + _escaped(words, 1000) if tone == "warning" else _escaped(words, 1000)]


def _origin(content: dict[str, Any]) -> str:
    pairing = content.get("pairing") or {}
    samples = samples_words(content)
    generators = ", ".join(_code(name) for name in pairing.get("generators") or [])
    words = f"Pairs by {_code(pairing.get('rule') or 'an unknown rule')}"
    words += f" from {samples}" if samples else ""
    words += f" of {generators}" if generators else ""
    words += f", scored by {_code(pairing['scorer'])}" if pairing.get("scorer") else ""
    told = [
        f"{words}.",
        scale_words(pairing.get("reward_scale")),
        _escaped(delta_words(pairing.get("generator_delta"))),
    ]
    return " ".join(part for part in told if part)


def _funnel(what: str, steps: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(step.get("stage") or step.get("step") or "?"),
            number(step.get("into")),
            number(step.get("out")),
            dropped_words(step.get("dropped") or {}),
        ]
        for step in steps
    ]
    return _table([what, "in", "out", "dropped"], rows)


def _steps(steps: list[dict[str, Any]]) -> list[str]:
    return ["The steps of the subset itself:", _funnel("step", steps)] if steps else []


def _sources(sources: dict[str, dict[str, int]]) -> list[str]:
    if not sources:
        return []
    rows = [
        [str(row["source"]), number(row["inside"]), share(row["inside_share"]), share(row["outside_share"])]
        for row in shares(sources)
    ]
    return ["## Sources", _table(["source", "pairs", "share here", "share in the pairs left out"], rows)]


def _scorers(pairing: dict[str, Any]) -> list[str]:
    agreement = pairing.get("agreement") or []
    if not agreement:
        return []
    rows = [
        [
            " and ".join(str(name) for name in row.get("scorers") or []),
            number(row.get("kendall_tau")),
            share(row.get("flipped")),
            number(row.get("prompts")),
        ]
        for row in agreement
    ]
    told = "Kendall's tau over the samples of a prompt, and the share of pairs that the other scorer would turn round."
    return ["## Agreement of the scorers", told, _table(["scorers", "Kendall's tau", "flipped", "prompts"], rows)]


def _further_columns(metrics: dict[str, Any]) -> str:
    further = [name for name in metrics if name.startswith("margin.")]
    return f" {', '.join(_code(name) for name in further)}: the margin by another scorer." if further else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table; empty without rows."""
    lines = [header, ["---"] * len(header), *([_escaped(cell, 300) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _line(value: Any, length: int = 120) -> str:
    """A text as one line of printable characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 2 * length]).split())
    return text if len(text) <= length else text[:length] + " ..."


def _escaped(value: Any, length: int = 120) -> str:
    """A text as one line of markdown that shows it as it is. An underscore inside a word needs no escape."""
    return re.sub(r"([\\`*\[\]<>|#~$!&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", _line(value, length))


def _code(value: Any) -> str:
    return f"`{_line(value).replace('`', chr(39)) or '?'}`"
