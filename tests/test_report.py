"""The report page and the data set card: what they say, and that no text can be more than text in them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tasks.card import dataset_card, size_category
from tasks.config import PublishConfig
from tasks.describe import describe
from tasks.report import CUT, report_html

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' style='background:url(https://evil.example/x)",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1) <a href='https://evil.example'>x</a>",
    "]]> --> <!-- &lt;b&gt; &#0; \x00\x01\x08\x0b\x1b[31m\x7f\x85\ufffe\uffff",
    "\u202egnp.exe \u2066 שלום العربية",
    "\ud800 lone surrogate",
    "--- \n---\nlicense: mit\n# heading | cell | `code` **bold** [x](https://evil.example)",
    "key: value #: 'a' \"b\" - * & ! % @ ` \t yes null ~",
]


# -- builders --


def histogram(rng: np.random.Generator, inside: np.ndarray, outside: np.ndarray) -> dict[str, Any]:
    edges = np.histogram_bin_edges(np.concatenate([inside, outside]), 20)
    return {
        "inside": float(inside.mean()),
        "outside": float(outside.mean()),
        "histogram": {
            "edges": [float(edge) for edge in edges],
            "inside": [int(n) for n in np.histogram(inside, edges)[0]],
            "outside": [int(n) for n in np.histogram(outside, edges)[0]],
        },
    }


def step(metric: str = "", rank: str = "", **further: Any) -> dict[str, Any]:
    """A step as the configuration dumps it: every key of its kind, None where unused."""
    if rank:
        empty = dict.fromkeys(["keep", "fraction", "count", "tokens", "by"]) | {"quotas": {}}
        return {"rank": rank, **empty, **further}
    return {"filter": metric, **dict.fromkeys(["min", "max", "within", "quantiles", "values"]), **further}


def make_content() -> dict[str, Any]:
    """The manifest content of a plausible subset: 805 of 8,052 pairs."""
    rng = np.random.default_rng(0)
    pvar = rng.beta(0.9, 2.2, 8052) * 0.25
    margin = 0.3 + 14 * pvar + rng.gamma(2.0, 0.35, 8052)
    chosen, rejected = rng.lognormal(5.3, 0.55, 8052), rng.lognormal(5.2, 0.6, 8052)
    columns = {
        "pvar": pvar,
        "margin": margin,
        "length_difference": chosen - rejected,
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "score_chosen": rng.normal(0.4, 1.0, 8052) + margin / 2,
        "score_rejected": rng.normal(0.4, 1.0, 8052) - margin / 2,
        "margin.verifier": rng.normal(0.2, 0.5, 8052) + margin / 9,
    }
    taken = np.zeros(8052, bool)
    taken[np.argsort(-pvar)[:805]] = True
    prompts = ["Prove that the square root of 2 is irrational.", "Write a haiku about rain.", "What does `zip` do?"]
    example = {"prompt_id": "0f" * 16, "prompt": prompts[0], "metrics": {"pvar": 0.01234, "margin": -0.31}}
    return {
        "name": "pvar-top",
        "kind": "preference pairs",
        "counts": {"into": 805, "out": 805, "dropped": {}},
        "summary": {
            "rows": 805,
            **{f"mean_{name}": float(values[taken].mean()) for name, values in columns.items() if "." not in name},
        },
        "subset": {
            "steps": [
                step("margin", min=0.0),
                step("length_difference", within=400.0),
                step(rank="pvar", keep="top", fraction=0.1),
            ],
            "seed": 0,
            "controls": ["random", "margin_matched"],
        },
        "explanation": {
            "description": "the top 10 % by pvar, after margin at least 0 and |length_difference| at most 400",
            "ranked_by": "pvar",
            "steps": [
                {
                    "step": "margin at least 0",
                    "into": 9187,
                    "out": 9011,
                    "dropped": {"margin below 0": 176},
                    "examples": {"margin below 0": [{**example, "prompt": prompt} for prompt in prompts]},
                },
                {
                    "step": "|length_difference| at most 400",
                    "into": 9011,
                    "out": 8052,
                    "dropped": {"length_difference above 400": 741, "length_difference below -400": 218},
                    "examples": {"length_difference above 400": [example]},
                },
                {
                    "step": "the top 10 % by pvar",
                    "into": 8052,
                    "out": 805,
                    "dropped": {"outside the top 10 %": 7240, "no pvar": 7},
                    "examples": {},
                },
            ],
            "metrics": {name: histogram(rng, values[taken], values[~taken]) for name, values in columns.items()},
            "sources": {
                "evol_instruct": {"inside": 190, "outside": 1311},
                "flan_v2_niv2": {"inside": 88, "outside": 2410},
                "sharegpt": {"inside": 301, "outside": 2120},
                "ultrachat": {"inside": 160, "outside": 1033},
                "truthful_qa": {"inside": 66, "outside": 373},
            },
            "length_correlation": 0.0312,
            "control": None,
        },
        "pairing": {
            "name": "main",
            "rule": "best_vs_worst",
            "generators": ["policy"],
            "scorer": "reward",
            "reward_scale": 0.874,
            "mean_reward": {"policy": 0.4123},
            "agreement": [
                {"scorers": ["reward", "verifier"], "kendall_tau": 0.612, "flipped": 0.1234, "prompts": 9187},
                {"scorers": ["reward", "judge"], "kendall_tau": 0.455, "flipped": 0.201, "prompts": 9187},
            ],
            "generator_delta": None,
        },
        "length_unit": "tokens",
        "funnel": [
            {"stage": "ingest", "into": 10021, "out": 9804, "dropped": {"empty prompt": 17, "duplicate": 200}},
            {"stage": "generate", "into": 9804, "out": 9790, "dropped": {"refused": 14}},
            {"stage": "score", "into": 78320, "out": 78300, "dropped": {"no reward": 20}},
            {"stage": "pair", "into": 9804, "out": 9187, "dropped": {"equal texts": 512, "tied rewards": 105}},
            {"stage": "subset", "into": 9187, "out": 805, "dropped": {"by its steps": 8382}},
        ],
        "parents": {
            "prompts": "5b" * 16,
            "samples": 8,
            "generators": {"policy": "77" * 16},
            "scorers": {"reward": "31" * 16},
            "pairs": "c0" * 16,
            "selection": "9a" * 16,
        },
        "made_with": {
            "77" * 16: {"engine": "vllm", "model": "Qwen/Qwen3-8B", "temperature": 0.8},
            "31" * 16: {"engine": "vllm", "model": "Skywork/Skywork-Reward-V2-Qwen3-4B"},
        },
    }


def make_row(
    rank: int, prompt: str = "What is 7 times 8?", chosen: str = "56", rejected: str = "54", **more: Any
) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "prompt_id": f"{rank:032x}",
        "source": "sharegpt",
        "score_chosen": 2.5 - rank / 40,
        "score_rejected": -1.25,
        "margin": 3.75 - rank / 40,
        "pvar": 0.2345 - rank / 4000,
        "rank": rank,
        "chosen_generator": "policy",
        "rejected_generator": "policy",
        "chosen_tokens": 211,
        "rejected_tokens": 187,
        "margin.verifier": 0.5,
        **more,
    }


def make_rows(n: int = 20, **further: Any) -> list[dict[str, Any]]:
    return [make_row(rank, **further) for rank in range(n)]


class Page(HTMLParser):
    """What a browser sees: the elements with their attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.lasttag != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.text += " " if tag in ("th", "td") else ""


