"""TinyWorld keeps its promises: a calibrated mixture, three strengths, a useful reward model, a quick cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from examples.tinyworld import task
from examples.tinyworld.build import MODELS, Recipe, build, is_complete
from examples.tinyworld.tokenizer import make_tokenizer, render
from examples.tinyworld.verifier import score
from tests.tinyworld_fixture import REPOSITORY, tinyworld  # noqa: F401 (a fixture)

SAMPLES = 8
Sampled = dict[str, list[list[str]]]
pytestmark = pytest.mark.timeout(1800)  # the first test may build the world


@dataclass
class FakePrompt:
    messages: list[dict[str, str]]
    fields: dict[str, Any]


def prompt(answer: str) -> FakePrompt:
    return FakePrompt(
        [{"role": "user", "content": f"flip {answer[::-1]}"}], {"answer": answer, "difficulty": len(answer)}
    )


def read(folder: Path, name: str) -> list[task.Item]:
    return [task.Item(**json.loads(line)) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def items(tinyworld: Path) -> list[task.Item]:  # noqa: F811
    return read(tinyworld, "heldout.jsonl")[:300]


@pytest.fixture(scope="module")
def sampled(tinyworld: Path, items: list[task.Item]) -> Sampled:  # noqa: F811
    """Eight completions of 300 held-out prompts by every generator as it lies on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.tinyworld.generators import sample

    def draw(name: str) -> list[list[str]]:
        model = AutoModelForCausalLM.from_pretrained(tinyworld / name)
        tokenizer = AutoTokenizer.from_pretrained(tinyworld / name)
        return sample(model, tokenizer, [item.prompt for item in items], SAMPLES, seed=5)

    return {name: draw(name) for name in task.GENERATORS}


def rates(items: list[task.Item], completions: list[list[str]]) -> list[float]:
    return [
        sum(text == item.answer for text in texts) / SAMPLES for item, texts in zip(items, completions, strict=True)
    ]


def test_the_policy_is_always_right_on_some_prompts_never_on_some_and_mixed_on_many(
    items: list[task.Item], sampled: Sampled
) -> None:
    right = rates(items, sampled["policy"])
    assert sum(rate == 1 for rate in right) / len(right) > 0.05
    assert sum(rate == 0 for rate in right) / len(right) > 0.05
    assert sum(0 < rate < 1 for rate in right) / len(right) > 0.25


def test_the_policy_is_right_less_often_on_longer_strings(items: list[task.Item], sampled: Sampled) -> None:
    right = rates(items, sampled["policy"])

    def mean(lengths: range) -> float:
        chosen = [rate for item, rate in zip(items, right, strict=True) if item.difficulty in lengths]
        return sum(chosen) / len(chosen)

    assert mean(range(2, 4)) > 0.75 > mean(range(4, 6)) > mean(range(6, 8)) > 0.2 > mean(range(8, 10))


def test_generators_differ_in_strength(items: list[task.Item], sampled: Sampled) -> None:
    strong, policy, weak = (sum(rates(items, sampled[name])) / len(items) for name in task.GENERATORS)
    assert strong > policy + 0.2
    assert policy > weak + 0.1


def test_the_reward_model_mostly_agrees_with_the_verifier_and_its_gaps_are_of_usable_size(
    tinyworld: Path,  # noqa: F811
    items: list[task.Item],
    sampled: Sampled,
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from examples.tinyworld.calibration import agreement
    from examples.tinyworld.reward import rewards

    model = AutoModelForSequenceClassification.from_pretrained(tinyworld / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tinyworld / "reward")
    written = [[text for texts in rows for text in texts] for rows in zip(*sampled.values(), strict=True)]
    logits = rewards(model, tokenizer, [item.prompt for item in items], written)
    found = agreement(items, written, logits)
    assert found["pairs"] > 300
    assert 0.72 <= found["agreement"] < 1.0  # imperfect, as reward models are, and far from a coin
    assert 0.3 <= found["median_gap"] <= 5
    assert found["gap_95th_percentile"] < 10


def test_prompts_are_distinct_and_held_out_prompts_are_not_among_the_training_prompts(
    tinyworld: Path,  # noqa: F811
) -> None:
    training, heldout = ([i.prompt for i in read(tinyworld, f"{name}.jsonl")] for name in ("prompts", "heldout"))
    assert len(training) >= 2000
    assert len(heldout) >= 400
    assert len({*training, *heldout}) == len(training) + len(heldout)


def test_every_prompt_has_an_answer_a_slip_that_differs_a_source_and_a_difficulty(tinyworld: Path) -> None:  # noqa: F811
    items = read(tinyworld, "prompts.jsonl") + read(tinyworld, "heldout.jsonl")
    assert all(item.prompt == f"flip {item.answer[::-1]}" for item in items)
    assert all(task.slip(item.string) != item.answer for item in items)
    assert {item.source for item in items} == set(task.ALPHABETS)
    assert {item.difficulty for item in items} == set(task.LENGTHS)


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ("enots", "enots", 1.0),
        ("enots", " enots\n", 1.0),
        ("enots", "enost", -1 + 3 / 5),
        ("enots", "eno", -1 + 3 / 5),
        ("enots", "enotsss", -1 + 5 / 7),
        ("enots", "", -1.0),
        ("enots", "   ", -1.0),
        ("enots", "qqqqqqqqqqqqqq", -1.0),
        ("enots", "notse", -1.0),
        ("1", "2", -1.0),
        ("", "", 1.0),
        ("", "a", -1.0),
    ],
)
def test_the_verifier_gives_one_for_right_and_the_matching_share_less_one_for_wrong(
    answer: str, completion: str, expected: float
) -> None:
    assert score(prompt(answer), completion) == pytest.approx(expected)


