"""What people read of a selection: dry runs, reports, `show`, and why a prompt's pair is in or out."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.markdown import Markdown

from flows import markdown
from flows.cli import load_values, main, parse
from flows.doctor import plan
from flows.explained import cut, plain, table
from flows.shelf import list_subsets, show_subset
from flows.why import why
from tasks.config import CurateConfig
from tasks.errors import ConfigError, RunError
from tasks.explain import overlap
from tasks.imports import import_
from tasks.pair import pair
from tasks.publish import publish
from tasks.records import Pairs, Selection, Version, digest
from tasks.store import Store
from tasks.subset import subset
from tests.conftest import NO_COST, copy_store, write_jsonl
from tests.services import ROOT


@dataclass(frozen=True)
class Run:
    config: CurateConfig
    store: Store
    pairs: list[Pairs]
    selections: list[Selection]
    versions: dict[str, Version]


def run(config: CurateConfig, store: Store) -> Run:
    """curate on imported data, as plain functions."""
    assert config.import_
    rewards = import_(config.import_, store)
    tables = {rule.name: pair(rule, rewards, store, ensembles=config.ensembles) for rule in config.pair}
    selections = [
        taken
        for wanted in config.subset
        for taken in subset(wanted, tables[wanted.pairs or config.pair[0].name], store)
    ]
    versions = [
        publish(config.publish, wanted, taken, store)
        for wanted, taken in zip(config.subset_of_each_name(), selections, strict=True)
    ]
    return Run(config, store, list(tables.values()), selections, {version.name: version for version in versions})


def shipped(name: str) -> CurateConfig:
    path = ROOT / "configs" / "import" / name
    values = load_values(path, [], "")
    values["import"]["source"] = str(ROOT / values["import"]["source"])
    config = parse("curate", values, path)
    assert isinstance(config, CurateConfig)
    return config


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The shipped recipe for rated completions on the shipped example; read it only."""
    return run(shipped("long.yaml"), Store(tmp_path_factory.mktemp("long") / "store"))


def on_screen(text: str) -> str:
    """As a terminal of 120 columns shows it."""
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(Markdown(text))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown, "a table was squeezed"
    return shown


def rows_of(run: Run, name: str) -> list[dict[str, Any]]:
    """Published rows in order of their rank."""
    folder = Path(run.store.full(run.versions[name].place)) / "data"
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["rank"])


# --- dry runs


@pytest.mark.parametrize("name", ["long.yaml", "nested.yaml", "pairs.yaml"])
def test_a_dry_run_of_an_import_explains_every_subset_and_writes_nothing(name: str, tmp_path: Path) -> None:
    config = shipped(name).model_copy(update={"store": str(tmp_path / "store")})
    result = plan(config)
    json.dumps(result, allow_nan=False)
    assert not (tmp_path / "store").exists()
    shown = on_screen(markdown.plan_markdown(result))
    for pairing in result["pairings"]:
        assert f"{pairing['name']}: {pairing['into']} in, {pairing['out']} out" in shown
        assert "2 identical texts" in shown
    for made in result["subsets"]:
        assert made["name"] in shown
    for wanted in config.subset:
        assert f"{wanted.name}: " in shown
        for control in wanted.controls:
            assert f"control: {control.replace('_', ' ')}" in shown
    assert "Nothing was written." in shown


def test_a_dry_run_shows_steps_examples_means_length_controls_agreement_and_delta(long: Run) -> None:
    result = plan(long.config.model_copy(update={"store": long.store.url}))
    shown = on_screen(markdown.plan_markdown(result))
    for words in (
        "|length_difference| at most 12: 22 in, 21 out",
        "1 length_difference too low",
        "13 outside the top 40 % by pvar",
        "A box holds 45 eggs.",
        "Being selected correlates with the difference in length",
        "A control of pvar-top, matched on margin: mean margin 8.5 against 8.625 there",
        "correctness and style  0.6476",
        "Mean reward of large minus tiny: 6.958 ± 0.5089 over 24",
        "Prompts in common",
    ):
        assert words in shown, words
    means = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["pvar"])
    [top] = [made for made in result["subsets"] if made["name"] == "pvar-top"]
    metric = top["explanation"]["metrics"]["pvar"]
    assert [float(value) for value in means[1:3]] == pytest.approx([metric["inside"], metric["outside"]], rel=1e-3)
    assert len(means) == 6  # inside, outside, and three controls


