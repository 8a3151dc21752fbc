"""The report of a published subset: one page that says what it is, how it came about and what it looks like.

The page stands alone: no script, and nothing is loaded from anywhere, which its content policy also forbids. Charts are
SVG, drawn by the macros of templates/charts.jinja from what is laid out here. Texts come from strangers: every value
is escaped by Jinja, characters that HTML and XML forbid become U+FFFD, and long texts are cut, so that the page's size
does not depend on them. What a manifest does not say is left out.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tasks import card

CUT = 2_000  # characters shown of a text
_LABEL = 120  # and of a name
_MESSAGES = 20  # messages shown of a conversation
_EXAMPLES = 3  # per drop reason
_ROWS = 20  # first and last
_YAML = 20_000

_FIRST = ("pvar", "margin", "length_difference", "chosen_tokens", "rejected_tokens")  # metrics that are not folded
_MEANING = {
    "pvar": "preference variance of the prompt, 0 to 0.25",
    "margin": "reward of chosen minus reward of rejected",
    "length_difference": "chosen minus rejected, in {unit}",
    "chosen_tokens": "length of the chosen answer, in {unit}",
    "rejected_tokens": "length of the rejected answer, in {unit}",
    "score_chosen": "reward of the chosen answer",
    "score_rejected": "reward of the rejected answer",
}
_AGREEMENT = ("scorers", "kendall_tau", "flipped", "prompts")
_UNITS = {"ingest": "rows", "generate": "requests", "score": "samples", "pair": "prompts", "subset": "pairs"}

# What neither HTML nor XML may hold: controls but tab and line ends, surrogates, noncharacters.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)

_WIDTH, _HEIGHT = 340, 170  # of a histogram, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 330, 14, 140  # its plot


def report_html(content: dict[str, Any], highest: list[dict[str, Any]], lowest: list[dict[str, Any]]) -> str:
    """The page, from the content of the version's manifest and its rows with the highest and lowest rank.

    highest, lowest: rows as records.PREFERENCES, further numeric columns allowed; 20 of each are shown.
    """
    explanation, pairing = content.get("explanation") or {}, content.get("pairing") or {}
    control, ranked_by = explanation.get("control"), explanation.get("ranked_by")
    metrics = _metrics(content)
    tone, length = card.length_verdict(content)
    told = {
        "name": content.get("name") or "unnamed",
        "rows": (content.get("summary") or {}).get("rows"),
        "description": card.selection_words(content),
        "origin": _origin(content),
        "tiles": _tiles(content, ranked_by, tone),
        "tone": tone,
        "length": length,
        "control_of": control and (control.get("of") or "the other subset"),
        "control_words": card.control_words(control),
        "funnel": [_stage(step) for step in content.get("funnel") or []],
        "steps": [_stage(step) for step in explanation.get("steps") or []],
        "adaptive": card.adaptive_words(content.get("adaptive")),
        "rounds": [_round(row) for row in (content.get("adaptive") or {}).get("rounds") or []],
        "metrics": metrics,
        "charts": [metric for metric in metrics if metric["chart"] and metric["name"] in _FIRST],
        "further": [metric for metric in metrics if metric["chart"] and metric["name"] not in _FIRST],
        "sources": card.shares(explanation.get("sources") or {}),
        "agreement": [{key: row.get(key) for key in _AGREEMENT} for row in pairing.get("agreement") or []],
        "delta": card.delta_words(pairing.get("generator_delta")),
        "mean_reward": pairing.get("mean_reward") or {},
        "scale": card.scale_words(pairing.get("reward_scale")),
        "cut": CUT,
        "ends": _ends(_ordered_by(content), ranked_by, highest, lowest),
        "configuration": _yaml({"subset": content.get("subset"), "pairing": _setting(pairing)}),
        "lineage": _yaml({"parents": content.get("parents"), "made_with": content.get("made_with")}),
    }
    return environment().get_template("report.html.jinja").render(told)


@cache
def environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": card.number, "share": card.share, "label": _label}
    return environment


def _clean(value: Any) -> Any:
    """Every value on its way into the page; what Jinja made itself is clean already."""
    return _FORBIDDEN.sub("\ufffd", value) if type(value) is str else value


def _round(row: dict[str, Any]) -> dict[str, Any]:
    """A round of adaptive sampling, with the share of the prompts that were sampled further after it."""
    return {**row, "going": row["undecided"] / row["prompts"] if row["prompts"] else None}


def _label(value: Any, length: int = _LABEL) -> str:
    text = " ".join(_text(value)[: 4 * length].split())
    return text if len(text) <= length else text[:length] + " ..."


def _text(value: Any) -> str:
    """A text as it is; anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _origin(content: dict[str, Any]) -> str:
    """One sentence on how the pairs were made, of what is known."""
    pairing, samples = content.get("pairing") or {}, card.samples_words(content)
    words = f"Pairs by {pairing['rule']}" if pairing.get("rule") else ""
    words += f" from {samples}" if words and samples else ""
    words += f" of {', '.join(map(_text, pairing['generators']))}" if words and pairing.get("generators") else ""
    words += f", scored by {pairing['scorer']}" if words and pairing.get("scorer") else ""
    return words and words + "."


