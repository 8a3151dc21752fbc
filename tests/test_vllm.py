"""Real vLLM (the CPU build on machines without a GPU), as generator and as reward model: alone and under Ray."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from examples.tinyworld.build import build
from flows.demo import WORLD
from tasks import rubric
from tasks.columns import Columns
from tasks.config import PairingConfig
from tasks.engines import (
    VLLM_MEMORY,
    Answer,
    ChatRequest,
    GenerationRequest,
    Refused,
    Reply,
    ScoringRequest,
    judge_engine,
    reward_engine,
)
from tasks.engines.loop import EngineLoop
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.pair import pair
from tasks.score import score
from tasks.sections import GenerateConfig, GeneratorConfig, IngestConfig, ScoreConfig, ScorerConfig
from tasks.store import Store
from tasks.trial import golden_rewards, trials
from tests.conftest import CHAT_TEMPLATE, curate_config
from tests.services import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed")

PROMPTS = [[{"role": "user", "content": text}] for text in ("abc", "hello", "zyxwvu", "ab", "queue", "aeiouaei")]
SAMPLING = {"temperature": 1.0, "max_tokens": 16}


@pytest.fixture(scope="module")
def world() -> Path:
    return build(ROOT / WORLD)


@pytest.fixture(scope="module")
def generator(world: Path) -> Iterator[EngineLoop]:
    from tasks.engines.vllm import VllmGenerator

    config = GeneratorConfig(name="policy", engine="vllm", model="x", max_model_len=64, sampling=SAMPLING)
    loop = EngineLoop(VllmGenerator(config, str(world / "policy")))
    yield loop
    loop.close()


def ask(loop: EngineLoop, first: int, samples: int) -> list[Answer]:
    requests = [GenerationRequest(prompt, 1000 * i, first, samples) for i, prompt in enumerate(PROMPTS)]
    return loop.submit(requests).result(timeout=120)


def texts(answers: list[Answer]) -> list[list[str]]:
    return [[sample.text for sample in answer.samples] for answer in answers]


def test_samples_do_not_depend_on_the_range_they_are_asked_in(generator: EngineLoop) -> None:
    whole, front, back = texts(ask(generator, 0, 6)), texts(ask(generator, 0, 4)), texts(ask(generator, 4, 2))
    assert whole == [a + b for a, b in zip(front, back, strict=True)]
    assert len({text for row in whole for text in row}) > len(PROMPTS), "all samples are alike: the seed is not used"


def test_logprobs_are_the_models_own_at_temperature_one(generator: EngineLoop, world: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world / "policy", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    for prompt, answer in zip(PROMPTS, ask(generator, 0, 2), strict=True):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert answer.prompt_tokens == len(start)
        for sample in answer.samples:
            response = tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            response += [tokenizer.eos_token_id] if sample.finish_reason == "stop" else []
            assert sample.tokens == len(response)
            with torch.no_grad():
                logits = model(torch.tensor([start + response])).logits[0, len(start) - 1 : -1]
            expected = torch.log_softmax(logits.double(), -1)[range(len(response)), response].sum().item()
            assert math.isclose(sample.logprob, expected, abs_tol=1e-3)


def test_texts_are_those_that_vllm_writes_itself(generator: EngineLoop) -> None:
    from vllm import TokensPrompt

    from tasks.engines.chat import prompt_ids

    engine = generator.engine
    requests = [GenerationRequest(prompt, 1000 * i, 0, 4) for i, prompt in enumerate(PROMPTS)]
    params = [engine.params(request) for request in requests]
    for one in params:
        one.detokenize = True
    ids = [TokensPrompt(prompt_token_ids=prompt_ids(engine.tokenizer, prompt)) for prompt in PROMPTS]
    ours = ask(generator, 0, 4)  # the loop is idle afterwards, so that the engine may be asked beside it
    outputs = engine.llm.generate(ids, params, use_tqdm=False)
    assert texts(ours) == [[sample.text for sample in output.outputs] for output in outputs]


def test_a_prompt_that_does_not_fit_is_refused_and_the_others_are_answered(generator: EngineLoop) -> None:
    requests = [GenerationRequest([{"role": "user", "content": "a" * n}], 1, 0, 2) for n in (3, 500, 4)]
    short, long, other = generator.submit(requests).result(timeout=120)
    assert len(short.samples) == len(other.samples) == 2
    assert "too long" in long.reason


def test_curate_runs_on_vllm_under_ray_and_its_rewards_equal_those_of_transformers(world: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    prompts = ingest(IngestConfig(source=str(world / "prompts.jsonl"), limit=96, shard_size=32), store)
    policy = GeneratorConfig(
        name="policy", engine="vllm", model=str(world / "policy"), max_model_len=64, sampling=SAMPLING
    )
    completions = generate(GenerateConfig(samples=4, generators=[policy]), prompts, store)
    assert completions.counts.out == 96
    assert (completions.work.engine_starts, completions.work.requests, completions.work.samples) == (1, 96, 384)
    scorers = [
        ScorerConfig(name=engine, engine=engine, model=str(world / "reward"), max_model_len=64)
        for engine in ("vllm", "transformers")
    ]
    rewards = score(ScoreConfig(scorers=scorers), completions, store)
    assert rewards.counts.out == 2 * 384
    vllm, transformers = (_rewards(rewards, name, prompts, store) for name in ("vllm", "transformers"))
    np.testing.assert_allclose(vllm, transformers, atol=1e-3)
    assert vllm.min() < 0 or vllm.max() > 1, "raw logits leave [0, 1]; a sigmoid of them would not"
    table = pair(PairingConfig(scorer="vllm"), rewards, store)
    assert table.counts.into == 96 and table.counts.out > 20
    again = generate(GenerateConfig(samples=4, generators=[policy]), prompts, store)
    assert again.work.engine_starts == again.work.requests == 0


def test_the_reward_models_activation_is_off(world: Path) -> None:
    """Golden: raw logits of real texts, vLLM against a forward pass of transformers in this process."""
    config = ScorerConfig(name="rm", engine="vllm", model="x", max_model_len=64)
    transformers = config.model_copy(update={"engine": "transformers"})
    requests = [ScoringRequest(prompt, text) for prompt in PROMPTS for text in ("cba", "", "zzzz", "olleh")]
    both: list[list[Any]] = []
    for scorer in (config, transformers):
        loop = EngineLoop(reward_engine(scorer, str(world / "reward")))
        both.append(loop.submit(requests).result(timeout=180))
        loop.close()
    np.testing.assert_allclose(*both, atol=1e-3)


def test_the_doctors_golden_rewards_are_those_of_transformers(world: Path, tmp_path: Path) -> None:
    about = {"model": str(world / "reward"), "max_model_len": 64}
    scorer = ScorerConfig.model_validate({"name": "rm", "engine": "vllm", **about})
    assert "as by transformers, within" in golden_rewards(scorer, Store(tmp_path), "local")


def test_what_the_doctor_takes_for_the_share_of_a_gpu_is_what_vllm_takes() -> None:
    from vllm.config import CacheConfig

    assert CacheConfig().gpu_memory_utilization == VLLM_MEMORY


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads and writes bytes: all it says of its own accord is noise."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny-judge")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_judge_that_knows_nothing_answers_by_the_schema_all_the_same(tiny_judge: Path) -> None:
    answers = ["cba", "", 'Good."} {"factuality": 5}', "é 漢 \x00", "x" * 5000]
    config = ScorerConfig.model_validate(
        {"name": "j", "type": "judge", "model": str(tiny_judge), "judge": {"temperature": 1.0}}
    )
    pairwise = config.judge.model_copy(update={"mode": "pairwise"})
    rated = [
        ChatRequest(rubric.rating_messages(config.judge, p, a), rubric.schema(config.judge), i)
        for i, (p, a) in enumerate((p, a) for p in PROMPTS for a in answers)
    ]
    compared = [
        ChatRequest(rubric.comparison_messages(pairwise, p, "x", "y"), rubric.schema(pairwise), i)
        for i, p in enumerate(PROMPTS)
    ]
    loop = EngineLoop(judge_engine(config, config.model))
    replies = loop.submit([*rated, *compared]).result(timeout=240)
    again = loop.submit(rated[:4]).result(timeout=240)
    loop.close()
    assert again == replies[:4], "the seed is not used"
    ratings = []
    for reply, request in zip(replies[: len(rated)], rated, strict=True):
        if len(request.messages[-1]["content"]) > 4096:
            assert isinstance(reply, Refused) and reply.reason.startswith("too long: ")
        else:
            assert isinstance(reply, Reply) and reply.prompt_tokens > 500 and 50 < reply.tokens < 200
            ratings.append(tuple(rubric.read_ratings(config.judge, reply.text).values()))
    assert len(ratings) == 4 * len(PROMPTS) and len(set(ratings)) > 10
    assert {rubric.read_verdict(pairwise, reply.text) for reply in replies[len(rated) :]} <= {-1, 0, 1}


def test_the_doctor_has_a_judge_rate_a_few_answers(tiny_judge: Path, tmp_path: Path) -> None:
    judge = {"name": "judge", "type": "judge", "model": str(tiny_judge)}
    config = curate_config("prompts.jsonl", score={"scorers": [judge]}, store=str(tmp_path))
    assert "8 of 8 answers rated" in dict(trials(config))["scorer judge loaded"]()


def _rewards(rewards: Any, scorer: str, prompts: Any, store: Store) -> np.ndarray:
    from tasks.ingest import shards_of

    columns = Columns(["policy"], rewards, [], store)
    return np.concatenate([columns.read(shard).rewards[scorer] for shard in shards_of(store, prompts)])


def test_weights_are_safetensors_and_code_of_models_is_off_unless_the_configuration_says_so() -> None:
    from tasks.engines.vllm import _arguments

    config = GeneratorConfig(name="g", engine="vllm", model="m", dtype="float32")
    arguments = _arguments(config, "m", "generate")
    assert arguments["load_format"] == "safetensors" and arguments["trust_remote_code"] is False


@pytest.mark.parametrize(
    ("gpus", "sizes", "parts"),
    [
        (0, {}, (1, 1)),
        (0.5, {}, (1, 1)),
        (2, {}, (2, 1)),
        (2, {"pipeline_parallel_size": 2}, (1, 2)),
        (4, {"pipeline_parallel_size": 2}, (2, 2)),
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, (2, 2)),
        (0, {"tensor_parallel_size": 2}, (2, 1)),
    ],
)
def test_a_model_is_split_over_the_gpus_as_is_said_and_by_tensor_otherwise(
    gpus: float, sizes: dict[str, int], parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.engines import vllm

    given: dict[str, Any] = {}
    monkeypatch.setattr(vllm, "LLM", lambda **arguments: given.update(arguments) or MagicMock())
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # which is set otherwise, for good
    vllm.VllmGenerator(
        GeneratorConfig(name="g", engine="vllm", model="m", dtype="float32", gpus=gpus, engine_args=sizes), "m"
    )
    assert (given["tensor_parallel_size"], given["pipeline_parallel_size"]) == parts