# --- the report of a run, and show


def test_the_report_of_a_run_says_what_each_subset_takes_shares_and_drops(long: Run) -> None:
    from flows import reporting

    rows = [reporting.stage_row(f"subset {taken.name}", taken.counts, taken.work) for taken in long.selections]
    report = {
        "store": long.store.url,
        "subsets": [reporting.subset_row(long.store, version) for version in long.versions.values()],
        "overlap": overlap(long.selections, long.store),
        "stages": rows,
        "cost": NO_COST,
    }
    shown = on_screen(markdown.curate_markdown(report))
    for version in long.versions.values():
        assert f"{version.name}" in shown and version.version in shown
    assert "the margin-matched control of pvar-top" in shown
    for taken in long.selections:
        assert f"subset {taken.name}: {taken.counts.into} in, {taken.counts.out} out" in shown
        for reason, n in taken.counts.dropped.items():
            assert f"{n} {reason}" in shown
    sharing = sum(row["shared"] > 0 for row in report["overlap"])
    assert len([line for line in shown.splitlines() if re.search(r"\d  +\d+\.\d %", line)]) == 20  # of 28, the largest
    assert f"Combinations of two subsets that share less: {sharing - 20}." in shown


def test_show_explains_a_subset_and_what_it_shares_with_the_others(long: Run) -> None:
    result = show_subset(long.store, "pvar-top")
    json.dumps(result, allow_nan=False)
    mine = {row["prompt_id"] for row in rows_of(long, "pvar-top")}
    for row in result["overlap"]:
        name = row["other"].partition("@")[0]
        other = {row["prompt_id"] for row in rows_of(long, name)}
        assert row["shared"] == len(mine & other)
        assert row["of_smaller"] == pytest.approx(len(mine & other) / min(len(mine), len(other)), abs=1e-6)
    assert len(result["overlap"]) == len(long.versions) - 1
    shown = on_screen(markdown.show_markdown(result))
    for words in ("the top 40 % by pvar", "13 outside the top 40 % by pvar", "import: 96 in, 96 out", "no sign that"):
        assert words in shown
    assert f"delta@{long.versions['delta'].version}" in shown


def test_show_of_a_control_says_how_well_it_matches(long: Run) -> None:
    shown = on_screen(markdown.show_markdown(show_subset(long.store, "pvar-top-margin-matched")))
    assert "87.5 % of its pairs are close matches" in shown


def test_a_damaged_subset_does_not_keep_others_from_being_shown(long: Run, tmp_path: Path) -> None:
    store = copy_store(long.store, tmp_path / "store")
    Path(store.full(f"{long.versions['delta'].place}/manifest.json")).write_bytes(b"{")
    result = show_subset(store, "agreed")
    assert [row["other"] for row in result["overlap"] if row["shared"] is None] == ["delta"]
    assert "delta: not known: " in on_screen(markdown.show_markdown(result))


def test_a_subset_published_without_an_explanation_is_shown_by_its_numbers(long: Run) -> None:
    result = show_subset(long.store, "agreed")
    del result["manifest"]["content"]["explanation"]
    shown = on_screen(markdown.show_markdown(result))
    assert "subset: 22 in, 6 out" in shown
    assert "the top 6 by margin" in shown


def test_the_list_of_subsets_fits_a_terminal(long: Run) -> None:
    shown = on_screen(markdown.subsets_markdown(list_subsets(long.store)))
    for version in long.versions.values():
        assert version.version in shown


# --- why is a pair in or out


