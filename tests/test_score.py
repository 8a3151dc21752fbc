"""score: rewards that are the model's own, aligned with the completions; and what happens when there are none."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.engines import ScoringRequest, reward_engine
from tasks.engines.chat import scored_ids
from tasks.engines.loop import EngineLoop, Refused
from tasks.engines.transformers import TransformersRewardModel
from tasks.errors import ConfigError, RunError
from tasks.generate import GenerateWorker, completions_path, generate
from tasks.ingest import ingest, read_shard, shards_of
from tasks.models import load_function, scorer_fingerprint
from tasks.records import REWARDS, Completions
from tasks.score import ScoreWorker, rewards_path, score
from tasks.sections import GenerateConfig, IngestConfig, ScoreConfig, ScorerConfig
from tasks.store import Store
from tests.conftest import (
    Curated,
    TinyModels,
    copy_store,
    curate_config,
    curate_stages,
    files_below,
    prompts,
    scorer,
    write_jsonl,
)


def configure(models: TinyModels, **changes: Any) -> ScorerConfig:
    return ScorerConfig.model_validate({"name": "tiny", "model": str(models.reward), **changes})


def ask(engine: Any, requests: Sequence[ScoringRequest]) -> list[float]:
    """Rewards in the order of the requests, all asked at once."""
    for key, wanted in enumerate(requests):
        engine.add(key, wanted)
    rewards: dict[int, float] = {}
    while len(rewards) < len(requests):
        rewards.update(engine.step())
    return [rewards[key] for key in range(len(requests))]


def function_scorer(path: Path, code: str, name: str = "f") -> ScorerConfig:
    path.write_text(code)
    return ScorerConfig(name=name, type="function", function=f"{path}:score")


def score_in_process(config: ScorerConfig, completions: Completions, store: Store) -> list[dict[str, Any]]:
    """A worker's counts for every file of completions, as an actor would make them."""
    worker = ScoreWorker(config, scorer_fingerprint(config, store), store.url, "test")
    items = [
        {
            "generator": generator,
            "shard": shard["digest"],
            "prompts": shard["prompts"],
            "first": 0,
            "last": completions.samples,
            "samples": shard["rows"] * completions.samples,
        }
        for generator in completions.generators.values()
        for shard in shards_of(store, completions.prompts)
    ]

    async def work() -> list[dict[str, Any]]:
        return [await worker.work(item) for item in items]

    return asyncio.run(work())


def rewards_of(config: ScorerConfig, completions: Completions, store: Store) -> list[dict[str, Any]]:
    """Rows of the rewards beside the rows of the completions and the prompts."""
    fingerprint, samples = scorer_fingerprint(config, store), (0, completions.samples)
    rows = []
    for generator in completions.generators.values():
        for shard in shards_of(store, completions.prompts):
            made = store.read_table(completions_path(generator, shard["prompts"], samples)).to_pylist()
            rated = shard["digest" if config.type == "function" else "prompts"]
            scored = store.read_table(rewards_path(fingerprint, generator, rated, samples))
            assert scored.schema.equals(REWARDS)
            for prompt, completion, reward in zip(
                read_shard(store, shard["digest"]).to_pylist(), made, scored.to_pylist(), strict=True
            ):
                assert prompt["prompt_id"] == completion["prompt_id"] == reward["prompt_id"]
                rows.append({**prompt, **completion, **reward})
    return rows


# --- the transformers engine against its own model


COMPLETIONS = ["", "a", "yes", "no no no", "a longer answer 123", "x" * 40]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_reward_is_the_logit_of_a_direct_forward_pass_whatever_the_batch(
    tiny_models: TinyModels, batch_size: int
) -> None:
    engine = TransformersRewardModel(configure(tiny_models, batch_size=batch_size), str(tiny_models.reward))
    requests = [ScoringRequest([{"role": "user", "content": "is it?"}], text) for text in COMPLETIONS]
    direct = []
    for request in requests:
        engine.text_config.pad_token_id = None
        ids = torch.tensor([scored_ids(engine.tokenizer, request.messages, request.completion)])
        with torch.no_grad():
            direct.append(engine.model(ids).logits[0, 0].item())
    assert ask(engine, requests) == pytest.approx(direct, abs=1e-5)
    assert len({round(reward, 3) for reward in direct}) == len(COMPLETIONS)


def test_a_reward_is_not_squeezed_by_a_sigmoid(tiny_models: TinyModels, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward)
    with torch.no_grad():
        model.score.weight.mul_(100)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_models.reward).save_pretrained(tmp_path)
    requests = [ScoringRequest([{"role": "user", "content": "is it?"}], text) for text in COMPLETIONS]
    plain = ask(TransformersRewardModel(configure(tiny_models), str(tiny_models.reward)), requests)
    large = ask(TransformersRewardModel(configure(tiny_models), str(tmp_path)), requests)
    assert max(map(abs, large)) > 1
    np.testing.assert_allclose(large, np.array(plain) * 100, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("padding", "template_end"), [("<eos>", "{{ eos_token }}"), ("<pad>", "{{ pad_token }}")])
