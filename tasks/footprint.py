"""footprint: what a model needs of a GPU's memory, from its published files alone.

    weights = sizes of the safetensors files, times the bytes of the configured dtype over those of the stored one
    cache per token = 2 x layers x key/value heads x dimensions per head x bytes

Activations and the engine's own needs are what gpu_memory_utilization leaves. Models with another kind of cache (latent
attention, state spaces, sliding windows) need less of it than this says.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import models
from tasks.config import is_local_path
from tasks.errors import ConfigError
from tasks.sections import ModelConfig
from tasks.store import Store

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 2**30
_UTILIZATION = 0.9  # vLLM's own default


@dataclass(frozen=True)
class Footprint:
    weights: float  # bytes
    per_token: float  # bytes of cache
    longest: int  # tokens of a sequence


def fits(config: ModelConfig, store: Store, memory: float | None = None) -> str:
    """Whether the model fits the GPUs of one engine, in words. memory: bytes of a GPU; by default of those here.

    ConfigError when its weights alone do not.
    """
    needs = footprint(config, store)
    if needs is None:
        return "not known: its files are not here"
    words = f"{needs.weights / _GIB:.2g} GiB of weights, {needs.per_token / 2**20:.2g} MiB of cache per token"
    memory = gpu_memory() if memory is None else memory
    if not memory:
        least = (needs.weights + needs.per_token * needs.longest) / _UTILIZATION / max(1.0, config.gpus)
        return f"{words}: {least / _GIB:.2g} GiB per GPU for one sequence of {needs.longest:,} tokens"
    share = config.engine_args.get("gpu_memory_utilization", _UTILIZATION * min(1.0, config.gpus))
    room = memory * share * max(1.0, config.gpus) - needs.weights
    if room <= 0:
        raise ConfigError(
            f"gpus: {config.gpus:g}: {words} do not fit {memory * share * max(1.0, config.gpus) / _GIB:.3g} GiB; raise "
            "gpus, over which vLLM splits the model, or take a smaller dtype"
        )
    tokens = room / needs.per_token
    if tokens < needs.longest:
        raise ConfigError(
            f"max_model_len: {words} leave room for {tokens:,.0f} tokens, less than one sequence of {needs.longest:,}; "
            "lower max_model_len, or raise gpus"
        )
    return f"{words}: room for {tokens / needs.longest:,.0f} sequences of {needs.longest:,} tokens at once"


def footprint(config: ModelConfig, store: Store) -> Footprint | None:
    """None where the files are not on this machine."""
    folder = _folder(config, store)
    if folder is None or not (folder / "config.json").exists():
        return None
    about: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    about = {**about, **about.get("text_config", {})}
    stored = _BYTES.get(str(about.get("dtype") or about.get("torch_dtype")), 2)
    held = stored if config.dtype == "auto" else _BYTES[config.dtype]
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) * held / stored
    heads = about.get("num_attention_heads", 1)
    dimension = about.get("head_dim") or about.get("hidden_size", 0) // heads
    per_token = 2 * about.get("num_hidden_layers", 0) * (about.get("num_key_value_heads") or heads) * dimension * held
    longest = config.max_model_len or about.get("max_position_embeddings", 0)
    return Footprint(weights, per_token, longest) if weights and per_token and longest else None


def _folder(config: ModelConfig, store: Store) -> Path | None:
    """Where its files are: a folder, a policy of the store, or the hub's cache; nothing is downloaded from the hub."""
    if config.model.startswith(models.POLICY) or is_local_path(config.model):
        return Path(os.path.expanduser(models.local(config.model, store)))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.model, revision=config.revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def gpu_memory() -> float:
    """Bytes of the smallest GPU here; 0 where there is none."""
    if not os.path.isdir("/proc/driver/nvidia/gpus"):
        return 0.0  # without torch, whose import takes seconds
    import torch

    cards = range(torch.cuda.device_count())
    return float(min((torch.cuda.get_device_properties(card).total_memory for card in cards), default=0))