def test_a_pair_that_was_taken_has_its_rank_and_numbers(long: Run) -> None:
    for name in long.versions:
        for row in rows_of(long, name):
            result = why(long.store, name, row["prompt_id"][:8])
            [found] = result["pairs"]
            assert (found["taken"], found["rank"], result["prompt_id"]) == (True, row["rank"], row["prompt_id"])
            assert result["dropped"] is None
            for metric in ("pvar", "margin", "length_difference", "chosen_tokens", "margin.style"):
                assert found["metrics"][metric] == row[metric]
            assert result["texts"]["prompt"] == row["prompt"][0]["content"]
            assert result["texts"]["chosen"] == row["chosen"][0]["content"]
            assert result["texts"]["rejected"] == row["rejected"][0]["content"]
    shown = on_screen(markdown.why_markdown(why(long.store, "pvar-top", rows_of(long, "pvar-top")[0]["prompt_id"])))
    assert "Taken: at place 1 of 8 by pvar" in shown


def test_a_pair_that_was_left_out_has_the_step_and_the_reason(long: Run) -> None:
    [egg] = [
        example["prompt_id"]
        for made in plan(long.config.model_copy(update={"store": long.store.url}))["subsets"][:1]
        for reason, examples in made["explanation"]["steps"][0]["examples"].items()
        for example in examples
    ]
    result = why(long.store, "pvar-top", egg)
    json.dumps(result, allow_nan=False)
    assert result["pairs"][0]["step"] == "|length_difference| at most 12"
    assert result["pairs"][0]["reason"] == "length_difference too low (|length_difference| at most 12)"
    assert result["pairs"][0]["metrics"]["length_difference"] == -22
    assert "Left out, at the step |length_difference| at most 12: length_difference too low (" in on_screen(
        markdown.why_markdown(result)
    )


def test_every_prompt_has_exactly_the_fates_that_the_counts_tell(long: Run) -> None:
    """All prompts of the source, asked one by one, add up to what the subset's steps say."""
    ids = {
        digest([{"role": "user", "content": json.loads(line)["prompt"]}])
        for line in (ROOT / "examples" / "imports" / "long.jsonl").read_text().splitlines()
    }
    results = [why(long.store, "agreed", prompt_id) for prompt_id in ids]
    assert sum(bool(result["dropped"]) for result in results) == 2
    found = [found for result in results for found in result["pairs"]]
    assert sum(pair["taken"] for pair in found) == 6
    assert sum(pair["step"] == "flipped.style at most 0.34" for pair in found) == 4
    assert len(found) == 22


def test_a_prompt_without_a_pair_has_the_reason_of_the_pairing(long: Run) -> None:
    drops = long.store.read_table(f"pairs/{long.pairs[0].digest}/drops.parquet").to_pylist()
    result = why(long.store, "pvar-top", drops[0]["prompt_id"].upper()[:12])
    assert (result["pairs"], result["dropped"]["reason"]) == ([], "identical texts")
    assert "No pair was made of it: identical texts (its pvar: 0)" in on_screen(markdown.why_markdown(result))


