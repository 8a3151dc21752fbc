"""Tiny Llama generators: trained on demonstrations, sampled by transformers.

Training is imitation: cross-entropy on the completion's characters, Adam with a cosine to zero. The calm end of the
cosine is what calibrates the mixture: with it, the share of slips among samples at temperature 1 follows that among
the demonstrations.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from examples.tinyworld import task
from examples.tinyworld.tokenizer import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from examples.tinyworld.build import Recipe

IGNORED = -100  # label of a place that carries no loss


def make_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Heads of 32 (128 / 4) are the smallest that vLLM's CPU attention takes."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.feedforward,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=False,
        dtype="float32",
    )


def make_generator(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained generator; its saved defaults sample the plain distribution (no top-k, temperature 1)."""
    model = LlamaForCausalLM(make_config(recipe, tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return model


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, generator: str, batch: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of (token ids, labels), [batch, tokens], padded on the right; labels on completions only."""
    while True:
        items = [task.draw_item(rng) for _ in range(batch)]
        texts = [render(item.prompt, task.demonstrate(rng, generator, item)) for item in items]
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        prompt_tokens = torch.tensor([len(item.prompt) + 2 for item in items])  # <bos> and "="
        places = torch.arange(ids.shape[1])
        hidden = (places < prompt_tokens[:, None]) | (ids == tokenizer.pad_token_id)
        yield ids, ids.masked_fill(hidden, IGNORED)


def imitation_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """No attention mask: padding is on the right, where a causal model never looks from a place that counts."""
    first = int((labels != IGNORED).any(0).nonzero()[0])  # shortest prompt: nothing before it carries a loss
    states = model.model(input_ids=ids[:, :-1]).last_hidden_state[:, first - 1 :]
    return F.cross_entropy(model.lm_head(states).flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORED)


def optimise(
    name: str,
    model: torch.nn.Module,
    step_loss: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    groups: list[dict[str, Any]] | None = None,
) -> None:
    """`steps` of Adam on the loss that `step_loss` draws, a short warm-up and a cosine to zero, progress on stderr.

    groups: of parameters, where they do not all have the same learning rate.
    """
    optimiser = torch.optim.AdamW(groups or model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = step_loss()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            left = (time.monotonic() - started) / step * (steps - step)
            print(f"{name:7s} step {step:4d}/{steps}  loss {loss.item():.3f}  ETA {left:3.0f} s", file=sys.stderr)
    model.eval()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], samples: int, seed: int
) -> list[list[str]]:
    """`samples` completions of each prompt at temperature 1, in the prompts' order. Reseeds torch."""
    torch.manual_seed(seed)
    completions: list[list[str]] = []
    for start in range(0, len(prompts), 500):
        texts = [render(prompt) for prompt in prompts[start : start + 500]]
        encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max(task.LENGTHS) + 3,
            num_return_sequences=samples,
        )
        written = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        completions += [written[row : row + samples] for row in range(0, len(written), samples)]
    return completions


def train_generators(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, LlamaForCausalLM]:
    """Strong, policy and weak, branched from one trunk that has learnt to write backwards and to slip.

    The trunk's constant slip rate is what makes this quick: reversing is learnt in half the steps when demonstrations
    rarely slip, and a branch then only has to learn when to.
    """
    torch.manual_seed(recipe.seed)
    trunk = make_generator(recipe, tokenizer)
    _imitate(recipe, tokenizer, trunk, "trunk", recipe.trunk_batch, recipe.trunk_steps, recipe.trunk_learning_rate)
    models = {}
    for name in task.GENERATORS:
        models[name] = make_generator(recipe, tokenizer)
        models[name].load_state_dict(trunk.state_dict())
        steps = recipe.policy_steps if name == "policy" else recipe.branch_steps
        _imitate(recipe, tokenizer, models[name], name, recipe.branch_batch, steps, recipe.branch_learning_rate)
    return models


def _imitate(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    name: str,
    batch: int,
    steps: int,
    learning_rate: float,
) -> None:
    rng = random.Random(f"{recipe.seed} {name}")
    batches = demonstrations(tokenizer, name, batch, rng)
    optimise(name, model, lambda: imitation_loss(model, *next(batches)), steps, learning_rate)