def test_a_reward_is_read_at_the_last_token_even_if_padding_uses_the_same_one(
    tiny_models: TinyModels, tmp_path: Path, padding: str, template_end: str
) -> None:
    """Tokenizers without a padding token of their own pad with the end token, with which templates end."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_models.reward, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = padding
    tokenizer.chat_template = tokenizer.chat_template + template_end
    tokenizer.save_pretrained(tmp_path / "model")
    engine = TransformersRewardModel(configure(tiny_models), str(tmp_path / "model"))
    requests = [ScoringRequest([{"role": "user", "content": "is it?"}], text) for text in COMPLETIONS]
    last = []
    for request in requests:
        ids = scored_ids(engine.tokenizer, request.messages, request.completion)
        assert ids[-1] == engine.tokenizer.pad_token_id
        with torch.no_grad():
            hidden = engine.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            last.append(engine.model.score(hidden).item())
    assert ask(engine, requests) == pytest.approx(last, abs=1e-5)


def test_a_model_with_its_own_padding_token_is_read_as_it_reads_itself(tiny_models: TinyModels, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(tiny_models.reward, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 0}))
    engine = TransformersRewardModel(configure(tiny_models), str(tmp_path / "model"))
    requests = [ScoringRequest([{"role": "user", "content": "is it?"}], text) for text in COMPLETIONS]
    direct = []
    for request in requests:
        ids = torch.tensor([scored_ids(engine.tokenizer, request.messages, request.completion)])
        with torch.no_grad():
            direct.append(engine.model(ids).logits[0, 0].item())
    assert ask(engine, requests) == pytest.approx(direct, abs=1e-5)


def test_a_completion_that_is_too_long_has_no_reward_but_a_reason(tiny_models: TinyModels) -> None:
    config = configure(tiny_models, max_model_len=30)
    loop = EngineLoop(reward_engine(config, config.model))
    messages = [{"role": "user", "content": "hi"}]
    answers = loop.submit([ScoringRequest(messages, "short"), ScoringRequest(messages, "x" * 40)]).result(timeout=60)
    loop.close()
    assert isinstance(answers[0], float)
    assert answers[1] == Refused("too long: 49 tokens, the reward model takes 30")


def test_a_model_with_several_outputs_is_no_reward_model(tiny_models: TinyModels) -> None:
    import json
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tiny_models.generator, folder, dirs_exist_ok=True)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"0": "no", "1": "yes"}}))
        with pytest.raises(RunError, match=r"scorer 'tiny': .* has 2 outputs, not one"):
            TransformersRewardModel(configure(tiny_models), folder)


# --- through Ray


def test_a_stage_with_a_real_reward_model_writes_its_logits_and_asks_once_for_equal_texts(
    local_ray: Any, tiny_models: TinyModels, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    source = write_jsonl(tmp_path / "p.jsonl", prompts(6))
    prompt_set = ingest(IngestConfig(source=str(source), shard_size=4), store)
    # Two characters at most: equal texts are certain.
    config = GenerateConfig(
        samples=8, generators=[{"name": "g", "model": str(tiny_models.generator), "sampling": {"max_tokens": 1}}]
    )
    with_files(config, prompt_set, store)
    completions = generate(config, prompt_set, store)
    assert completions.work.engine_starts == 0
    # A name that is also that of a count: the two must not be mixed up.
    rewards = score(ScoreConfig(scorers=[configure(tiny_models, name="samples")], max_missing=0), completions, store)
    rows = rewards_of(configure(tiny_models), completions, store)
    different = sum(len(set(row["texts"])) for row in rows)
    assert rewards.counts.into == rewards.counts.out == 48
    assert (rewards.work.engine_starts, rewards.work.samples) == (1, 48)
    assert rewards.work.requests == different < 48
    engine = TransformersRewardModel(configure(tiny_models), str(tiny_models.reward))
    for row in rows:
        expected = ask(engine, [ScoringRequest(row["messages"], text) for text in row["texts"]])
        assert row["rewards"] == pytest.approx(expected, abs=1e-5)
        assert row["reasons"] == [None] * 8
        by_text = dict(zip(row["texts"], row["rewards"], strict=True))
        assert row["rewards"] == [by_text[text] for text in row["texts"]]


def with_files(config: GenerateConfig, prompt_set: Any, store: Store) -> None:
    """Make the completions in this process."""
    from tasks.models import generator_fingerprint

    for generator in config.generators:
        worker = GenerateWorker(generator, generator_fingerprint(generator, store), store.url, "test")
        for shard in shards_of(store, prompt_set):
            item = {"shard": shard["digest"], "prompts": shard["prompts"], "rows": shard["rows"]}
            asyncio.run(worker.work({**item, "part": "", "first": 0, "last": config.samples, "final": shard["rows"]}))


def test_a_reward_model_that_gives_nan_fails_and_its_successor_needs_no_new_completions(
    local_ray: Any, fake_run: Curated, tmp_path: Path
) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    broken = ScoreConfig(scorers=[ScorerConfig.model_validate(scorer("broken", engine_args={"nan": True}))])
    with pytest.raises(RunError) as caught:
        score(broken, fake_run.completions, store)
    message = str(caught.value)
    assert "rewards of scorer 'broken' are missing, more than max_missing 5%: not finite: nan" in message
    assert "The completions are kept; mend the scorer and run again." in message
    before = files_below(Path(store.url) / "completions")
    completions = generate(fake_run.config.generate, fake_run.prompts, store)
    assert (completions.work.engine_starts, completions.work.requests) == (0, 0)
    rewards = score(fake_run.config.score, completions, store)
    assert rewards.counts.into == rewards.counts.out == 320
    assert files_below(Path(store.url) / "completions") == before


# --- functions

VERIFIER = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Verdict:
    value: float

def score(prompt, text):
    assert prompt.messages[-1]["role"] == "user"
    return Verdict(prompt.fields.get("answer", 0) + len(text) + (prompt.source == "part1") / 2).value
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Completions, Store]:
    """Ten prompts with a kept column, two fake samples each."""
    folder = tmp_path_factory.mktemp("answered")
    store = Store(folder / "store")
    source = write_jsonl(folder / "p.jsonl", prompts(10))
    prompt_set = ingest(IngestConfig(source=str(source), shard_size=4, columns={"keep": ["answer"]}), store)
    config = GenerateConfig(samples=2, generators=[{"name": "g", "engine": "fake"}])
    with_files(config, prompt_set, store)
    return generate(config, prompt_set, store), store


def test_a_function_of_a_file_scores_with_the_prompts_columns(answered: Any, tmp_path: Path) -> None:
    completions, store = answered
    config = function_scorer(tmp_path / "verifier.py", VERIFIER)
    counts = score_in_process(config, completions, store)
    assert sum(count["samples"] for count in counts) == 20
    for i, row in enumerate(rewards_of(config, completions, store)):
        assert row["rewards"] == [2 * i + len(text) + (i % 2) / 2 for text in row["texts"]]
    rewards = score(ScoreConfig(scorers=[config]), completions, store)  # all there: nothing starts
    assert (rewards.counts.into, rewards.counts.out, rewards.work.engine_starts) == (20, 20, 0)


def test_a_function_of_a_module_is_found_by_its_name(
    answered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completions, store = answered
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "__init__.py").touch()
    (tmp_path / "checks" / "answers.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    config = ScorerConfig(name="m", type="function", function="checks.answers:score")
    score_in_process(config, completions, store)
    assert rewards_of(config, completions, store)[3]["rewards"][0] > 6
    for name in ("checks", "checks.answers"):
        sys.modules.pop(name, None)


HOSTILE = """
def score(prompt, text):
    kind = prompt.fields["answer"] // 2 % 7
    if kind == 0:
        raise ValueError("bad: \\ud800 text")
    if kind == 1:
        return float("nan")
    if kind == 2:
        return float("-inf")
    if kind == 3:
        return None
    if kind == 4:
        return 10**400
    if kind == 5:
        return "2.5"
    return True