@pytest.mark.parametrize(
    ("row", "words"),
    [("abc", "give at least 8 characters"), ("00000000", "no prompt of which pvar-top@"), ("%_*?[]{}", "no prompt")],
)
def test_a_prompt_that_is_too_short_or_unknown_is_said_so(row: str, words: str, long: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        why(long.store, "pvar-top", row)
    assert words in str(caught.value)
    assert repr(row) in str(caught.value)


def test_a_store_without_the_table_of_pairs_is_said_so(long: Run, tmp_path: Path) -> None:
    store = copy_store(long.store, tmp_path / "store")
    shutil.rmtree(store.full("pairs"))
    with pytest.raises(RunError, match=r"pairs/.*is not in .*run curate again"):
        why(store, "pvar-top", "9567707c")


def test_a_prompt_with_several_labelled_pairs_has_a_fate_for_each(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": f"{'good ' * (i + 1)}", "rejected": "bad"} for i in range(3)]
    rows.append({"prompt": "p", "chosen": "same", "rejected": "same"})
    config = labelled(write_jsonl(tmp_path / "pairs.jsonl", rows), {"filter": "chosen_tokens", "min": 2})
    made = run(config, Store(tmp_path / "store"))
    result = why(made.store, "s", digest([{"role": "user", "content": "p"}]))
    assert [found["taken"] for found in result["pairs"]] == [False, True, True]
    assert result["dropped"]["reason"] == "identical texts"
    shown = on_screen(markdown.why_markdown(result))
    assert "Another of its candidates was no pair: identical texts." in shown


def test_a_beginning_that_two_prompts_share_is_ambiguous(tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    for i in range(1_000_000):  # about 80,000 are needed for two digests that agree in 32 bits
        prompt_id = digest([{"role": "user", "content": str(i)}])
        if prompt_id[:8] in seen:
            break
        seen[prompt_id[:8]] = str(i)
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in (seen[prompt_id[:8]], str(i))]
    config = labelled(write_jsonl(tmp_path / "pairs.jsonl", rows), {"rank": "random", "count": 2})
    made = run(config, Store(tmp_path / "store"))
    with pytest.raises(ConfigError, match=f"ambiguous.*{prompt_id}"):
        why(made.store, "s", prompt_id[:8])
    assert why(made.store, "s", prompt_id)["prompt_id"] == prompt_id


def labelled(source: Path, step: dict[str, Any]) -> CurateConfig:
    values = {
        "import": {"source": str(source)},
        "pair": [{"rule": "labelled"}],
        "subset": [{"name": "s", "steps": [step]}],
    }
    return CurateConfig.model_validate(values)


def test_the_command_prints_json_or_text_and_status_2_for_an_unknown_prompt(
    long: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prefsieve", "show", "pvar-top", "--store", long.store.url, *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, capsys.readouterr().out

    first = rows_of(long, "pvar-top")[0]["prompt_id"]
    status, out = show("--row", first[:8], "--json")
    assert (status, json.loads(out)["pairs"][0]["rank"]) == (0, 0)
    assert "Taken" in show("--row", first)[1]
    assert show("--row", "00000000", "--json") == (2, "")


# --- texts of strangers


def test_texts_are_shown_as_they_are_and_not_read_as_markdown(tmp_path: Path) -> None:
    hostile = (
        "# head | cell `code` **bold** [x](https://evil.example) <b>b</b> &amp; _u_ a_b ![i](https://evil.example)"
    )
    rows = [{"prompt": hostile, "chosen": hostile + str(i), "rejected": "| no |", "source": hostile} for i in range(3)]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = labelled(source, {"rank": "random", "count": 1})
    made = run(config, Store(tmp_path / "store"))
    wide = Console(width=400, file=io.StringIO(), color_system=None)
    for text in (
        markdown.show_markdown(show_subset(made.store, "s")),
        markdown.why_markdown(why(made.store, "s", digest([{"role": "user", "content": hostile}]))),
    ):
        wide.print(Markdown(text))
    shown = wide.file.getvalue()  # type: ignore[attr-defined]
    assert cut(hostile) in shown
    assert hostile + "0" in shown
    assert "| no |" in shown


def test_escaped_names_stand_in_a_cell_as_they_are() -> None:
    wide = Console(width=200, file=io.StringIO(), color_system=None)
    wide.print(Markdown("\n".join(table([{"name": plain("a|b_c *d*")}, {"name": "x|y"}]))))
    shown = wide.file.getvalue()  # type: ignore[attr-defined]
    assert "a|b_c *d*" in shown
    assert "x|y" in shown


def test_every_recipe_for_imports_runs_to_the_end(tmp_path: Path) -> None:
    for name in ("nested.yaml", "pairs.yaml"):
        made = run(shipped(name), Store(tmp_path / name))
        assert set(made.versions) == {n for wanted in made.config.subset for n in wanted.names()}
