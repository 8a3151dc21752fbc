"""Engines that raise, hang or crash, at one prompt or at all: the others are answered, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.config import CurateConfig
from tasks.engines.loop import EngineLoop
from tasks.engines.loop import _name as name_of
from tasks.errors import RunError
from tasks.faults import EngineDied, Faults
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.records import Completions
from tasks.score import score
from tasks.sections import ScoreConfig, ScorerConfig
from tasks.store import Store
from tests.conftest import Curated, curate_config, curate_stages, prompts, scorer, write_jsonl
from tests.conftest import generator as fake

BAD = "what is 13 plus 13"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and where the file of faults is looked for."""
    folder = tmp_path_factory.mktemp("engines")
    write_jsonl(folder / "prompts.jsonl", prompts(24))
    return folder


@pytest.fixture
def faults(place: Path) -> Iterator[Path]:
    yield place / "faults.json"
    for file in place.glob("faults.json*"):
        file.unlink()


def config(place: Path, deadline: float = 60, start_deadline: float = 60) -> CurateConfig:
    args = {
        "engine_args": {"faults": str(place / "faults.json")},
        "deadline": deadline,
        "start_deadline": start_deadline,
    }
    return curate_config(
        place / "prompts.jsonl",
        ingest={"source": str(place / "prompts.jsonl"), "shard_size": 8},
        generate={"samples": 2, "generators": [fake(**args)], "max_refused": 0.1},
        score={"scorers": [scorer(**args)], "max_missing": 0.1},
    )


@pytest.fixture(scope="module")
def undisturbed(local_ray: Any, place: Path) -> Curated:
    return curate_stages(config(place), Store(place / "undisturbed"))


def texts(completions: Completions, store: Store) -> dict[str, list[str]]:
    """By prompt id."""
    (fingerprint,) = completions.generators.values()
    rows = [row for path in store.list(f"completions/{fingerprint}") for row in store.read_table(path).to_pylist()]
    return {row["prompt_id"]: row["texts"] for row in rows}


@pytest.mark.parametrize("what", ["raise", "hang", "exit"])
def test_a_prompt_that_an_engine_dies_over_is_refused_and_all_others_are_answered(
    what: str, undisturbed: Curated, place: Path, faults: Path, store: Store
) -> None:
    faults.write_text(json.dumps({BAD: what}))
    wanted = config(place, deadline=3)
    prompt_set = ingest(wanted.ingest, store)
    completions = generate(wanted.generate, prompt_set, store)
    assert completions.counts.dropped == {"refused: engine died": 1}
    assert completions.counts.out == 23
    found, expected = texts(completions, store), texts(undisturbed.completions, undisturbed.store)
    assert [found[key] == expected[key] for key in expected].count(False) == 1
    assert sorted(map(len, found.values()))[:2] == [0, 2]
    again = generate(wanted.generate, prompt_set, store)
    assert again.work.engine_starts == 0


@pytest.mark.parametrize("what", ["raise once", "exit once"])
def test_an_engine_that_dies_once_leaves_no_trace_in_what_is_published(
    what: str, undisturbed: Curated, place: Path, faults: Path, store: Store
) -> None:
    faults.write_text(json.dumps({BAD: what}))
    ran = curate_stages(config(place), store)
    assert list(map(str, ran.versions)) == list(map(str, undisturbed.versions))
    assert ran.completions.counts == undisturbed.completions.counts
    assert store.list("faults") == []


@pytest.mark.parametrize("what", ["raise", "exit"])
def test_a_prompt_that_a_reward_model_dies_over_has_no_rewards_but_a_reason(
    what: str, undisturbed: Curated, place: Path, faults: Path, store: Store
) -> None:
    wanted = config(place)
    completions = generate(wanted.generate, ingest(wanted.ingest, store), store)
    faults.write_text(json.dumps({BAD: what}))
    rewards = score(wanted.score, completions, store)
    assert rewards.counts.dropped == {"reward: engine died": 2}
    assert rewards.counts.out == 46


@pytest.mark.parametrize(
    ("part", "what", "said", "within"),
    [
        ("start", "raise", r"did not start: RuntimeError: made to fail at 'start' \(its log: \S+\.err\)", 60),
        (
            "start",
            "exit",
            r"""did not start: 2 processes .* line of \S+\.err is "made to end at 'start'\"""",
            60,
        ),
        ("start", "hang", r"did not start: it was not ready after 2 s", 60),
        ("", "raise", "one request after the other, the last time: RuntimeError: made to fail", 120),
        ("", "exit", "one request after the other, the last time: 2 processes ended at it", 240),
    ],
    ids=["start raises", "start ends its process", "start hangs", "every request raises", "every request ends it"],
)
def test_an_engine_that_does_nothing_else_but_fail_ends_the_run_with_its_words(
    part: str, what: str, said: str, within: float, local_ray: Any, place: Path, faults: Path, store: Store
) -> None:
    faults.write_text(json.dumps({part: what}))
    wanted = config(place, start_deadline=2)
    prompt_set = ingest(wanted.ingest, store)
    began = time.monotonic()
    with pytest.raises(RunError, match=said):
        generate(wanted.generate, prompt_set, store)
    assert time.monotonic() - began < within
    assert store.list("completions") == []
    assert [note for note in store.list("faults") if "/start." in note] == []


