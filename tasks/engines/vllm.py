"""vLLM as an engine, on GPUs and on its CPU build.

Requests go straight to the engine core's step loop (`llm.llm_engine`), which takes new requests between steps; the
`LLM.generate` call around it would drain after every shard. The engine stays in the actor's own process unless the
environment says otherwise: a second process would import everything again (about 50 s on a small CPU machine).
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU build only
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from transformers import AutoConfig
from vllm import LLM, PoolingParams, SamplingParams, TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tasks.engines import VLLM_MEMORY, Answer, ChatRequest, GenerationRequest, Reply, Sample, ScoringRequest
from tasks.engines.chat import prompt_ids, scored_ids, written
from tasks.errors import RunError
from tasks.sections import GeneratorConfig, ModelConfig, ScorerConfig


class _VllmEngine:
    def __init__(self, config: ModelConfig, model: str, runner: str) -> None:
        self.config = config
        self.llm = LLM(model=model, **{**_arguments(config, model, runner), **config.engine_args})
        self.engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        self.room = self.llm.model_config.max_model_len

    def enter(self, key: int, ids: list[int], params: Any) -> None:
        try:
            self.engine.add_request(str(key), TokensPrompt(prompt_token_ids=ids), params)
        except VLLMClientError as error:
            raise ValueError(str(error)) from error

    def close(self) -> None:
        """Shut the core down: children that outlive it would keep their GPU memory."""
        self.engine.engine_core.shutdown()


class VllmGenerator(_VllmEngine):
    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig, model: str) -> None:
        super().__init__(config, model, "generate")

    def add(self, key: int, request: GenerationRequest) -> None:
        ids = prompt_ids(self.tokenizer, request.messages, self.config.system_prompt)
        if len(ids) >= self.room:
            raise ValueError(f"prompt too long: {len(ids)} tokens, the model takes {self.room}")
        self.enter(key, ids, self.params(request))

    def params(self, request: GenerationRequest) -> SamplingParams:
        """vLLM gives child i of a request the seed + i, so a sample's stream does not depend on the range."""
        sampling = self.config.sampling
        return SamplingParams(
            n=request.samples,
            seed=request.seed + request.first,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            logprobs=0,  # the drawn token's only; cumulative_logprob needs it
            flat_logprobs=True,  # one list instead of an object per token
            detokenize=False,  # once per sample instead of at every token, below
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def step(self) -> list[tuple[int, Answer]]:
        return [(_key(output), _answer(output, self.tokenizer)) for output in self.engine.step() if output.finished]


class VllmRewardModel(_VllmEngine):
    def __init__(self, config: ScorerConfig, model: str) -> None:
        super().__init__(config, model, "pooling")
        labels = self.llm.model_config.hf_config.num_labels
        if labels != 1:
            raise RunError(f"scorer {config.name!r}: {model} has {labels} outputs, not one")
        # The default activation would squeeze the logit by a sigmoid, and every margin and PVar with it.
        self.params = PoolingParams(task="classify", use_activation=False)

    def add(self, key: int, request: ScoringRequest) -> None:
        ids = scored_ids(self.tokenizer, request.messages, request.completion)
        if len(ids) > self.room:
            raise ValueError(f"too long: {len(ids)} tokens, the reward model takes {self.room}")
        self.enter(key, ids, self.params.clone())

    def step(self) -> list[tuple[int, float]]:
        ready: list[Any] = [output for output in self.engine.step() if output.finished]
        return [(_key(output), output.outputs.data[0].item()) for output in ready]


class VllmJudge(_VllmEngine):
    config: ScorerConfig

    def __init__(self, config: ScorerConfig, model: str) -> None:
        super().__init__(config, model, "generate")

    def add(self, key: int, request: ChatRequest) -> None:
        ids = prompt_ids(self.tokenizer, request.messages)
        asked = self.config.judge.max_tokens
        if len(ids) + asked > self.room:  # a reply that is cut cannot be read
            raise ValueError(f"too long: {len(ids)} tokens and max_tokens {asked}, the judge takes {self.room}")
        self.enter(key, ids, self.params(request))

    def params(self, request: ChatRequest) -> SamplingParams:
        return SamplingParams(
            seed=request.seed,
            temperature=self.config.judge.temperature,
            max_tokens=self.config.judge.max_tokens,
            structured_outputs=StructuredOutputsParams(json=request.schema),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def step(self) -> list[tuple[int, Reply]]:
        ready: list[Any] = [output for output in self.engine.step() if output.finished]
        return [(_key(output), self._reply(output)) for output in ready]

    def _reply(self, output: Any) -> Reply:
        [drawn] = output.outputs
        text = written(self.tokenizer, list(drawn.token_ids), drawn.finish_reason)
        return Reply(text, len(output.prompt_token_ids), len(drawn.token_ids))


def _arguments(config: ModelConfig, model: str, runner: str) -> dict[str, Any]:
    tensor, pipeline = config.parallel
    arguments: dict[str, Any] = {
        "runner": runner,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "dtype": _dtype(config, model),
        "revision": config.revision or None,
        "trust_remote_code": config.trust_remote_code,
        "max_model_len": config.max_model_len or None,
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
    if isinstance(config, ScorerConfig) and config.type == "judge":
        # JSON may hold blanks without end, and a weak model fills a reply with them. vLLM 0.32 reads this here alone:
        # it ignores the field of the same name in StructuredOutputsParams.
        arguments["structured_outputs_config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
    if 0 < config.gpus < 1:
        arguments["gpu_memory_utilization"] = VLLM_MEMORY * config.gpus
    if current_platform.is_cpu():
        arguments["enforce_eager"] = True  # compiling pays off on large models only
        if tensor * pipeline > 1:  # to be bound to cores, each part would need a memory node of its own
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if runner == "generate":
            # A seeded request whose prefill is chunked dies on CPU: "CPU Generator does not use offset".
            arguments["enable_chunked_prefill"] = False
    return arguments


def _dtype(config: ModelConfig, model: str) -> str:
    """vLLM's own `auto` halves float32 weights; here auto is what the weights are, on every engine."""
    if config.dtype != "auto":
        return config.dtype
    about = AutoConfig.from_pretrained(
        model, revision=config.revision or None, trust_remote_code=config.trust_remote_code
    )
    return str(about.dtype).removeprefix("torch.") if about.dtype else "auto"


def _key(output: Any) -> int:
    return int(output.request_id.split("-", 1)[0])


def _answer(output: Any, tokenizer: Any) -> Answer:
    samples = [
        Sample(
            written(tokenizer, list(drawn.token_ids), drawn.finish_reason),
            drawn.finish_reason,
            len(drawn.token_ids),
            drawn.cumulative_logprob,
        )
        for drawn in sorted(output.outputs, key=lambda drawn: drawn.index)
    ]
    return Answer(len(output.prompt_token_ids), samples)