def page_of(content: dict[str, Any], highest: Any = (), lowest: Any = ()) -> Page:
    return Page(report_html(content, list(highest), list(lowest)))


# -- the page --


def test_the_page_says_what_the_subset_is_and_its_numbers() -> None:
    text = page_of(make_content(), make_rows(), make_rows()).text
    for told in (
        "805 preference pairs: the top 10 % by pvar, after margin at least 0 and |length_difference| at most 400.",
        "8.8 % of 9,187",
        "0.1852",
        "r = +0.03",
        "no sign that the subset is one of longer answers",
        "78,320 in, 78,300 out",
        "flan_v2_niv2",
        "33.3 %",
        "0.612",
        "12.3 %",
        "T = 0.874",
        "First by pvar",
        "Qwen/Qwen3-8B",
        "fraction: 0.1",
    ):
        assert told in " ".join(text.split()), told


@pytest.mark.parametrize(
    ("steps", "kind", "title"),
    [
        ([step(rank="pvar", keep="bottom", fraction=0.1)], None, "First by pvar"),
        ([step(rank="pvar", fraction=0.5), step("margin", min=0.0)], None, "First by pvar"),
        ([step(rank="pvar", fraction=0.5), step(rank="random", count=9)], None, "First in order"),
        ([step(rank="pvar", fraction=0.5), step(rank="random", count=9)], "bottom", "First by pvar"),
        ([step(rank="pvar", fraction=0.5)], "random", "First in order"),
        ([step(rank="pvar", fraction=0.5)], "margin_matched", "First in order"),
        ([step("margin", min=0.0)], None, "First in order"),
    ],
)
def test_the_first_rows_are_not_called_the_highest(steps: list[Any], kind: str | None, title: str) -> None:
    content = make_content()
    content["subset"]["steps"] = steps
    content["explanation"]["control"] = {"of": "other", "kind": kind} if kind else None
    text = " ".join(page_of(content, make_rows(), make_rows()).text.split())
    assert title in text and "Highest" not in text