def test_engines_that_are_asked_the_same_at_once_are_not_blamed_for_each_other(
    local_ray: Any, place: Path, faults: Path, store: Store
) -> None:
    wanted = config(place)
    completions = generate(wanted.generate, ingest(wanted.ingest, store), store)
    faults.write_text(json.dumps({"": "sleep 0.2"}))
    args = {"engine_args": {"faults": str(faults)}}
    names = ["one", "two", "three", "four"]
    rewards = score(
        ScoreConfig(scorers=[ScorerConfig(**scorer(name, **args, cpus=0.5)) for name in names]), completions, store
    )
    assert rewards.counts.dropped == {}
    assert rewards.work.retries == 0


class Slow:
    """An engine that takes its time to take a request in."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def add(self, key: int, request: str) -> None:
        time.sleep(0.7)
        self.asked.append(key)

    def step(self) -> list[Any]:
        done, self.asked = [(key, "x") for key in self.asked], []
        return done

    def close(self) -> None:
        pass


def test_an_engine_that_had_nothing_to_do_for_long_is_not_taken_for_hung() -> None:
    loop = EngineLoop(Slow(), deadline=1.5)
    time.sleep(2)
    assert asyncio.run(loop.answers(["a", "b", "c"])) == ["x", "x", "x"]


class Broken:
    """An engine that raises at whatever it is asked."""

    def add(self, key: int, request: str) -> None:
        pass

    def step(self) -> list[Any]:
        raise RuntimeError("made to fail")

    def close(self) -> None:
        pass


def test_a_request_that_was_not_asked_is_not_blamed_for_what_the_one_before_did(store: Store) -> None:
    faults = Faults(store, "run")
    for batch in (["a", "b"], ["c", "d"]):
        Faults(store, "run").begin(name_of(batch))  # as a process that died over it

    async def ask() -> list[Any]:
        loop = EngineLoop(Broken(), faults)
        return await asyncio.gather(loop.answers(["a", "b"]), loop.answers(["c", "d"]), return_exceptions=True)

    assert [type(ended) for ended in asyncio.run(ask())] == [EngineDied, EngineDied]
    blamed = [request for request in "abcd" if any(name_of([request]) in note for note in store.list("faults/run"))]
    assert len(blamed) == 1


class Picky:
    """An engine that dies over one request, after a moment, and answers with what it is asked."""

    def __init__(self, dies_over: str, closes: bool = True) -> None:
        self.dies_over, self.closes, self.asked = dies_over, closes, dict[int, str]()

    def add(self, key: int, request: str) -> None:
        self.asked[key] = request

    def step(self) -> list[tuple[int, str]]:
        time.sleep(0.3)
        if self.dies_over in self.asked.values():
            raise RuntimeError(f"made to fail at {self.dies_over!r}")
        answers, self.asked = list(self.asked.items()), {}
        return answers

    def close(self) -> None:
        if not self.closes:
            raise RuntimeError("failed once more")


def test_what_is_asked_alone_is_asked_with_nothing_beside_it(store: Store) -> None:
    """Not what is handed in just before either: of two shards with notes, one without comes between."""
    for batch in (["d"], ["b"]):
        Faults(store, "run").begin(name_of(batch))

    async def ask() -> list[Any]:
        loop = EngineLoop(Picky("c"), Faults(store, "run"))

        async def handed_in(one: str, after: float) -> list[Any]:
            await asyncio.sleep(after)
            return await loop.answers([one])

        one_by_one = (handed_in(one, 0.1 * number) for number, one in enumerate("dcb"))
        return await asyncio.gather(*one_by_one, return_exceptions=True)

    alone, died, _ = asyncio.run(ask())
    assert alone == ["d"]
    assert isinstance(died, EngineDied)
    assert [note for note in store.list("faults/run") if "refused" in note] == []


def test_an_engine_that_cannot_even_be_closed_is_told_at_once_with_its_first_words(store: Store) -> None:
    loop = EngineLoop(Picky("a", closes=False), Faults(store, "run"), deadline=20)
    began = time.monotonic()
    with pytest.raises(EngineDied, match="made to fail at 'a'"):
        asyncio.run(loop.answers(["a"]))
    assert time.monotonic() - began < 10


def test_what_living_engines_are_asked_is_not_held_against_them(store: Store, monkeypatch: Any) -> None:
    """The same by other actors, more than once by one, and nothing at all."""
    monkeypatch.setattr("tasks.faults._actor", iter(["first", "second"]).__next__)
    there, here = Faults(store, "run"), Faults(store, "run")
    there.begin(name_of(["a"]))
    loop = EngineLoop(Picky("b"), here)

    async def ask() -> list[Any]:
        return await asyncio.gather(loop.answers(["a"]), loop.answers(["a"]), loop.answers([]), loop.answers([]))

    assert asyncio.run(ask()) == [["a"], ["a"], [], []]
    assert loop.retries() == 0
    assert len(store.list("faults/run")) == 1
