"""transformers as an engine: the embedded default, for small models and for reward heads that vLLM does not know.

Sampling is by the Gumbel-max trick with noise from a counter-based hash of (sample seed, step, token), so a sample does
not depend on which other prompts share its batch, nor on whether samples 4..7 were asked for together with 0..3.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tasks.engines import Answer, GenerationRequest, Sample, ScoringRequest
from tasks.engines.chat import prompt_ids, scored_ids, written
from tasks.errors import RunError
from tasks.sections import GeneratorConfig, ModelConfig, SamplingConfig, ScorerConfig


class TransformersGenerator:
    def __init__(self, config: GeneratorConfig, model: str) -> None:
        self.config = config
        self.tokenizer = _tokenizer(config, model)
        self.model = AutoModelForCausalLM.from_pretrained(model, **_loading(config)).eval().to(_device(config))
        self.room = config.max_model_len or self.model.config.get_text_config().max_position_embeddings
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.model.generation_config = GenerationConfig()  # a model's own penalties would join our sampling
        pad = self.tokenizer.pad_token_id
        self.pad = pad if pad is not None else (self.ends or [0])[0]
        self.queue: list[tuple[int, GenerationRequest, list[int]]] = []

    def add(self, key: int, request: GenerationRequest) -> None:
        ids = prompt_ids(self.tokenizer, request.messages, self.config.system_prompt)
        if len(ids) >= self.room:
            raise ValueError(f"prompt too long: {len(ids)} tokens, the model takes {self.room}")
        self.queue.append((key, request, ids))

    def step(self) -> list[tuple[int, Answer]]:
        """One batch of prompts that leave the same room, so that a long one does not cut its neighbours short."""
        batch: list[tuple[int, GenerationRequest, list[int]]] = []
        later, rows = [], 0
        for entry in self.queue:
            fits = rows + entry[1].samples <= self.config.batch_size
            if not batch or (fits and self._room_after(entry[2]) == self._room_after(batch[0][2])):
                batch.append(entry)
                rows += entry[1].samples
            else:
                later.append(entry)
        self.queue = later
        return self._generate(batch) if batch else []

    def _room_after(self, prompt: list[int]) -> int:
        """Tokens that a completion may have."""
        return min(self.config.sampling.max_tokens, self.room - len(prompt))

    def close(self) -> None:
        self.model = None

    @torch.inference_mode()
    def _generate(self, batch: list[tuple[int, GenerationRequest, list[int]]]) -> list[tuple[int, Answer]]:
        prompts = [ids for _, request, ids in batch for _ in range(request.samples)]
        seeds = [request.seed + request.first + i for _, request, _ in batch for i in range(request.samples)]
        ids, mask = _pad(prompts, self.pad, left=True, device=self.model.device)
        longest = ids.shape[1]
        sampler = SeededSampler(torch.tensor(seeds, device=ids.device), self.config.sampling)
        generation = GenerationConfig(
            max_new_tokens=self._room_after(batch[0][2]),
            do_sample=False,  # the sampler decides; generate only has to take its choice
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
        )
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation,
            logits_processor=LogitsProcessorList([sampler]),
        )[:, longest:].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).double().cpu()
        samples = [self._sample(tokens, logprobs[row]) for row, tokens in enumerate(output)]
        answers, row = [], 0
        for key, request, prompt in batch:
            answers.append((key, Answer(len(prompt), samples[row : row + request.samples])))
            row += request.samples
        return answers

    def _sample(self, tokens: list[int], logprobs: torch.Tensor) -> Sample:
        """tokens and logprobs: one row of the batch, [steps]; what follows the end token is padding."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        reason = "length" if end is None else "stop"
        return Sample(written(self.tokenizer, kept, reason), reason, len(kept), logprobs[: len(kept)].sum().item())