def test_samples_per_prompt_that_differ_are_not_called_one_number() -> None:
    content = make_content()
    assert "from 8 samples per prompt" in page_of(content).text
    content["funnel"][0]["stage"] = "import"
    assert "from up to 8 samples per prompt" in page_of(content).text
    content["adaptive"] = {"ladder": [3, 8, 24], "rounds": []}
    assert "from 3 to 24 samples per prompt" in page_of(content).text
    assert "from 3 to 24 samples per prompt" in dataset_card(PublishConfig(), content)


def test_every_stage_tells_what_went_in_what_came_out_and_each_reason() -> None:
    content = make_content()
    text = " ".join(page_of(content).text.split())
    for stage in (*content["funnel"], *content["explanation"]["steps"]):
        assert f"{stage['into']:,} in, {stage['out']:,} out" in text
        for reason, n in stage["dropped"].items():
            assert f"{n:,} {reason}" in text
    assert "Does not add up" not in text
    content["funnel"][1]["out"] -= 3
    assert "Does not add up" in page_of(content).text


@pytest.mark.parametrize("r, tone", [(0.02, "fine"), (-0.15, "notice"), (0.31, "warning"), (-0.31, "warning")])
def test_the_page_warns_of_a_subset_of_long_or_short_answers(r: float, tone: str) -> None:
    content = make_content()
    content["explanation"]["length_correlation"] = r
    page = page_of(content)
    boxes = [attrs["class"].split()[1] for tag, attrs in page.elements if attrs.get("class", "").startswith("says")]
    assert set(boxes) == {tone}
    assert f"r = {r:+.2f}" in page.text
    if tone != "fine":
        assert ("longer" if r > 0 else "shorter") in page.text
    assert ("**Warning.**" in dataset_card(PublishConfig(), content)) == (tone == "warning")


def test_the_outlines_of_a_histogram_are_as_high_as_the_shares() -> None:
    content = make_content()
    edges = [float(edge) for edge in range(21)]
    inside, outside = [0] * 20, [0] * 20
    inside[3], inside[4], outside[4] = 30, 10, 5
    content["explanation"]["metrics"] = {
        "pvar": {
            "inside": 3.75,
            "outside": 4.5,
            "histogram": {"edges": edges, "inside": inside, "outside": outside},
        }
    }
    page = page_of(content)
    paths = {
        attrs["class"]: attrs["d"] for tag, attrs in page.elements if tag == "path" and attrs["d"].startswith("M3")
    }
    heights = {side: [float(y) for y in re.findall(r"V([\d.]+)H", paths[side])] for side in ("inside", "outside")}
    floor, ceiling = max(heights["outside"]), min(heights["outside"])  # all outside pairs lie in one range: 100 %
    shares = [(floor - y) / (floor - ceiling) for y in heights["inside"]]
    assert shares == pytest.approx([n / 40 for n in inside], abs=0.002)
    assert "75.0 % of the pairs inside (30), 0.0 % of those outside (0)" in page.text


