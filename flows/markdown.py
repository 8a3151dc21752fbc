"""Reports as markdown, for the terminal and for Prefect's artifacts alike: plain functions from a report to text.

What is long stands in lists, a line each, since a terminal squeezes the columns of a wide table.
"""

from __future__ import annotations

import shlex
from typing import Any

from flows.explained import cut, explained, funnel, overlap_lines, pairing_lines, plain, short, table
from tasks.card import adaptive_words, dropped_words, selection_words
from tasks.describe import number
from tasks.experiment_words import experiment_lines
from tasks.progress import duration


def recipes_markdown(result: dict[str, Any]) -> str:
    """What there is to start from."""
    rows = [f"- **{row['recipe']}** ({row['flow']}): {plain(row['what'])}" for row in result["recipes"]]
    return "\n".join([*rows, "", "`prefsieve init RECIPE` writes one to RECIPE.yaml.", ""])


def written_markdown(result: dict[str, Any]) -> str:
    """What was written, and what to do with it."""
    file, change = shlex.quote(result["file"]), ", ".join(map(str, result["change"]))
    steps = {
        f"prefsieve doctor {file}": "what would fail, before a GPU is paid for",
        f"prefsieve {result['flow']} {file} --dry-run": "what would be done; changes nothing",
        f"prefsieve {result['flow']} {file}": "does it",
    }
    width = max(map(len, steps)) + 4
    lines = [f"{command:{width}}# {what}" for command, what in steps.items()]
    says = f"{plain(file)} is written. Lines {change} are yours to change; they are marked CHANGE. Then:"
    return "\n".join([says, "", "```", *lines, "```", ""])


def curate_markdown(report: dict[str, Any]) -> str:
    """The report of a curate run, for people."""
    stages = [{name: row.get(key) for name, key in _WORK.items()} for row in report["stages"]]
    lost = [{**row, "into": row["in"]} for row in report["stages"] if row["dropped"]]
    return "\n".join(
        [
            "# Published subsets",
            "",
            *_subset_lines(report["subsets"]),
            "",
            *overlap_lines(report["overlap"]),
            "# Work done",
            "",
            *table(stages),
            "",
            *cost_lines(report["cost"]),
            "",
            *(["# What was dropped", "", *funnel(lost), ""] if lost else []),
            f"Store: `{report['store']}`. Each subset's folder there has a `report.html`.",
            "",
        ]
    )


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """What the run paid for; what it found in the store was paid for by others."""
    if not cost["gpu_seconds"] and not cost["paid_tokens"]:
        return ["Cost: nothing; no GPU was held, no endpoint asked."]
    paid = []
    if cost["gpu_seconds"]:
        paid.append(f"{number(cost['gpu_seconds'] / 3600)} GPU hours")
    if cost["paid_tokens"]:
        paid.append(f"{cost['paid_tokens']:,} tokens of endpoints")
    what = " and ".join(paid)
    if cost["amount"] is None:
        return [f"Cost: {what}; `prices` in the configuration makes an amount of it."]
    each = [f"{number(one['amount'])} per pair of {plain(name)}" for name, one in cost["per_pair"].items()]
    whole = f"{what} = {number(cost['amount'])} {cost['currency']}"
    without = f" Without {' and '.join(cost['unpriced'])}: `prices` has none for them." if cost["unpriced"] else ""
    return [f"Cost: {', '.join([whole, *each])}.{without}"]


_WORK = {
    "stage": "stage",
    "in": "in",
    "out": "out",
    "engines": "engine_starts",
    "requests": "requests",
    "tokens": "tokens",
    "shards": "shards_made",
    "reused": "shards_reused",
    "seconds": "seconds",
}


def _subset_lines(subsets: list[dict[str, Any]]) -> list[str]:
    """A table of their numbers, then what each takes."""
    numbers = [{key: value for key, value in row.items() if key not in ("selection", "pairing")} for row in subsets]
    return [*table(numbers), "", *(f"- **{row['name']}**: {plain(row['selection'])}" for row in subsets)]


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
            *cost_lines(report["cost"]),
            "",
        ]
    )


def evaluate_markdown(report: dict[str, Any]) -> str:
    """The report of an evaluation."""
    rows, sources = [], []
    for scorer, result in report["scorers"].items():
        rows.append({"scorer": scorer, **_comparison(result)})
        sources += [{"scorer": scorer, "source": name, **_rates(part)} for name, part in result["by_source"].items()]
    tokens = report["mean_tokens"]
    return "\n".join(
        [
            f"# {report['policy']} against {report['reference']}",
            "",
            f"{report['prompts']:,} held-out prompts, {report['samples']} samples each. Mean length "
            f"{number(tokens['policy'])} against {number(tokens['reference'])} tokens. LC: win rate if both were "
            "equally long.",
            "",
            *table(rows),
            "",
            *(line for scorer, result in report["scorers"].items() for line in _scorer_lines(scorer, result)),
            "",
            "## By source",
            "",
            *table(sources),
            "",
            *_harness_lines(report.get("harness")),
            *cost_lines(report["cost"]),
            "",
        ]
    )