class TransformersRewardModel:
    def __init__(self, config: ScorerConfig, model: str) -> None:
        self.config = config
        self.tokenizer = _tokenizer(config, model)
        self.model = (
            AutoModelForSequenceClassification.from_pretrained(model, **_loading(config)).eval().to(_device(config))
        )
        if self.model.config.num_labels != 1:
            raise RunError(f"scorer {config.name!r}: {model} has {self.model.config.num_labels} outputs, not one")
        self.text_config = self.model.config.get_text_config()
        self.pad: int | None = self.text_config.pad_token_id
        self.room = config.max_model_len or self.text_config.max_position_embeddings
        self.queue: list[tuple[int, list[int]]] = []

    def add(self, key: int, request: ScoringRequest) -> None:
        ids = scored_ids(self.tokenizer, request.messages, request.completion)
        if len(ids) > self.room:
            raise ValueError(f"too long: {len(ids)} tokens, the reward model takes {self.room}")
        self.queue.append((key, ids))

    @torch.inference_mode()
    def step(self) -> list[tuple[int, float]]:
        batch, self.queue = self.queue[: self.config.batch_size], self.queue[self.config.batch_size :]
        if not batch:
            return []
        rows = [ids for _, ids in batch]
        # The model reads its reward at the last token that is not padding. Where it names no padding token, one is
        # chosen that no row ends with: the tokenizer's is often the end token itself.
        last = {row[-1] for row in rows if row}
        pad = self.pad if self.pad is not None else next(i for i in count() if i not in last)
        self.text_config.pad_token_id = pad
        ids, mask = _pad(rows, pad, left=False, device=self.model.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].double().tolist()
        return [(key, logit) for (key, _), logit in zip(batch, logits, strict=True)]

    def close(self) -> None:
        self.model = None


class SeededSampler(LogitsProcessor):
    """Draws each row's next token from its own random stream, and notes the log-probability of what it drew.

    seeds: int tensor [rows]. After generation `logprobs` holds one float tensor [rows] per step: the log-probability
    under the untempered model.
    """

    def __init__(self, seeds: torch.Tensor, sampling: SamplingConfig) -> None:
        self.seeds = seeds
        self.temperature = sampling.temperature
        self.filters: list[Any] = []
        if sampling.top_k:
            self.filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.filters.append(TopPLogitsWarper(sampling.top_p))
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        if self.temperature == 0:
            choice = scores.argmax(dim=-1, keepdim=True)
        else:
            tempered = scores.float() / self.temperature
            for keep in self.filters:
                tempered = keep(input_ids, tempered)
            noise = gumbel(self.seeds, len(self.logprobs), scores.shape[-1])
            choice = (tempered + noise).argmax(dim=-1, keepdim=True)
        self.logprobs.append(torch.log_softmax(scores.float(), dim=-1).gather(1, choice).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, choice, 0.0)


def gumbel(seeds: torch.Tensor, step: int, width: int) -> torch.Tensor:
    """Gumbel noise [rows, width] from (seed, step, column) alone; the same on every device.

    argmax(logits + gumbel) is a draw from softmax(logits). The bits come from SplitMix64's finaliser
    (Steele, Lea and Flood 2014).
    """
    columns = torch.arange(width, device=seeds.device)
    keys = _mix(_mix(seeds.long()) + step)
    bits = _mix(keys[:, None] + columns[None, :])
    uniform = (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52  # never 0 or 1: 53 bits would round to 1
    return -torch.log(-torch.log(uniform)).float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, which wraps around like uint64; shifts are made logical by a mask."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _loading(config: ModelConfig) -> dict[str, Any]:
    return {
        "dtype": config.dtype,
        "revision": config.revision or None,
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
        **config.engine_args,
    }


def _tokenizer(config: ModelConfig, model: str) -> Any:
    return AutoTokenizer.from_pretrained(
        model, revision=config.revision or None, trust_remote_code=config.trust_remote_code
    )


def _device(config: ModelConfig) -> str:
    """Ray shows GPUs also to an actor that reserved none."""
    return "cuda" if config.gpus and torch.cuda.is_available() else "cpu"


def _pad(rows: list[list[int]], pad: int, left: bool, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)