@pytest.mark.parametrize(
    "histogram",
    [
        None,
        {},
        {"edges": [], "inside": [], "outside": []},
        {"edges": [1.0] * 21, "inside": [0] * 20, "outside": [0] * 20},
        {"edges": [0.0, 1.0], "inside": [0], "outside": [0]},
        {"edges": [0.0, math.nan], "inside": [1], "outside": [1]},
        {"edges": [-1e308, 1e308], "inside": [1], "outside": [1]},
        {"edges": [0.0, 5e-324], "inside": [1], "outside": [1]},
    ],
)
def test_a_metric_without_anything_to_draw_keeps_its_means(histogram: dict[str, Any] | None) -> None:
    content = make_content()
    content["explanation"]["metrics"] = {"pvar": {"inside": 0.0625, "outside": None, "histogram": histogram}}
    page = page_of(content)
    assert "figure" not in [tag for tag, _ in page.elements]
    assert "0.0625" in page.text


@settings(max_examples=100, deadline=None)
@given(
    low=st.floats(-1e12, 1e12),
    width=st.floats(1e-6, 1e12),
    counts=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=30),
)
def test_every_mark_of_a_chart_lies_in_it(low: float, width: float, counts: list[tuple[int, int]]) -> None:
    edges = [float(edge) for edge in np.linspace(low, low + width, len(counts) + 1)]
    histogram = {"edges": edges, "inside": [n for n, _ in counts], "outside": [n for _, n in counts]}
    metrics = {"margin": {"inside": low - 1, "outside": low, "histogram": histogram}}
    page = page_of({"explanation": {"metrics": metrics}})
    for tag, attrs in page.elements:
        if tag == "line" or (tag == "rect" and attrs.get("class") == "touch"):
            places = [float(attrs[name]) for name in ("x", "x1", "x2", "y1", "y2") if name in attrs]
            assert all(0 <= place <= 340 for place in places)


def test_the_first_metrics_are_shown_and_the_others_folded() -> None:
    page = report_html(make_content(), [], [])
    shown, folded = page.split('<details class="fold"')[:2]
    assert shown.count("<figure>") == 5
    assert folded.count("<figure>") == 3 and "margin.verifier" in folded


def test_a_control_says_of_what_and_how_well_it_matches() -> None:
    content = make_content()
    assert "control of" not in page_of(content).text
    content["explanation"]["control"] = {
        "of": "pvar-top",
        "kind": "margin_matched",
        "matched_on": "margin",
        "target_mean": 2.1,
        "mean": 2.0,
        "close": 0.63,
    }
    words = "A control of pvar-top, matched on margin: mean margin 2 against 2.1 there; 63.0 %"
    assert words in page_of(content).text
    assert words in dataset_card(PublishConfig(), content)
    content["explanation"]["control"] = {"of": "pvar-top", "kind": "random"}
    assert "A control of pvar-top (random)." in page_of(content).text


def test_many_sources_become_twenty_and_the_rest() -> None:
    content = make_content()
    content["explanation"]["sources"] = {f"source {n}": {"inside": 1, "outside": n} for n in range(1000)}
    text = " ".join(page_of(content).text.split())
    assert "source 999" in text and "980 more 980 98.0 %" in text and "source 979" not in text


# -- what strangers wrote --


def spoil(value: Any, text: str) -> Any:
    """Every text of a manifest or a row becomes the hostile one; so do the names of sources, reasons and metrics."""
    if isinstance(value, dict):
        free = ("sources", "dropped", "examples", "metrics", "mean_reward", "made_with", "generators", "scorers")
        spoiled = {}
        for key, part in value.items():
            part = spoil(part, text)
            if key in free and isinstance(part, dict):
                part = {f"{name} {text}": entry for name, entry in part.items()}
            spoiled[key] = part
        return spoiled
    if isinstance(value, list):
        return [spoil(part, text) for part in value]
    return text if isinstance(value, str) else value