def _tiles(content: dict[str, Any], ranked_by: str | None, tone: str) -> list[dict[str, str]]:
    """The key numbers: what to read first."""
    explanation, summary = content.get("explanation") or {}, content.get("summary") or {}
    metrics = explanation.get("metrics") or {}
    rows, of, tiles = summary.get("rows"), _all_pairs(content), []
    if rows is not None:
        note = f"{card.share(rows / of)} of {of:,}" if of else ""
        tiles.append({"what": "pairs", "value": card.number(rows), "note": note, "tone": ""})
    for name in dict.fromkeys([ranked_by, "pvar", "margin"]):
        means = metrics.get(name) or {}
        inside = means.get("inside", summary.get(f"mean_{name}"))
        if inside is not None:
            outside = means.get("outside")
            note = "" if outside is None else f"outside {card.number(outside)}"
            tiles.append({"what": f"mean {name}", "value": card.number(inside), "note": note, "tone": ""})
    r = explanation.get("length_correlation")
    if r is not None:
        words = {"fine": "no sign of confounding", "notice": "weak leaning", "warning": "confounded"}[tone]
        tiles.append({"what": "correlation with length", "value": f"{r:+.2f}", "note": words, "tone": tone})
    return tiles


def _all_pairs(content: dict[str, Any]) -> int | None:
    """How many pairs the subset was taken from."""
    steps = (content.get("explanation") or {}).get("steps") or []
    funnel = [step for step in content.get("funnel") or [] if step.get("stage") == "subset"]
    return next((step["into"] for step in (*funnel, *steps) if step.get("into")), None)