def test_a_wrong_completion_always_scores_below_zero() -> None:
    rng = random.Random(1)
    for _ in range(500):
        item = task.draw_item(rng)
        spoilt = task.spoil(rng, item.answer, task.ALPHABETS[item.source])
        assert spoilt == item.answer or -1 <= score(prompt(item.answer), spoilt) < 0


def test_the_chat_template_is_prefix_consistent_in_text_and_tokens() -> None:
    tokenizer = make_tokenizer()
    user = [{"role": "user", "content": "flip stone"}]
    for start in (user, [{"role": "system", "content": "Be careful."}, *user]):
        whole = [*start, {"role": "assistant", "content": "enots"}]
        for tokenize in (False, True):
            kept: Callable[[Any], Any] = lambda out: out["input_ids"] if hasattr(out, "keys") else out  # noqa: E731
            asked = kept(tokenizer.apply_chat_template(start, add_generation_prompt=True, tokenize=tokenize))
            answered = kept(tokenizer.apply_chat_template(whole, tokenize=tokenize))
            assert answered[: len(asked)] == asked
            assert len(answered) == len(asked) + (6 if tokenize else len("enots<eos>"))


def test_training_text_is_what_the_chat_template_renders() -> None:
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "flip stone"}, {"role": "assistant", "content": "enots"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render("flip stone", "enots")
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert asked == render("flip stone")


def test_unknown_characters_do_not_crash_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("flip é☃\n~")["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "flip \n~"


def test_models_are_loadable_float32_and_end_their_texts(tinyworld: Path) -> None:  # noqa: F811
    for name in MODELS:
        config = json.loads((tinyworld / name / "config.json").read_text())
        assert config["dtype"] == "float32"
        assert config["pad_token_id"] is not None
        assert config["hidden_size"] // config["num_attention_heads"] == 32
        if name != "reward":
            generation = json.loads((tinyworld / name / "generation_config.json").read_text())
            assert generation["eos_token_id"] == config["eos_token_id"]


def test_a_cached_world_comes_back_at_once_and_loads_no_torch(tinyworld: Path) -> None:  # noqa: F811
    program = (
        "import sys, time; from pathlib import Path; from examples.tinyworld.build import build\n"
        "started = time.monotonic(); build(Path(sys.argv[1])); seconds = time.monotonic() - started\n"
        "assert seconds < 1, seconds\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, str(tinyworld)], check=True, env=environment, cwd=REPOSITORY)


SMALL = Recipe(
    prompts=50, heldout=20, trunk_steps=6, policy_steps=4, branch_steps=4, reward_steps=4, reward_prompts=10, layers=1
)


def weights(folder: Path) -> dict[str, str]:
    return {m: hashlib.sha256((folder / m / "model.safetensors").read_bytes()).hexdigest() for m in MODELS}


def test_the_same_recipe_builds_the_same_weights_and_prompts(tmp_path: Path) -> None:
    first, second = (build(tmp_path / name, SMALL) for name in ("first", "second"))
    assert weights(first) == weights(second)
    assert (first / "prompts.jsonl").read_bytes() == (second / "prompts.jsonl").read_bytes()
    assert len(set(weights(first).values())) == len(MODELS)


def test_an_interrupted_build_leaves_no_world_and_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.tinyworld import reward

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reward, "train_reward", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, SMALL)
    assert not (tmp_path / "world.json").exists()
    build(tmp_path, SMALL)
    assert is_complete(tmp_path, SMALL)


def test_another_recipe_a_missing_model_or_a_torn_world_file_make_a_folder_incomplete(tmp_path: Path) -> None:
    def finished() -> None:
        (tmp_path / "world.json").write_text(json.dumps({"digest": SMALL.digest()}))

    for name in MODELS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "heldout.jsonl").touch()
    finished()
    assert is_complete(tmp_path, SMALL)
    assert not is_complete(tmp_path, replace(SMALL, seed=18))
    (tmp_path / "world.json").write_text('{"digest": ')
    assert not is_complete(tmp_path, SMALL)
    finished()
    (tmp_path / "reward" / "model.safetensors").unlink()
    assert not is_complete(tmp_path, SMALL)


def test_a_build_prints_its_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    build(tmp_path, SMALL)
    printed = capsys.readouterr().err
    assert time.monotonic() - started < 60
    assert all(f"{name:7s} step" in printed for name in ("trunk", *MODELS))
    assert "loss" in printed
    assert "ETA" in printed