def assert_harmless(page: str) -> None:
    allowed = {
        "class",
        "id",
        "role",
        "href",
        "lang",
        "name",
        "content",
        "charset",
        "http-equiv",
        "open",
        "dir",
        "scope",
    }
    allowed |= {"tabindex", "focusable", "d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "viewbox"}
    allowed |= {"text-anchor", "aria-label", "aria-labelledby", "aria-hidden"}
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "use"}
    assert sum(tag == "style" for tag, _ in parsed.elements) == 1
    for tag, attrs in parsed.elements:
        assert set(attrs) <= allowed, (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        if tag == "meta" and "http-equiv" in attrs:
            assert attrs["content"].startswith("default-src 'none'")
    assert "url(" not in re.search(r"<style>(.*?)</style>", page, re.S).group(1)  # type: ignore[union-attr]
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page)
    page.encode("utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_only_texts(text: str) -> None:
    assert_harmless(report_html(make_content(), make_rows(), make_rows()))
    rows = [spoil(row, text) for row in make_rows(2)]
    content = spoil(make_content(), text)
    page = report_html(content, rows, rows)
    assert_harmless(page)
    shown = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    assert Page(page).text.count(shown) >= 12  # three texts in each of the four rows


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="<>&\"'/=- \n{}%#!sx", max_size=60))
def test_any_text_is_only_text(text: str) -> None:
    rows = [make_row(0, prompt=text, chosen=text, rejected=text, source=text)]
    metrics = {text: make_content()["explanation"]["metrics"]["pvar"]}
    step = {"step": text, "into": 9, "out": 2, "dropped": {text: 7}, "examples": {text: [{"prompt": text}]}}
    explanation = {"description": text, "sources": {text: {"inside": 1}}, "steps": [step], "metrics": metrics}
    assert_harmless(report_html({"name": text, "explanation": explanation}, rows, rows))


def test_long_texts_are_cut_and_said_to_be() -> None:
    text = "Lorem ipsum <b>dolor</b> " * 4_000
    rows = make_rows(prompt=text, chosen=text, rejected=text, source=text)
    rows[0]["prompt"] = [{"role": "user", "content": "x"}] * 50_000
    page = report_html(make_content(), rows, rows)
    assert "the text has 100,000 characters." in page
    assert "50,000 characters in 50,000 messages" in page
    assert len(page) < 20 * 2 * 3 * CUT * 2 + 400_000  # of a text at most CUT characters, some of them escaped

    huge = {"explanation": {"description": text, "steps": [{"step": text, "into": 1, "out": 0, "dropped": {text: 1}}]}}
    huge["explanation"]["sources"] = {f"{n} {text}": {"inside": 1, "outside": 1} for n in range(50)}
    assert len(report_html({**make_content(), **huge, "made_with": {"x": text}}, [], [])) < 100_000


def test_a_short_text_is_shown_whole() -> None:
    text = "y" * CUT
    page = page_of(make_content(), [make_row(0, chosen=text)]).text
    assert text in page and "Cut:" not in page


def without(value: Any) -> Iterator[Any]:
    """The manifest, each time with one entry None, missing or empty, however deep; of a list the first entry."""
    keys = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    for key in keys:
        changes = [None] if isinstance(value, dict) else []
        changes += [type(value[key])()] if isinstance(value[key], dict | list) else []
        for change in [*changes, *without(value[key])]:
            copied = copy.copy(value)
            copied[key] = change
            yield copied
        if isinstance(value, dict):
            yield {name: part for name, part in value.items() if name != key}


def test_what_is_not_known_is_left_out_of_page_and_card() -> None:
    content = make_content()
    content["explanation"]["control"] = {"of": "x", "kind": "margin_matched", "matched_on": "margin", "close": 0.5}
    content["explanation"]["metrics"] = {"pvar": content["explanation"]["metrics"]["pvar"]}
    content["pairing"]["generator_delta"] = {"stronger": "a", "weaker": "b", "delta": 1.0, "prompts": 9}
    poorer = [{}, *without(content)]
    assert len(poorer) > 250
    for poor in poorer:
        page = report_html(poor, [], [])
        assert page.endswith("</html>") and not re.search(r">\s*None\s*<", page)
        assert dataset_card(PublishConfig(), poor).startswith("---\nlicense: other\n")
    bare = page_of({}).text
    assert "None" not in bare and "nan" not in bare and "how they were selected is not recorded" in bare