"""


def test_a_function_that_gives_no_finite_number_gives_nulls_with_the_reason(
    answered: Any, tmp_path: Path, local_ray: Any
) -> None:
    completions, store = answered
    config = function_scorer(tmp_path / "hostile.py", HOSTILE)
    counts = score_in_process(config, completions, store)
    assert sum(count["missing"] for count in counts) == 16
    rows = rewards_of(config, completions, store)
    assert [row["rewards"][0] for row in rows] == [None] * 5 + [2.5, 1.0] + [None] * 3
    assert [row["reasons"][0].split(":")[0] for row in rows[:5]] == [
        "function raised ValueError",
        "not finite",
        "not finite",
        "function raised TypeError",
        "function raised OverflowError",
    ]
    assert all(row["reasons"] == [None, None] for row in rows[5:7])
    with pytest.raises(RunError, match="16 of 20 rewards of scorer 'f' are missing, more than max_missing 5%"):
        score(ScoreConfig(scorers=[config]), completions, store)
    rewards = score(ScoreConfig(scorers=[config], max_missing=0.8), completions, store)
    assert (rewards.counts.into, rewards.counts.out) == (20, 4)
    assert rewards.counts.dropped == {
        "f: function raised ValueError": 4,
        "f: not finite": 8,
        "f: function raised TypeError": 2,
        "f: function raised OverflowError": 2,
    }


def test_samples_that_another_run_made_are_not_counted(answered: Any, tmp_path: Path) -> None:
    completions, store = answered
    config = function_scorer(tmp_path / "verifier.py", VERIFIER)
    score_in_process(config, completions, store)
    one = generate(GenerateConfig(samples=1, generators=[{"name": "g", "engine": "fake"}]), completions.prompts, store)
    rewards = score(ScoreConfig(scorers=[config]), one, store)
    assert (rewards.counts.into, rewards.counts.out, rewards.work.samples) == (10, 10, 0)


def test_a_function_that_lacks_what_it_needs_leaves_no_rewards_and_works_when_that_is_there(
    fake_run: Curated, tmp_path: Path, local_ray: Any
) -> None:
    completions, store = fake_run.completions, copy_store(fake_run.store, tmp_path / "store")
    key = tmp_path / "answers.txt"
    config = function_scorer(tmp_path / "keyed.py", f"def score(prompt, text): return len(open({str(key)!r}).read())")
    with pytest.raises(RunError, match="missing, more than max_missing 5%: function raised FileNotFoundError"):
        score(ScoreConfig(scorers=[config]), completions, store)
    key.write_text("abc")
    rewards = score(ScoreConfig(scorers=[config]), completions, store)
    assert rewards.counts.out == rewards.counts.into == 320


def test_rewards_that_are_asked_for_again_reach_the_pairs(local_ray: Any, store: Store, tmp_path: Path) -> None:
    key = tmp_path / "ready"
    code = (
        "import os\n"
        "def score(prompt, text):\n"
        f"    if prompt.fields['answer'] < 10 and not os.path.exists({str(key)!r}):\n"
        "        raise OSError('not ready')\n"
        "    return len(text)\n"
    )
    scorer = function_scorer(tmp_path / "late.py", code).model_dump(exclude_unset=True)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(40))
    ingested = {"source": str(source), "columns": {"keep": ["answer"]}}

    def curated(max_missing: float) -> Curated:
        wanted = {"scorers": [scorer], "max_missing": max_missing}
        return curate_stages(curate_config(source, ingest=ingested, score=wanted), store)

    before = curated(0.5)
    assert before.rewards.counts.dropped and before.pairs[0].counts.dropped["fewer than two rewards"] == 5
    with pytest.raises(RunError, match="mend the scorer and run again"):
        curated(0)
    key.touch()
    after = curated(0.5)
    assert not after.rewards.counts.dropped and "fewer than two rewards" not in after.pairs[0].counts.dropped
    assert after.pairs[0].counts.into == before.pairs[0].counts.into


@pytest.mark.parametrize(
    ("code", "function", "words"),
    [
        (None, "absent.py:score", "no module or file 'absent.py'; check the path"),
        (None, "absent.module:score", "no module or file 'absent.module'"),
        (None, "sys:exit", "no module or file"),
        (None, ":score", "no module or file ''"),
        ("x = 1\n", "{file}:score", "has no function 'score'"),
        ("score = 1\n", "{file}:score", "has no function 'score'"),
        ("def score(:\n", "{file}:score", "cannot be imported: SyntaxError"),
        ("import not_there\n", "{file}:score", "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_mistake_in_the_configuration(
    code: str | None, function: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "scorer.py"
    if code:
        path.write_text(code)
    config = ScorerConfig(name="f", type="function", function=function.format(file=path))
    with pytest.raises(ConfigError) as caught:
        load_function(config)
    assert str(caught.value).startswith(f"score: function {config.function!r}: ")
    assert words in str(caught.value)


def test_a_changed_function_is_another_scorer(tmp_path: Path, store: Store) -> None:
    config = function_scorer(tmp_path / "v.py", "def score(p, t): return 1\n")
    before = scorer_fingerprint(config, store)
    assert scorer_fingerprint(config.model_copy(update={"name": "other", "workers": 4}), store) == before
    function_scorer(tmp_path / "v.py", "def score(p, t): return 2\n")
    assert scorer_fingerprint(config, store) != before


def test_the_fake_reward_model_takes_any_text() -> None:
    engine = reward_engine(ScorerConfig.model_validate(scorer()), "")
    texts = ["[1.5] fine", "[", "[]", "[x] odd", "[-2", "", "plain"]
    rewards = ask(engine, [ScoringRequest([{"role": "user", "content": "x"}], text) for text in texts])
    assert all(math.isfinite(reward) for reward in rewards)
    assert rewards[0] == pytest.approx(1.5, abs=0.5)
    assert ask(engine, [ScoringRequest([], texts[0])]) == rewards[:1]
