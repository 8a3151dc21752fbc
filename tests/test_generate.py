"""generate: which samples are made, from which random streams, and what is written about them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.engines import Answer, GenerationRequest, generator_engine
from tasks.engines.chat import prompt_ids, written
from tasks.engines.loop import EngineLoop, Refused
from tasks.engines.transformers import SeededSampler, TransformersGenerator, gumbel
from tasks.errors import RunError
from tasks.generate import (
    GenerateWorker,
    completions_path,
    generate,
    prompt_seed,
)
from tasks.ingest import ingest, read_shard, shards_of
from tasks.models import facts_of, generator_fingerprint
from tasks.records import COMPLETIONS, digest, text_digest
from tasks.samples import existing
from tasks.sections import GenerateConfig, GeneratorConfig, IngestConfig, SamplingConfig
from tasks.store import Store
from tests.conftest import Curated, TinyModels, copy_store, files_below, prompts, write_jsonl


def request(text: str, seed: int = 5, first: int = 0, samples: int = 1) -> GenerationRequest:
    return GenerationRequest([{"role": "user", "content": text}], seed, first, samples)


def ask(engine: Any, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Answers in the order of the requests, all asked at once."""
    for key, wanted in enumerate(requests):
        engine.add(key, wanted)
    answers: dict[int, Answer] = {}
    while len(answers) < len(requests):
        answers.update(engine.step())
    return [answers[key] for key in range(len(requests))]


def texts(answer: Answer) -> list[tuple[str, str, int]]:
    return [(sample.text, sample.finish_reason, sample.tokens) for sample in answer.samples]


def configure(models: TinyModels, **changes: Any) -> GeneratorConfig:
    sampling = {"max_tokens": 12, **changes.pop("sampling", {})}
    return GeneratorConfig.model_validate(
        {"name": "tiny", "model": str(models.generator), "sampling": sampling, **changes}
    )


def tiny_engine(models: TinyModels, **changes: Any) -> TransformersGenerator:
    config = configure(models, **changes)
    return TransformersGenerator(config, config.model)


# --- seeds


def test_seeds_differ_between_prompts_and_between_generators() -> None:
    seeds = {prompt_seed(fingerprint, f"{i:032x}") for fingerprint in ("a", "b", "c") for i in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**48 for seed in seeds)


# --- what is written


def test_files_are_aligned_with_their_shards_and_complete(fake_run: Curated) -> None:
    store, completions = fake_run.store, fake_run.completions
    shards = shards_of(store, fake_run.prompts)
    assert [shard["rows"] for shard in shards] == [16, 16, 8]
    assert completions.counts.into == completions.counts.out == 80
    for fingerprint in completions.generators.values():
        for shard in shards:
            table = store.read_table(completions_path(fingerprint, shard["prompts"], (0, 4)))
            assert table.schema.equals(COMPLETIONS)
            ids = read_shard(store, shard["digest"], ["prompt_id"])["prompt_id"].to_pylist()
            rows = table.to_pylist()
            assert [row["prompt_id"] for row in rows] == ids
            for row in rows:
                assert row["refused"] is None
                assert {len(row[name]) for name in ("texts", "finish_reasons", "tokens", "logprobs")} == {4}
                assert row["text_digests"] == [text_digest(text) for text in row["texts"]]
                assert set(row["finish_reasons"]) <= {"stop", "length"}
                assert all(tokens > 0 for tokens in row["tokens"])


def test_the_work_of_a_first_run_is_told(fake_run: Curated) -> None:
    work = fake_run.completions.work
    assert (work.shards_made, work.shards_reused, work.engine_starts) == (6, 0, 2)
    assert (work.requests, work.samples) == (80, 320)
    tables = [fake_run.store.read_table(path) for path in fake_run.store.list("completions")]
    assert work.tokens == sum(sum(row) for table in tables for row in table["tokens"].to_pylist())


