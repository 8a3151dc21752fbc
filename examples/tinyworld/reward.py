"""The reward model: a small Llama with a scalar head, trained on noisy pairwise preferences.

Two completions a and b of one prompt are compared by an annotator who is a Bradley-Terry model of the verifier's
score: a is preferred with probability sigmoid(SHARPNESS * (score(a) - score(b))). The model learns those
probabilities by cross-entropy on the difference of its logits, so its raw logits live on the scale SHARPNESS * score
(up to a constant per prompt): right against wrong is a gap of a few units, wrong against wrong less.

It starts from the policy's layers, with one more on top: layers that predict the next character leave it to a layer
above to compare that with what was written. The new layer learns quickly, the old ones slowly. The groups compared hold
the answer, the slip and faulty texts for a prompt drawn afresh, and one group in five what the three generators wrote
for a fixed set of prompts; from such a set alone the model learns its prompts by heart (tried: agreement 0.83 at best).
It stays imperfect: it is small and stops early.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from examples.tinyworld import task
from examples.tinyworld.generators import make_config, optimise
from examples.tinyworld.tokenizer import render
from examples.tinyworld.verifier import score_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from examples.tinyworld.build import Recipe

SHARPNESS = 3.0
GROUP = 4  # completions of one prompt that are compared, each with each
WRITTEN_SHARE = 0.2  # of the groups, those that hold what generators wrote
Written = Sequence[tuple[task.Item, Sequence[str]]]  # prompts and what the generators wrote for them
FIRST, SECOND = map(list, zip(*combinations(range(GROUP), 2), strict=True))


def train_reward(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, policy: LlamaForCausalLM, written: Written
) -> LlamaForSequenceClassification:
    """A reward model that starts from the policy."""
    torch.manual_seed(recipe.seed + 7)
    model = LlamaForSequenceClassification(_reward_config(recipe, tokenizer))
    model.model.load_state_dict(policy.model.state_dict(), strict=False)  # the layer on top is new
    rng = random.Random(recipe.seed + 8)

    def step_loss() -> torch.Tensor:
        groups = [draw_group(rng, written) for _ in range(recipe.reward_groups)]
        texts = [render(item.prompt, completion) for item, group in groups for completion in group]
        logits = reward_logits(model, tokenizer, texts).view(-1, GROUP)
        scores = torch.tensor([[score_text(item.answer, completion) for completion in group] for item, group in groups])
        wins = torch.sigmoid(SHARPNESS * (scores[:, FIRST] - scores[:, SECOND]))
        return F.binary_cross_entropy_with_logits(logits[:, FIRST] - logits[:, SECOND], wins)

    inherited = [*model.model.embed_tokens.parameters(), *model.model.layers[: recipe.layers].parameters()]
    known = {id(parameter) for parameter in inherited}
    new = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": inherited, "lr": recipe.reward_trunk_learning_rate}, {"params": new}]
    optimise("reward", model, step_loss, recipe.reward_steps, recipe.reward_learning_rate, groups)
    return model


def _reward_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
    config = make_config(recipe, tokenizer)
    config.num_hidden_layers += 1
    config.num_labels = 1
    return config


def draw_group(rng: random.Random, written: Written) -> tuple[task.Item, list[str]]:
    """A prompt and GROUP completions of it, no two alike."""
    item, texts = rng.choice(written) if rng.random() < WRITTEN_SHARE else (task.draw_item(rng), ())
    pool = dict.fromkeys((item.answer, task.slip(item.string), *texts))
    while len(pool) < GROUP:
        text = rng.choice((item.answer, task.slip(item.string)))
        pool.setdefault(task.spoil(rng, text, task.ALPHABETS[item.source]))
    return item, rng.sample(list(pool), GROUP)


def reward_logits(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> torch.Tensor:
    """Raw logits [texts] of rendered conversations, read at their last token."""
    encoded = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0]


@torch.no_grad()
def rewards(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
) -> list[list[float]]:
    """Raw logits of every completion of every prompt, [prompts][samples]."""
    texts = [render(prompt, text) for prompt, row in zip(prompts, completions, strict=True) for text in row]
    batches = [texts[start : start + 1000] for start in range(0, len(texts), 1000)]
    values = iter([value for batch in batches for value in reward_logits(model, tokenizer, batch).tolist()])
    return [[next(values) for _ in row] for row in completions]
