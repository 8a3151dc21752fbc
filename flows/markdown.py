"""Reports as markdown, for the terminal and for Prefect's artifacts alike: plain functions from a report to text."""

from __future__ import annotations

from typing import Any

from tasks.card import dropped_words, selection_words
from tasks.progress import duration


def curate_markdown(report: dict[str, Any]) -> str:
    """The report of a curate run, for people."""
    parts = ["# Published subsets", "", *table(report["subsets"]), "", "# What was dropped, and the work done", ""]
    stages = [{**row, "dropped": dropped_words(row["dropped"])} for row in report["stages"]]
    return "\n".join([*parts, *table(stages), "", f"Store: `{report['store']}`", ""])


def train_markdown(report: dict[str, Any]) -> str:
    """The report of a training run."""
    return "\n".join(
        [
            f"# Policy `{report['policy']}`",
            "",
            f"Trained on `{report['subset']}`: {report['pairs']:,} pairs, {report['steps']} steps"
            f" (dropped: {dropped_words(report['dropped'])}).",
            "",
            *table([{"": "first step", **report["first"]}, {"": "last step", **report["last"]}]),
            "",
        ]
    )


def evaluate_markdown(report: dict[str, Any]) -> str:
    """The report of an evaluation."""
    rows, sources = [], []
    for scorer, result in report["scorers"].items():
        rows.append({"scorer": scorer, **_comparison(result)})
        sources += [
            {"scorer": scorer, "source": name, **_comparison(part)} for name, part in result["by_source"].items()
        ]
    tokens = report["mean_tokens"]
    return "\n".join(
        [
            f"# {report['policy']} against {report['reference']}",
            "",
            f"{report['prompts']:,} held-out prompts, {report['samples']} samples each. Mean length "
            f"{_number(tokens['policy'])} against {_number(tokens['reference'])} tokens.",
            "",
            *table(rows),
            "",
            "## By source",
            "",
            *table(sources),
            "",
        ]
    )


def _comparison(result: dict[str, Any]) -> dict[str, Any]:
    error = "" if result["standard_error"] is None else f" ± {100 * result['standard_error']:.1f}"
    rate = "none" if result["win_rate"] is None else f"{100 * result['win_rate']:.1f} %{error}"
    means = result["mean_reward"]
    return {
        "win rate": rate,
        "mean reward": means["policy"],
        "reference": means["reference"],
        "prompts": result["prompts"],
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a markdown table; the columns are the first row's keys."""
    if not rows:
        return ["(none)"]
    header = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in header) + " |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    return _number(value).replace("|", "\\|").replace("\n", " ")


def _number(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def preview_markdown(result: dict[str, Any]) -> str:
    """How the first rows of a source are understood."""
    lines = [f"# Understood as form `{result['form']}`", "", f"Columns of a row: {', '.join(result['columns'])}", ""]
    for prompt in result["prompts"]:
        lines += [
            f"## {_short(prompt['messages'], 200)}",
            "",
            f"Source {prompt['source']}, {len(prompt['messages'])} messages.",
            "",
        ]
        rows = [
            {**{k: v for k, v in c.items() if k not in ("ratings", "text")}, **c["ratings"], "text": _cut(c["text"])}
            for c in prompt["completions"]
        ]
        lines += [*table(rows), ""]
    if result["bad"]:
        lines += ["## Rows that cannot be used", "", *(f"- {_cut(bad, 200)}" for bad in result["bad"][:10]), ""]
    lines += [f"From the first {result['looked_at']} rows; nothing was written.", ""]
    return "\n".join(lines)


def import_markdown(result: dict[str, Any]) -> str:
    """What was imported."""
    counts, ratings = result["completions"], result["ratings"]
    rows = [
        {"": "completions", "in": counts["into"], "out": counts["out"], "dropped": dropped_words(counts["dropped"])},
        {"": "ratings", "in": ratings["into"], "out": ratings["out"], "dropped": dropped_words(ratings["dropped"])},
    ]
    again = " (found in the store)" if result["reused"] else ""
    return "\n".join(
        [
            f"# Imported {result['source']}{again}",
            "",
            f"{result['prompts']:,} prompts; ratings: {', '.join(ratings['names']) or 'none'}; "
            f"{len(result['generators']):,} generators: {', '.join(result['generators'])}.",
            "",
            *table(rows),
            "",
            f"Store: `{result['store']}`",
            "",
        ]
    )


def subsets_markdown(result: dict[str, Any]) -> str:
    """The list of published subsets."""
    rows = [{**row, "latest": "yes" if row["latest"] else ""} for row in result["subsets"]]
    return "\n".join([*table(rows), "", f"Store: `{result['store']}`", ""])


def show_markdown(result: dict[str, Any]) -> str:
    """One subset: numbers, funnel, lineage, first rows."""
    content = result["manifest"]["content"]
    funnel = [{**step, "dropped": dropped_words(step["dropped"])} for step in content["funnel"]]
    numbers = [{key.removeprefix("mean_"): value for key, value in content["summary"].items()}]
    lines = [
        f"# {result['name']}@{result['version']}",
        "",
        f"Takes {selection_words(content)}.",
        "",
        *table(numbers),
    ]
    lines += ["", "## How it came about", "", *table(funnel), "", "## First rows", ""]
    for row in result["examples"]:
        lines += [f"- **prompt** {_short(row['prompt'])}"]
        lines += [f"  - **chosen** ({_number(row['score_chosen'])}) {_short(row['chosen'])}"]
        lines += [f"  - **rejected** ({_number(row['score_rejected'])}) {_short(row['rejected'])}"]
    lines += ["", f"Files: `{result['place']}`", ""]
    return "\n".join(lines)


def verify_markdown(result: dict[str, Any]) -> str:
    """Whether a subset is as it was published."""
    name = f"{result['name']}@{result['version']}"
    if not result["problems"]:
        return f"{name} is as published: {result['files']} files and the manifest have the digests they should have."
    return "\n".join([f"{name} is damaged:", "", *(f"- {problem}" for problem in result["problems"])])


def doctor_markdown(result: dict[str, Any]) -> str:
    """What was looked at, and what was found."""
    return "\n".join(table([{**row, "ok": "ok" if row["ok"] else "FAILS"} for row in result["checks"]]))


def plan_markdown(result: dict[str, Any]) -> str:
    """What a run would do."""
    return "\n".join(["# Dry run", "", *table(result["checks"]), "", "## Work to do", "", *table(result["work"])])


def demo_markdown(result: dict[str, Any]) -> str:
    """The demo: the subsets, the policy, and whether training helped."""
    subsets = [{key: value for key, value in row.items() if key != "pairing"} for row in result["curate"]["subsets"]]
    rows = []
    for run in result["runs"]:
        for scorer, compared in run["evaluate"]["scorers"].items():
            rows.append({"trained on": run["train"]["subset"], "judged by": scorer, **_comparison(compared)})
    return "\n".join(
        [
            "# Subsets",
            "",
            *table(subsets),
            "",
            "# Policies, trained by DPO, against the model they started from",
            "",
            *table(rows),
            "",
            f"Took {duration(result['seconds'])}. Look closer with `.venv/bin/prefsieve show pvar-top`, or change "
            "`configs/tinyworld/curate.yaml` and run `.venv/bin/prefsieve curate` on it.",
            "",
        ]
    )


def _short(messages: list[dict[str, str]], length: int = 100) -> str:
    return _cut(" ".join(message["content"] for message in messages), length)


def _cut(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + " ..."