def test_a_prompt_has_the_same_completions_in_every_shard_and_order(fake_run: Curated, tmp_path: Path) -> None:
    """The seed comes from the prompt, not from its place."""
    store = Store(tmp_path / "store")
    config = fake_run.config.generate.generators[0]
    fingerprint = fake_run.completions.generators[config.name]
    source = write_jsonl(tmp_path / "turned.jsonl", prompts(40)[::-1])
    shards = shards_of(store, ingest(IngestConfig(source=str(source), shard_size=7), store))
    turned = {}
    for shard in shards:
        asyncio.run(work(GenerateWorker(config, fingerprint, store.url, "test"), shard, (0, 4)))
        table = store.read_table(completions_path(fingerprint, shard["prompts"], (0, 4)))
        turned.update(zip(table["prompt_id"].to_pylist(), table["texts"].to_pylist(), strict=True))
    straight = {}
    for shard in shards_of(fake_run.store, fake_run.prompts):
        path = completions_path(fingerprint, shard["prompts"], (0, 4))
        table = fake_run.store.read_table(path)
        straight.update(zip(table["prompt_id"].to_pylist(), table["texts"].to_pylist(), strict=True))
    assert turned == straight


def test_a_file_that_another_run_has_made_meanwhile_is_not_made_again(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    before = files_below(Path(store.url))
    config = fake_run.config.generate.generators[0]
    worker = GenerateWorker(config, fake_run.completions.generators[config.name], store.url, "test")
    counts = asyncio.run(work(worker, shards_of(store, fake_run.prompts)[2], (0, 4)))
    assert counts["requests"] == 0
    assert files_below(Path(store.url)) == before


async def work(worker: GenerateWorker, shard: dict[str, Any], samples: tuple[int, int]) -> dict[str, Any]:
    first, last = samples
    names = {"shard": shard["digest"], "prompts": shard["prompts"], "rows": shard["rows"]}
    return await worker.work({**names, "first": first, "last": last, "final": True, "part": ""})


# --- both engines


@pytest.fixture(params=["fake", "transformers"])
def engine(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Any:
    if request.param == "fake":
        return generator_engine(GeneratorConfig(name="fake", engine="fake"), "")
    return tiny_engine(tiny_models)


def test_samples_asked_at_once_equal_samples_asked_in_two_goes(engine: Any) -> None:
    (whole,) = ask(engine, [request("tell me", first=0, samples=8)])
    (start,) = ask(engine, [request("tell me", first=0, samples=4)])
    (rest,) = ask(engine, [request("tell me", first=4, samples=4)])
    assert texts(whole) == texts(start) + texts(rest)
    assert len({sample.text for sample in whole.samples}) > 4


def test_other_seeds_and_other_prompts_give_other_samples(engine: Any) -> None:
    answers = ask(engine, [request("a", seed=1, samples=4), request("a", seed=99, samples=4), request("b", 1, 0, 4)])
    drawn = [tuple(sample.text for sample in answer.samples) for answer in answers]
    assert len(set(drawn)) == 3


# --- the transformers engine against its own model


def test_samples_do_not_depend_on_batch_size_or_neighbours(tiny_models: TinyModels) -> None:
    room = tiny_models.room
    # The longest prompts leave less room than max_tokens: their neighbours must not lose tokens by that.
    wanted = [
        request(text, seed=100 * i, first=i, samples=1 + i % 3)
        for i, text in enumerate(
            ["a", "hello there", "x" * 20, "b" * (room - 10), "c" * (room - 7), "what is 1 plus 1"]
        )
    ]
    sampling = {"max_tokens": 24}
    alone = [ask(tiny_engine(tiny_models, sampling=sampling, batch_size=1), [one])[0] for one in wanted]
    assert {len(answer.samples) for answer in alone} == {1, 2, 3}
    for batch_size in (1, 4, 64):
        engine = tiny_engine(tiny_models, sampling=sampling, batch_size=batch_size)
        for order in (wanted, wanted[::-1]):
            together = ask(engine, order)
            for one, answer in zip(order, together, strict=True):
                expected = alone[wanted.index(one)]
                assert texts(answer) == texts(expected)
                assert [s.logprob for s in answer.samples] == pytest.approx(
                    [s.logprob for s in expected.samples], abs=1e-3
                )


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_samples_are_those_of_a_plain_loop_over_the_models_logits(tiny_models: TinyModels, temperature: float) -> None:
    """Text, tokens, finish reason and log-probability, computed token by token without batch, cache or padding."""
    engine = tiny_engine(tiny_models, sampling={"temperature": temperature})
    model, tokenizer = engine.model, engine.tokenizer
    wanted = [request("ab", seed=3, first=2, samples=3), request("some longer prompt", seed=8, samples=3)]
    reasons: Counter[str] = Counter()
    for one, answer in zip(wanted, ask(engine, wanted), strict=True):
        start = prompt_ids(tokenizer, one.messages)
        assert answer.prompt_tokens == len(start)
        for i, sample in enumerate(answer.samples):
            drawn: list[int] = []
            logprob = 0.0
            while len(drawn) < 12 and tokenizer.eos_token_id not in drawn:
                with torch.no_grad():
                    logits = model(torch.tensor([start + drawn])).logits[:, -1]
                if temperature:
                    noise = gumbel(torch.tensor([one.seed + one.first + i]), len(drawn), logits.shape[1])
                    choice = int((logits / temperature + noise).argmax())
                else:
                    choice = int(logits.argmax())
                logprob += float(torch.log_softmax(logits[0].double(), 0)[choice])
                drawn.append(choice)
            ended = drawn[-1] == tokenizer.eos_token_id
            reasons[sample.finish_reason] += 1
            assert sample.text == tokenizer.decode(drawn, skip_special_tokens=True)
            assert (sample.tokens, sample.finish_reason) == (len(drawn), "stop" if ended else "length")
            assert sample.logprob == pytest.approx(logprob, abs=1e-4)
    if temperature:
        assert set(reasons) == {"stop", "length"}, "the prompts should show both endings"


def test_at_temperature_zero_all_samples_are_the_models_greedy_answer(tiny_models: TinyModels) -> None:
    engine = tiny_engine(tiny_models, sampling={"temperature": 0.0})
    (answer,) = ask(engine, [request("hello", samples=3)])
    ids = torch.tensor([prompt_ids(engine.tokenizer, [{"role": "user", "content": "hello"}])])
    model = AutoModelForCausalLM.from_pretrained(tiny_models.generator)
    greedy = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    assert {sample.text for sample in answer.samples} == {engine.tokenizer.decode(greedy, skip_special_tokens=True)}


def test_the_models_own_generation_defaults_do_not_change_what_is_sampled(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Many models ship a repetition penalty or a top-k; the configuration alone decides, as it does for vLLM."""
    import json
    import shutil

    shutil.copytree(tiny_models.generator, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    defaults = json.loads(path.read_text())
    defaults |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "top_k": 3, "do_sample": True, "max_length": 20}
    path.write_text(json.dumps(defaults))
    opinionated = TinyModels(tmp_path / "model", tiny_models.reward, tiny_models.room)
    wanted = [request("hello", samples=6), request("and you", samples=6)]
    plain = ask(tiny_engine(tiny_models), wanted)
    assert [texts(answer) for answer in ask(tiny_engine(opinionated), wanted)] == [texts(answer) for answer in plain]


def test_a_system_prompt_is_put_before_every_prompt(tiny_models: TinyModels) -> None:
    (plain,) = ask(tiny_engine(tiny_models), [request("hello")])
    (led,) = ask(tiny_engine(tiny_models, system_prompt="be brief"), [request("hello")])
    assert led.prompt_tokens == plain.prompt_tokens + len("s>be brief\n")


def test_the_beginning_of_a_sequence_is_marked_once(tiny_models: TinyModels) -> None:
    engine = tiny_engine(tiny_models)
    ids = prompt_ids(engine.tokenizer, [{"role": "user", "content": "hi"}])
    assert ids.count(engine.tokenizer.bos_token_id) == 1
    assert engine.tokenizer.decode(ids, skip_special_tokens=True) == "u>hi\na>"


def test_texts_are_what_was_drawn_without_its_end_and_without_half_a_character() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<pad>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", clean_up_tokenization_spaces=True
    )  # <end> is no special token here, as in some chat models
    ids = tokenizer("Well , née 🙂")["input_ids"]
    assert written(tokenizer, [*ids, vocabulary["<end>"]], "stop") == "Well , née 🙂"
    assert written(tokenizer, ids, "length") == "Well , née 🙂"
    for cut in (1, 2, 3):
        assert written(tokenizer, ids[:-cut], "length") == "Well , née "
    assert written(tokenizer, [], "length") == ""


def test_a_base_model_without_a_chat_template_takes_single_user_messages_as_they_are(tiny_models: TinyModels) -> None:
    engine = tiny_engine(tiny_models)
    engine.tokenizer.chat_template = None
    user = {"role": "user", "content": "once upon"}
    assert engine.tokenizer.decode(prompt_ids(engine.tokenizer, [user])) == "once upon"
    assert engine.tokenizer.decode(prompt_ids(engine.tokenizer, [user], "tell: ")).endswith("once upon")
    for messages in ([{"role": "system", "content": "x"}], [user, {"role": "assistant", "content": "y"}, user]):
        with pytest.raises(ValueError, match="no chat template"):
            prompt_ids(engine.tokenizer, messages)


# --- noise


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float((((counts - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_gumbel_noise_draws_from_the_softmax(vary: str) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    draws = 8000
    if vary == "seed":
        noise = gumbel(torch.arange(draws) + 2**47, step=3, width=8)
    else:
        noise = torch.cat([gumbel(torch.tensor([77]), step, 8) for step in range(draws)])
    chosen = (logits + noise).argmax(dim=1)
    counts = np.bincount(chosen.numpy(), minlength=8)
    expected = torch.softmax(logits.double(), 0).numpy() * draws
    assert chi_square(counts, expected) < 24.3  # 7 degrees of freedom, 99.9 %


def test_neighbouring_seeds_steps_and_tokens_are_not_correlated() -> None:
    seeds = torch.arange(4000)
    columns = [
        gumbel(seeds, 0, 2)[:, 0],
        gumbel(seeds, 0, 2)[:, 1],
        gumbel(seeds, 1, 2)[:, 0],
        gumbel(seeds + 1, 0, 2)[:, 0],
    ]
    correlation = np.corrcoef(torch.stack(columns).numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.06  # four standard errors
    assert torch.isfinite(torch.stack(columns)).all()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [({"top_k": 3}, 3), ({"top_p": 0.6}, 2), ({"top_k": 3, "temperature": 0.5}, 3), ({"top_p": 1e-6}, 1), ({}, 6)],
)
def test_top_k_and_top_p_cut_the_tail_and_leave_the_rest_in_proportion(sampling: dict[str, Any], allowed: int) -> None:
    config = SamplingConfig.model_validate(sampling)
    logits = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]))
    draws = 4000
    sampler = SeededSampler(torch.arange(draws), config)
    chosen = sampler(torch.zeros((draws, 1), dtype=torch.long), logits.expand(draws, -1)).argmax(dim=1)
    counts = np.bincount(chosen.numpy(), minlength=6)
    assert (counts[allowed:] == 0).all()
    kept = torch.softmax(logits[:allowed].double() / config.temperature, 0).numpy()
    assert chi_square(counts[:allowed], kept * draws) < 24.3
    (logprobs,) = sampler.logprobs
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, 0)[chosen])  # under the model, not the cut one


# --- prompts that cannot be answered


def test_prompts_that_cannot_be_answered_are_refused_and_the_others_are_not(tiny_models: TinyModels) -> None:
    loop = EngineLoop(tiny_engine(tiny_models))
    tool = GenerationRequest([{"role": "tool", "content": "x"}], 1, 0, 1)  # the chat template raises on it
    answers = loop.submit([request("ok"), request("x" * 61), tool, request("x" * 57)]).result(timeout=60)
    loop.close()
    assert [type(answer) for answer in answers] == [Answer, Refused, Refused, Answer]
    assert answers[1].reason == "prompt too long: 67 tokens, the model takes 64"
    assert answers[2].reason == "chat template: no tools here"
    assert answers[3].samples[0].tokens == 1  # the last place in the sequence


@pytest.fixture(scope="module")
def tiny_run(local_ray: Any, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight prompts, one of them too long, through Ray with the transformers engine: two shards, three samples."""
    folder = tmp_path_factory.mktemp("tiny-run")
    rows = [*prompts(5), {"prompt": "y" * 80}, *prompts(2, first=5)]
    store = Store(folder / "store")
    source = write_jsonl(folder / "p.jsonl", rows)
    prompt_set = ingest(IngestConfig(source=str(source), shard_size=4), store)
    config = GenerateConfig(samples=3, generators=[configure(tiny_models)], max_refused=0.2)
    return config, prompt_set, store, generate(config, prompt_set, store)


def test_a_stage_with_a_real_model_writes_what_its_engine_says(tiny_run: Any, tiny_models: TinyModels) -> None:
    _, prompt_set, store, completions = tiny_run
    assert completions.counts.into == 8
    assert completions.counts.out == 7
    assert completions.counts.dropped == {"refused: prompt too long": 1}
    assert completions.work.engine_starts == 1
    assert completions.work.samples == 21
    engine = tiny_engine(tiny_models)
    for shard in shards_of(store, prompt_set):
        rows = store.read_table(completions_path(completions.generators["tiny"], shard["prompts"], (0, 3))).to_pylist()
        for prompt, row in zip(read_shard(store, shard["digest"]).to_pylist(), rows, strict=True):
            assert row["prompt_id"] == prompt["prompt_id"]
            if row["refused"]:
                assert row["refused"].startswith("prompt too long: 86 tokens")
                assert row["prompt_tokens"] is None
                assert row["texts"] == row["text_digests"] == row["tokens"] == row["logprobs"] == []
                continue
            seed = prompt_seed(completions.generators["tiny"], prompt["prompt_id"])
            (answer,) = ask(engine, [GenerationRequest(prompt["messages"], seed, 0, 3)])
            assert texts(answer) == list(zip(row["texts"], row["finish_reasons"], row["tokens"], strict=True))
            assert row["prompt_tokens"] == answer.prompt_tokens
            assert row["logprobs"] == pytest.approx([sample.logprob for sample in answer.samples], abs=1e-3)


def test_more_refused_prompts_than_allowed_stop_the_run(tiny_run: Any) -> None:
    config, prompt_set, store, _ = tiny_run
    strict = config.model_copy(update={"max_refused": 0.1})
    with pytest.raises(RunError, match=r"1 of 8 prompts were refused by 'tiny', .* 10%: .*prompt too long"):
        generate(strict, prompt_set, store)


def test_refusals_are_counted_for_each_generator_alone(tiny_run: Any, tiny_models: TinyModels) -> None:
    """One generator without refusals must not hide another's."""
    config, prompt_set, store, _ = tiny_run
    roomy = GeneratorConfig(name="roomy", engine="fake")
    fingerprint = generator_fingerprint(roomy, store)
    worker = GenerateWorker(roomy, fingerprint, store.url, "test")
    for shard in shards_of(store, prompt_set):
        asyncio.run(work(worker, shard, (0, 3)))
    both = GenerateConfig(samples=3, generators=[roomy, config.generators[0]], max_refused=0.1)
    with pytest.raises(RunError, match="more than max_refused 10%"):
        generate(both, prompt_set, store)
    patient = both.model_copy(update={"max_refused": 0.2})
    assert generate(patient, prompt_set, store).counts.dropped == {"refused: prompt too long": 1}


def test_an_engine_that_cannot_start_ends_the_run_with_its_reason(local_ray: Any, tmp_path: Path, store: Store) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(3))
    prompt_set = ingest(IngestConfig(source=str(source)), store)
    broken = GeneratorConfig(name="broken", engine="fake", engine_args={"quality": "excellent"})
    with pytest.raises(RunError, match=r"an engine did not start: ValueError: could not convert .*'excellent'"):
        generate(GenerateConfig(samples=2, generators=[broken]), prompt_set, store)
    assert existing(store, "completions") == {}


# --- fingerprints


def test_a_fingerprint_tells_everything_that_decides_the_samples(tiny_models: TinyModels, store: Store) -> None:
    base = configure(tiny_models)
    same = [
        {"workers": 3},
        {"cpus": 0.5},
        {"gpus": 1},
        {"batch_size": 7},
        {"name": "another"},
    ]
    other = [
        {"seed": 1},
        {"system_prompt": "x"},
        {"dtype": "float32"},
        {"max_model_len": 32},
        {"engine_args": {"attn_implementation": "eager"}},
        {"engine": "vllm"},
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"max_tokens": 13}},
        {"model": str(tiny_models.reward)},
    ]
    reference = generator_fingerprint(base, store)
    for changes in same:
        assert generator_fingerprint(configure(tiny_models, **changes), store) == reference, changes
    different = {generator_fingerprint(configure(tiny_models, **changes), store) for changes in other}
    assert len({reference, *different}) == len(other) + 1