def experiment_markdown(report: dict[str, Any]) -> str:
    """The report of an experiment, and where its page is."""
    text = experiment_text(report, report["costs"])
    kept = f"Kept as `{report['version']}`, with a page to look at, report.html: `{report['place']}`"
    return "\n".join([text, *cost_lines(report["cost"]), "", kept, ""])


def experiment_text(result: dict[str, Any], costs: dict[str, Any]) -> str:
    return "\n".join(experiment_lines(result, costs, table))


def _comparison(result: dict[str, Any]) -> dict[str, Any]:
    means = result["mean_reward"]
    return {
        "win rate": _rate(result),
        "LC win rate": _rate(result["length_controlled"]),
        "mean reward": means["policy"],
        "reference": means["reference"],
        "prompts": result["prompts"],
    }


def _rates(result: dict[str, Any]) -> dict[str, Any]:
    tokens = result["mean_tokens"]
    return {
        "win rate": _rate(result),
        "LC win rate": _rate(result["length_controlled"]),
        "tokens": f"{number(tokens['policy'])} / {number(tokens['reference'])}",
        "prompts": result["prompts"],
    }


def _rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return "too few prompts"
    if result["win_rate"] is None:
        return "none"
    error = result["standard_error"]
    return f"{100 * result['win_rate']:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def _scorer_lines(scorer: str, result: dict[str, Any]) -> list[str]:
    """What stands behind a scorer's win rate, a line each."""
    verdicts = result["verdicts"]
    lines = [
        f"- **{plain(scorer)}**: {verdicts['wins']:,} wins, {verdicts['ties']:,} ties, {verdicts['losses']:,} losses."
    ]
    if style := result.get("style_controlled"):
        lines += [f"  - With length and markdown controlled: {_rate(style)}."]
    if judge := result.get("judge"):
        shown = [f"{name.replace('_', ' ')} {n:,}" for name, n in judge["shown_first"].items()]
        again = [f"{name.replace('_', ' ')} {n:,}" for name, n in judge["shown_second"].items()]
        lines += [f"  - Shown first: {', '.join(shown)}; shown second: {', '.join(again)}."]
    if judge and judge["consistency"] is not None:
        arena = result["arena"]
        lines += [
            f"  - Both orders agree in {100 * judge['consistency']:.1f} %; the first place won "
            f"{100 * judge['first_place']:.1f} % of the games.",
            f"  - Arena score {100 * arena['score']:.1f} % ({100 * arena['low']:.1f} to {100 * arena['high']:.1f} in "
            f"{arena['bootstraps']} bootstraps), strong verdicts counted three times.",
        ]
    return lines


def _harness_lines(harness: dict[str, Any] | None) -> list[str]:
    if harness is None:
        return []
    rows = [
        {"task": plain(task), "metric": plain(metric), **{side: _value(sides.get(side)) for side in _SIDES}}
        for task, result in harness["tasks"].items()
        for metric, sides in result["metrics"].items()
    ]
    return [f"## Tasks of {harness['version']}", "", *table(rows), ""]


_SIDES = ("policy", "reference")


def _value(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    error = result["standard_error"]
    return f"{result['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def preview_markdown(result: dict[str, Any]) -> str:
    """How the first rows of a source are understood."""
    lines = [
        f"# Understood as form `{result['form']}`",
        "",
        f"Columns of a row: {plain(', '.join(result['columns']))}",
        "",
    ]
    for prompt in result["prompts"]:
        lines += [
            f"## {short(prompt['messages'], 200)}",
            "",
            f"Source {plain(prompt['source'])}, {len(prompt['messages'])} messages.",
            "",
        ]
        lines += [*table([_completion(one) for one in prompt["completions"]]), ""]
    if result["bad"]:
        lines += ["## Rows that cannot be used", "", *(f"- {plain(cut(bad, 200))}" for bad in result["bad"][:10]), ""]
    lines += [f"From the first {result['looked_at']} rows; nothing was written.", ""]
    return "\n".join(lines)


def _completion(one: dict[str, Any]) -> dict[str, Any]:
    """A row of a table: who wrote it, its length, its ratings, its beginning."""
    about = {name: value for name, value in one.items() if name not in ("ratings", "text")}
    cells = {**about, **one["ratings"], "text": cut(one["text"])}
    return {name: plain(value) if isinstance(value, str) else value for name, value in cells.items()}


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
            f"{len(result['generators']):,} generators: {plain(', '.join(result['generators']))}.",
            "",
            *table(rows),
            "",
            f"Store: `{result['store']}`",
            "",
        ]
    )


def subsets_markdown(result: dict[str, Any]) -> str:
    """The list of published subsets, and what the latest of each name takes."""
    rows = [
        {**row, "latest": "yes" if row["latest"] else "", "created": row["created"][:16]} for row in result["subsets"]
    ]
    numbers = [{key: value for key, value in row.items() if key != "selection"} for row in rows]
    latest = [f"- **{row['name']}**: {plain(row['selection'])}" for row in rows if row["latest"]]
    return "\n".join([*table(numbers), "", *latest, "", f"Store: `{result['store']}`", ""])