def _stage(step: dict[str, Any]) -> dict[str, Any]:
    """A stage of the funnel or a step of the subset. What is kept is drawn as a share of what went in."""
    into, out = step.get("into"), step.get("out")
    dropped = {reason: n or 0 for reason, n in (step.get("dropped") or {}).items()}
    examples = step.get("examples") or {}
    return {
        "name": step.get("stage") or step.get("step") or "?",
        "unit": _UNITS.get(str(step.get("stage")), ""),
        "into": into,
        "out": out,
        "kept": out / into if into and out is not None else None,
        "lost": 0 if into is None or out is None else into - out - sum(dropped.values()),  # other than 0 is a fault
        "dropped": [
            {
                "reason": reason,
                "n": n,
                "examples": [
                    {"prompt": example.get("prompt"), "metrics": example.get("metrics") or {}}
                    for example in (examples.get(reason) or [])[:_EXAMPLES]
                ],
            }
            for reason, n in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _metrics(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric: its means inside and outside, and its chart where there is one."""
    metrics = (content.get("explanation") or {}).get("metrics") or {}
    summary = {key[5:]: value for key, value in (content.get("summary") or {}).items() if key.startswith("mean_")}
    unit = content.get("length_unit") or "tokens"
    first = [name for name in _FIRST if name in metrics or name in summary]
    rows = []
    for name in dict.fromkeys([*first, *metrics, *summary]):
        metric = metrics.get(name) or {}
        inside: float | None = metric.get("inside", summary.get(name))
        outside: float | None = metric.get("outside")
        meaning = _MEANING.get(name, f"margin by {name[7:]}" if name.startswith("margin.") else "")
        rows.append(
            {
                "name": name,
                "meaning": meaning.format(unit=unit) if name in _MEANING else meaning,
                "inside": inside,
                "outside": outside,
                "difference": None if inside is None or outside is None else inside - outside,
                "chart": _chart(metric.get("histogram"), inside, outside),
            }
        )
    return rows


def _chart(histogram: dict[str, Any] | None, inside: float | None, outside: float | None) -> dict[str, Any] | None:
    """Where everything of a histogram goes: bars as high as their share of the pairs inside, or of those outside.

    None where there is nothing to draw: no counts, or edges that are not finite and rising.
    """
    histogram = histogram or {}
    edges = histogram.get("edges") or []
    counts = {side: histogram.get(side) or [] for side in ("inside", "outside")}
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not rising or not 1e-300 < edges[-1] - edges[0] < 1e300:
        return None
    counts = {side: ns if len(ns) == len(edges) - 1 else [0] * (len(edges) - 1) for side, ns in counts.items()}
    heights = {side: [n / max(sum(ns), 1) for n in ns] for side, ns in counts.items()}
    top = max(max(shares) for shares in heights.values())
    if top <= 0:
        return None

    def x(value: float) -> float:
        place = (min(max(value, edges[0]), edges[-1]) - edges[0]) / (edges[-1] - edges[0])
        return round(_LEFT + place * (_RIGHT - _LEFT), 1)

    def y(height: float) -> float:
        return round(_BOTTOM - height / top * (_BOTTOM - _TOP), 1)

    def outline(shares: list[float]) -> str:
        steps = "".join(f"V{y(height)}H{x(edge)}" for height, edge in zip(shares, edges[1:], strict=True))
        return f"M{x(edges[0])} {_BOTTOM}{steps}V{_BOTTOM}"

    bins = zip(pairwise(edges), counts["inside"], counts["outside"], *heights.values(), strict=True)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "outlines": {side: outline(shares) for side, shares in heights.items() if any(shares)},
        "means": {
            side: x(mean)
            for side, mean in (("inside", inside), ("outside", outside))
            if mean is not None and math.isfinite(mean)
        },
        "x_ticks": [(x(tick), card.number(tick)) for tick in ticks(edges[0], edges[-1], 5)],
        "y_ticks": [(y(tick), f"{100 * tick:.3g} %") for tick in ticks(0, top, 4)],
        "bins": [
            {"x": x(low), "width": round(x(high) - x(low), 1), "low": low, "high": high, "inside": n, "outside": m}
            | {"inside_share": share, "outside_share": other}
            for (low, high), n, m, share, other in bins
        ],
    }


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high, in steps of 1, 2 or 5 times a power of ten; a near miss counts."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 0.02), math.floor(high / step + 0.02)
    return [place * step + 0.0 for place in range(first, last + 1)]


def _ordered_by(content: dict[str, Any]) -> str | None:
    """The metric whose order the ranks are in, from either end; None for what was drawn or matched."""
    ranks = [step["rank"] for step in (content.get("subset") or {}).get("steps") or [] if step.get("rank")]
    control = ((content.get("explanation") or {}).get("control") or {}).get("kind")
    if control == "bottom":
        ranks = [metric for metric in ranks if metric != "random"]
    return ranks[-1] if ranks and control in (None, "bottom") and ranks[-1] != "random" else None


def _ends(
    ordered_by: str | None, ranked_by: str | None, highest: list[dict[str, Any]], lowest: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The two lists of rows, with their titles: a ranking may begin at either end of its metric."""
    titles = (f"First by {ordered_by}", f"Last by {ordered_by}") if ordered_by else ("First in order", "Last in order")
    ends = zip(("highest", "lowest"), titles, (highest, lowest), strict=True)
    return [
        {"id": name, "title": title, "rows": [_row(row, ranked_by) for row in (rows or [])[:_ROWS]]}
        for name, title, rows in ends
    ]


def _row(row: dict[str, Any], ranked_by: str | None) -> dict[str, Any]:
    sides = {side: _conversation(row.get(side)) for side in ("prompt", "chosen", "rejected")}
    numbers = {name: value for name, value in row.items() if name not in sides}
    shown = [name for name in dict.fromkeys([ranked_by, "pvar", "margin"]) if numbers.get(name or "") is not None]
    return {
        **sides,
        "start": _label(" ".join(message["text"] for message in sides["prompt"]["messages"]), 160),
        "badges": [(name, numbers[name or ""]) for name in shown],
        "numbers": [(name, value) for name, value in numbers.items() if value is not None],
    }


def _conversation(messages: Any) -> dict[str, Any]:
    """Messages with CUT characters among them, and how many characters and messages there are."""
    listed = messages if isinstance(messages, list) else [{"role": "", "content": messages}]
    parts = [part if isinstance(part, dict) else {"content": part} for part in listed]
    left, shown = CUT, []
    total = sum(len(_text(part.get("content"))) for part in parts)
    for part in parts[:_MESSAGES]:
        if left <= 0:
            break
        text = _text(part.get("content"))[:left]
        shown.append({"role": _label(part.get("role"), 20), "text": text})
        left -= len(text)
    cut = sum(len(part["text"]) for part in shown) < total or len(shown) < len(parts)
    return {"messages": shown, "cut": cut, "total": total, "count": len(parts)}


def _setting(pairing: dict[str, Any]) -> dict[str, Any]:
    """Of a pairing what was configured, without what was measured."""
    return {key: value for key, value in pairing.items() if key not in ("agreement", "generator_delta", "mean_reward")}


def _yaml(value: dict[str, Any]) -> str:
    """Configuration and lineage as YAML, of what there is."""
    told = {key: part for key, part in value.items() if part}
    if not told:
        return ""
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)
    return text if len(text) <= _YAML else text[:_YAML] + f"\n# cut: {len(text):,} characters in all\n"