def test_the_store_says_what_a_fingerprint_stands_for(fake_run: Curated) -> None:
    for name, fingerprint in fake_run.completions.generators.items():
        facts = facts_of(fingerprint, fake_run.store)
        assert digest(facts) == fingerprint
        assert (facts["stage"], facts["engine"], facts["model"]) == ("generate", "fake", name)


def test_a_fingerprint_follows_the_content_of_a_model_folder(
    tiny_models: TinyModels, store: Store, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(tiny_models.generator, tmp_path / "model")
    config = configure(tiny_models, model=str(tmp_path / "model"))
    assert generator_fingerprint(config, store) == generator_fingerprint(configure(tiny_models), store)
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert generator_fingerprint(config, store) != generator_fingerprint(configure(tiny_models), store)


def test_the_loop_keeps_answers_and_requests_together_while_batches_overlap() -> None:
    loop = EngineLoop(generator_engine(GeneratorConfig(name="fake", engine="fake"), ""))
    batches = [[request(f"{b} {i}", samples=2) for i in range(5)] for b in range(20)]
    futures = [loop.submit(batch) for batch in batches]
    assert loop.submit([]).result() == []
    single = generator_engine(GeneratorConfig(name="fake", engine="fake"), "")
    for batch, future in zip(batches, futures, strict=True):
        assert future.result(timeout=10) == ask(single, batch)
    loop.close()


def test_a_failing_engine_fails_everyone_who_waits_and_everyone_who_comes() -> None:
    class Broken:
        def add(self, key: int, request: Any) -> None: ...

        def step(self) -> list[tuple[int, Any]]:
            raise MemoryError("out of memory")

        def close(self) -> None: ...

    loop = EngineLoop(Broken())
    for _ in range(2):
        with pytest.raises(MemoryError):
            loop.submit([request("x")]).result(timeout=10)
    loop.close()


def test_log_probabilities_are_negative_and_finite(fake_run: Curated) -> None:
    for path in fake_run.store.list("completions"):
        for row in fake_run.store.read_table(path, ["logprobs"])["logprobs"].to_pylist():
            assert all(math.isfinite(value) and value < 0 for value in row)