def show_markdown(result: dict[str, Any]) -> str:
    """One subset: how it came about, what sets it apart, what it shares with others, its first rows."""
    content = result["manifest"]["content"]
    stages = [step for step in content["funnel"] if step["stage"] != "subset" or not content.get("explanation")]
    lines = [
        f"# {result['name']}@{result['version']}",
        "",
        f"{number(content['summary']['rows'])} pairs: {plain(selection_words(content))}.",
        "",
        *explained(content),
        "## How the pairs were made",
        "",
        *pairing_lines(content.get("pairing") or {}),
        *funnel(stages),
        "",
        *([plain(adaptive_words(content["adaptive"])), ""] if content.get("adaptive") else []),
        *overlap_lines(result["overlap"], alone=True),
        "## First rows",
        "",
    ]
    for row in result["examples"]:
        lines += [f"- `{row['prompt_id'][:12]}` **prompt** {short(row['prompt'])}"]
        lines += [f"  - **chosen** ({number(row['score_chosen'])}) {short(row['chosen'])}"]
        lines += [f"  - **rejected** ({number(row['score_rejected'])}) {short(row['rejected'])}"]
    lines += [
        "",
        f"Why is a prompt in or out? `prefsieve show {result['name']} --row ID`, by its prompt_id.",
        "",
        f"Files, with a report to look at, report.html: `{result['place']}`",
        "",
    ]
    return "\n".join(lines)


def why_markdown(result: dict[str, Any]) -> str:
    """Why a prompt's pair is in a subset, or out."""
    lines = [f"# Prompt `{result['prompt_id']}` and {result['name']}@{result['version']}", ""]
    for name, text in (result["texts"] or {}).items():
        lines += [f"- **{name}** {plain(cut(text, 300))}"]
    for pair in result["pairs"]:
        writers = f"{plain(pair['chosen_generator'])} over {plain(pair['rejected_generator'])}"
        if pair["taken"]:
            by = f" by {result['ranked_by']}" if result["ranked_by"] else ""
            words = f"**Taken**: at place {pair['rank'] + 1:,} of {result['of']:,}{by}"
        else:
            step = f", at the step *{plain(pair['step'])}*" if pair["step"] else ""
            reason = pair["reason"].removesuffix(f" ({pair['step']})")
            words = f"**Left out**{step}: {plain(reason)}"
        means = result["means"]
        rows = [
            {"metric": name, "this pair": value, "mean inside": of["inside"], "mean outside": of["outside"]}
            for name, value in pair["metrics"].items()
            if (of := means.get(name) or ({"inside": None, "outside": None} if value is not None else None))
        ]
        lines += ["", f"{words} ({writers}).", "", *table(rows)]
    if result["dropped"]:
        pvar = result["dropped"]["pvar"]
        known = "" if pvar is None else f" (its pvar: {number(pvar)})"
        more = "Another of its candidates was no pair" if result["pairs"] else "**No pair** was made of it"
        lines += ["", f"{more}: {plain(result['dropped']['reason'])}{known}."]
    return "\n".join([*lines, ""])


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
    """What a run would do; and the subsets, where all rewards are there."""
    lines = ["# Dry run", "", *table(result["checks"]), "", "## Work to do", "", *table(_work_rows(result["work"])), ""]
    if "cells" in result:
        lines += ["## Cells", "", *table(result["cells"]), ""]
    if "subsets" not in result:
        return "\n".join(lines)
    for pairing in result["pairings"]:
        lines += [f"## Pairs {pairing['name']}", "", *pairing_lines(pairing), *funnel([pairing]), ""]
    for subset in result["subsets"]:
        if subset["explanation"]["control"]:
            continue
        controls = {
            other["name"]: other["explanation"]
            for other in result["subsets"]
            if (control := other["explanation"]["control"]) and control["of"] == subset["name"]
        }
        told = {"explanation": subset["explanation"], "length_unit": result["length_unit"]}
        words = selection_words(told)
        lines += [f"## {subset['name']}: {subset['pairs']:,} pairs", "", f"{plain(words[:1].upper() + words[1:])}.", ""]
        lines += explained(told, controls)
    return "\n".join([*lines, *overlap_lines(result["overlap"]), "Nothing was written.", ""])


def _work_rows(work: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a column for estimates where there are any."""
    told = any("estimate" in row for row in work)
    return [{**row, "estimate": row.get("estimate", "")} for row in work] if told else work


def demo_markdown(result: dict[str, Any]) -> str:
    """The demo: the subsets, the policy, and whether training helped."""
    rows = []
    for run in result["runs"]:
        for scorer, compared in run["evaluate"]["scorers"].items():
            rows.append({"trained on": run["train"]["subset"], "judged by": scorer, **_comparison(compared)})
    return "\n".join(
        [
            "# Subsets",
            "",
            *_subset_lines(result["curate"]["subsets"]),
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


def cancel_markdown(report: dict[str, Any]) -> str:
    """What became of a job that was to stop."""
    return f"Job {report['job']} {report['status']}."