def test_a_row_may_lack_anything() -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"prompt": None, "chosen": [], "rejected": [{}], "pvar": None, "margin": math.nan},
        {"prompt": "a plain text", "chosen": [{"role": None, "content": None}], "rejected": [{"content": ["a", 1]}]},
    ]
    page = page_of(make_content(), rows, rows)
    assert "a plain text" in page.text and "(no text)" in page.text


# -- the card --


@pytest.mark.parametrize("text", ["plain", *HOSTILE])
def test_the_hub_reads_the_card_whatever_the_names(text: str) -> None:
    content = spoil(make_content(), text)
    card = DatasetCard(dataset_card(PublishConfig(license=text), content))
    assert card.data.size_categories == ["n<1K"]
    assert card.data.task_categories == ["text-generation"]
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    again = yaml.safe_load(card.data.to_yaml())
    assert again == card.data.to_dict()
    assert card.data.license.split() == "".join(c if c.isprintable() else " " for c in text).split()
    body = Page(MarkdownIt("commonmark").enable("table").render(card.text))
    tags = [tag for tag, _ in body.elements]
    assert set(tags) <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert tags.count("h1") == 1 and tags.count("table") == 5


def test_the_card_carries_the_numbers_of_the_report() -> None:
    content = make_content()
    text = dataset_card(PublishConfig(license="mit"), content)
    metrics = content["explanation"]["metrics"]
    for line in (
        f"| pvar | {metrics['pvar']['inside']:.4g} | {metrics['pvar']['outside']:.4g} |",
        "| ingest | 10,021 | 9,804 | 17 empty prompt, 200 duplicate |",
        "| margin at least 0 | 9,187 | 9,011 | 176 margin below 0 |",
        "| sharegpt | 301 | 37.4 % | 29.3 % |",
        "| reward and verifier | 0.612 | 12.3 % | 9,187 |",
    ):
        assert line in text.splitlines(), line
    assert "r = +0.03" in text and "T = 0.874" in text and "`margin.verifier`" in text


def test_sizes_are_the_hubs_words() -> None:
    sizes = {0: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 99_999: "10K<n<100K", 10**6: "1M<n<10M", 10**8: "100M<n<1B"}
    assert {rows: size_category(rows) for rows in sizes} == sizes
    assert size_category(10**11) == "100B<n<1T" and size_category(10**12) == "n>1T"


@pytest.mark.parametrize(
    "steps, words",
    [
        ([], "all pairs"),
        ([step(rank="pvar", keep="top", fraction=0.1)], "the top 10 % by pvar"),
        ([step(rank="margin", keep="bottom", count=1711)], "the bottom 1,711 by margin"),
        ([step(rank="random", keep="top", count=711)], "a random 711 (seed 7)"),
        ([step(rank="random", keep="top", tokens=50_000)], "random pairs within 50,000 tokens (seed 7)"),
        ([step(rank="pvar", keep="top", tokens=50_000)], "the top pairs by pvar within 50,000 tokens"),
        ([step(rank="pvar", keep="top", fraction=0.25, by="source")], "the top 25 % by pvar within each source"),
        (
            [step(rank="pvar", keep="top", count=90, by="source", quotas={"math": 0.6, "code": 0.4})],
            "the top 90 by pvar (source: math 60 %, code 40 %)",
        ),
        ([step("margin", min=0.0)], "all pairs with margin at least 0"),
        (
            [
                step("margin", min=0.0),
                step("length_difference", within=100),
                step(rank="pvar", keep="top", fraction=0.1),
            ],
            "the top 10 % by pvar, after margin at least 0 and |length_difference| at most 100",
        ),
        (
            [
                step("margin", min=0.5, max=8),
                step(rank="random", keep="top", fraction=0.5),
                step("pvar", quantiles=[0.1, 0.9]),
                step(rank="pvar", keep="top", count=10),
                step("source", values=["math", "code"]),
            ],
            "the top 10 by pvar, after margin from 0.5 to 8, a random 50 % (seed 7) and pvar between its quantiles 0.1 "
            "and 0.9, then source math or code",
        ),
    ],
)
def test_a_subset_in_words(steps: list[dict[str, Any]], words: str) -> None:
    assert describe({"steps": steps, "seed": 7, "controls": []}) == words
