"""Step time and peak memory of objectives against TRL's plain DPO, on the same data and machine, in one run.

    .venv/bin/python benchmarks/train.py [--steps 40] [--rounds 3] [--large] [--out FILE]

A random Llama trains on made-up pairs with margins. Ways, each in a process of its own, in turns:

trl         TRL's DPOTrainer as it is, log-probabilities of the reference computed before the first step
mixdpo, madpo, dpo   the training program of `prefsieve train`
reused      as `dpo`, with the reference's log-probabilities kept from a training before
in_memory   TRL's DPOTrainer with the reference model in memory instead, which answers at every step

Step seconds are the median over all steps but the first five of each run; preparation is from loading the model to the
first step. Memory is the process's peak on a CPU, the GPU's peak where there is one. With --large the model has 0.36
billion parameters in bfloat16 and the share of a GPU's peak is told: 6 x parameters x tokens/s over --peak-tflops.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its modules would stand for others

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import machine, measured
from tasks.config import TrainConfig

WAYS = ("trl", "mixdpo", "madpo", "dpo", "reused", "in_memory")
WARM = 5
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 4096}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "vocab_size": 32768}


def build(folder: Path, large: bool, batch: int) -> dict[str, Any]:
    """A model with a tokenizer, and pairs with sides of 60 to 220 tokens, of 300 to 900 for the large one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.tinyworld.tokenizer import CHARACTERS, make_tokenizer

    shape = LARGE if large else SMALL
    torch.manual_seed(0)
    heads = shape["hidden_size"] // 64
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if large else torch.float32)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(CHARACTERS, k=rng.randint(low, high)))

    low, high = (300, 900) if large else (60, 220)
    rows = [
        {
            "prompt": [{"role": "user", "content": text(20, 60)}],
            "chosen": [{"role": "assistant", "content": text(low, high)}],
            "rejected": [{"role": "assistant", "content": text(low, high)}],
            "margin": rng.gauss(1.0, 1.0),
        }
        for _ in range(batch * 16)
    ]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "pairs.parquet")
    sides = sum(
        len(row[side][0]["content"]) + len(row["prompt"][0]["content"])
        for row in rows
        for side in ("chosen", "rejected")
    )
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens_per_pair": round(sides / len(rows), 1)}


def configured(folder: Path, steps: int, objective: str, large: bool, batch: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": "benchmark",
            "subset": "made-up",
            "policy": {
                "model": str(folder / "model"),
                "dtype": "bfloat16" if large else "float32",
                "gpus": 1 if large else 0,
            },
            "train": {
                "objective": objective,
                "max_steps": steps,
                "batch_size": batch,
                "micro_batch_size": batch,
                "max_length": 2048,
                "save_steps": 1_000_000,
                "report_to": [],
            },
        }
    )


def timed(folder: Path, steps: int, way: str, large: bool, batch: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(torch.get_num_threads() if large else 2)
    times: list[float] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as room:
        if way in ("trl", "in_memory"):
            _plain(configured(folder, steps, "dpo", large, batch), folder, Path(room), way == "trl", times)
        else:
            objective = "dpo" if way == "reused" else way
            _ours(configured(folder, steps, objective, large, batch), folder, Path(room), way == "reused", times)
    between = [after - before for before, after in itertools.pairwise(times)][WARM:]
    found = {"step_seconds": statistics.median(between), "prepare_seconds": times[0] - started - between[0]}
    if torch.cuda.is_available():
        found["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def _ours(config: TrainConfig, folder: Path, room: Path, reused: bool, times: list[float]) -> None:
    from tasks.trainers import program
    from tasks.trainers.pairs import Kept

    file = folder / "kept.json"

    def read(_: str) -> Any:
        return json.loads(file.read_text()) if reused else None

    def write(_: str, columns: Any) -> None:
        file.write_text(json.dumps(columns))

    hooks = program.Hooks(lambda *_: times.append(time.perf_counter()), lambda _: None)
    program.run(config, program.Files(str(folder / "model"), folder / "data", room), Kept(read, write), hooks)


def _plain(config: TrainConfig, folder: Path, room: Path, precompute: bool, times: list[float]) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from tasks.trainers.program import Files, _arguments

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                times.append(time.perf_counter())

    pairs = load_dataset("parquet", data_files=str(folder / "data/*.parquet"), split="train", cache_dir=str(room))
    arguments = _arguments(config, Files(str(folder / "model"), folder / "data", room), len(pairs))
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=config.policy.dtype),
        args=DPOConfig(**{**arguments, "precompute_ref_log_probs": precompute}, beta=0.1),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
    ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--large", action="store_true", help="0.36 billion parameters in bfloat16, for a GPU")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bfloat16, dense")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="prefsieve-train-") as room:
        folder = Path(room)
        about = build(folder, arguments.large, arguments.batch)
        for turn in range(arguments.rounds):
            ways = WAYS if turn % 2 == 0 else ("trl", *reversed(WAYS[1:]))
            for way in ways:
                work = partial(timed, way=way, large=arguments.large, batch=arguments.batch)
                runs[way].append(measured(work, folder, arguments.steps))
                print(json.dumps({way: runs[way][-1]}), file=sys.stderr)
    middle = {
        way: {name: round(statistics.median(run[name] for run in found), 4) for name in found[0]}
        for way, found in runs.items()
    }
    memory = "gpu_peak_gib" if arguments.large else "peak_gib"
    for found in middle.values():
        found["step_over_trl"] = round(found["step_seconds"] / middle["trl"]["step_seconds"], 3)
        found["memory_over_trl"] = round(found[memory] / middle["trl"][memory], 3)
        found["tokens_per_second"] = round(arguments.batch * about["tokens_per_pair"] / found["step_seconds"])
        if arguments.large:
            used = 6 * about["parameters"] * found["tokens_per_second"]
            found["share_of_peak"] = round(used / arguments.peak_tflops / 1e12, 3)
    result = {
        "median": middle,
        "runs": runs,
        "model": about,
        "batch": arguments.batch,
        "machine": machine("torch", "trl"),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
