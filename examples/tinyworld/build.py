"""Builds TinyWorld into a folder, once: `python -m examples.tinyworld.build --out DIR`.

    DIR/{strong,policy,weak}/            LlamaForCausalLM, tokenizer and chat template
    DIR/reward/                          LlamaForSequenceClassification with one label: its raw logit is the reward
    DIR/prompts.jsonl, heldout.jsonl     {"prompt", "answer", "source", "difficulty"}, no prompt in both
    DIR/world.json                       the recipe, its digest and the measured calibration; written last

world.json is the mark of a complete build: it goes first when a folder is rebuilt and comes last, in one rename. A
folder whose world.json holds the same digest is returned as it is, without importing torch; anything else is rebuilt.
A lock file keeps two builders of one folder apart: the second waits and finds the first one's world. The same recipe
gives the same bytes of weights on the same machine, library versions and thread count.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.tinyworld import task

VERSION = 1  # raise it when the code changes what a recipe builds
MODELS = (*task.GENERATORS, "reward")
PROMPT_FILES = ("prompts.jsonl", "heldout.jsonl")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is built; the defaults take under three minutes on two cores."""

    seed: int = 17
    threads: int = 2  # torch's; another number sums in another order and gives other bytes
    prompts: int = 4000
    heldout: int = 600
    layers: int = 2
    width: int = 128
    heads: int = 4
    feedforward: int = 256
    rope_theta: float = 1000.0  # sequences are 30 tokens short: the usual 10,000 tells their places apart less well
    trunk_batch: int = 64
    trunk_steps: int = 700
    trunk_learning_rate: float = 4e-3
    branch_batch: int = 64
    policy_steps: int = 300
    branch_steps: int = 150  # strong and weak
    branch_learning_rate: float = 2e-3
    reward_groups: int = 16  # per step, of four completions each
    reward_steps: int = 400
    reward_learning_rate: float = 1.6e-3  # of the layer and the head that are new
    reward_trunk_learning_rate: float = 4e-4
    reward_prompts: int = 1500
    reward_samples: int = 2  # per prompt and generator
    calibration_samples: int = 8  # per held-out prompt and generator

    def digest(self) -> str:
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(folder: Path, recipe: Recipe | None = None) -> Path:
    """Builds the world unless it is there already, and returns its folder."""
    folder, recipe = Path(folder), recipe or Recipe()
    if is_complete(folder, recipe):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not is_complete(folder, recipe):
            _build(folder, recipe)
    return folder


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds the world of this recipe, whole."""
    try:
        world = json.loads((folder / "world.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    expected = [*PROMPT_FILES, *(f"{model}/model.safetensors" for model in MODELS)]
    return world.get("digest") == recipe.digest() and all((folder / name).exists() for name in expected)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, recipe: Recipe) -> None:
    started = time.monotonic()
    _clear(folder)
    heldout, prompts = _write_prompts(folder, recipe)
    calibration = _train(folder, recipe, heldout, {item.prompt for item in (*heldout, *prompts)})
    seconds = round(time.monotonic() - started)
    world = {
        "digest": recipe.digest(),
        "version": VERSION,
        "recipe": asdict(recipe),
        "build_seconds": seconds,
        "calibration": calibration,
    }
    part = folder / "world.json.part"
    part.write_text(json.dumps(world, indent=1) + "\n")
    os.replace(part, folder / "world.json")
    print(f"TinyWorld is in {folder} after {seconds} s", file=sys.stderr)


def _clear(folder: Path) -> None:
    """Takes away what an earlier build left, its mark of completeness first."""
    (folder / "world.json").unlink(missing_ok=True)
    for model in MODELS:
        shutil.rmtree(folder / model, ignore_errors=True)


def _write_prompts(folder: Path, recipe: Recipe) -> tuple[list[task.Item], list[task.Item]]:
    """Held-out prompts are drawn first, so that short strings have not run out for them."""
    rng = random.Random(recipe.seed)
    heldout = task.draw_distinct(rng, recipe.heldout)
    prompts = task.draw_distinct(rng, recipe.prompts, {item.prompt for item in heldout})
    for name, items in zip(PROMPT_FILES, (prompts, heldout), strict=True):
        (folder / name).write_text("".join(json.dumps(item.row()) + "\n" for item in items))
    return heldout, prompts


def _train(folder: Path, recipe: Recipe, heldout: Sequence[task.Item], used: set[str]) -> dict[str, Any]:
    """Trains and saves the four models, then measures them on the held-out prompts."""
    # Waiting threads that spin starve each other on busy cores (seen: 0.13 s a step without, 0.5 to 1.8 s with).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported
    import torch

    from examples.tinyworld import calibration, generators, reward
    from examples.tinyworld.tokenizer import make_tokenizer

    torch.set_num_threads(recipe.threads)
    tokenizer = make_tokenizer()
    models = generators.train_generators(recipe, tokenizer)
    items = task.draw_distinct(random.Random(recipe.seed + 5), recipe.reward_prompts, used)
    texts = [item.prompt for item in items]
    print(f"sampling {len(texts)} prompts for the reward model", file=sys.stderr)
    drawn = [generators.sample(m, tokenizer, texts, recipe.reward_samples, recipe.seed + 6) for m in models.values()]
    written = [(item, [text for texts in rows for text in texts]) for item, *rows in zip(items, *drawn, strict=True)]
    scorer = reward.train_reward(recipe, tokenizer, models["policy"], written)
    for name, model in {**models, "reward": scorer}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    print(f"measuring on {len(heldout)} held-out prompts", file=sys.stderr)
    return calibration.measure(recipe, tokenizer, models, scorer, heldout)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build TinyWorld: a real task for real, tiny models.")
    parser.add_argument("--out", type=Path, required=True, help="folder to build into; a complete world there is kept")
    print(build(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()
