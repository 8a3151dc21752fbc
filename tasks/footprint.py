"""footprint: what a model needs of a GPU's memory, from its published files alone.

    weights = sizes of the tensors in its safetensors files, floats in the type that they are loaded as
    cache per token = 2 x layers x key/value heads x dimensions per head x bytes, on vLLM, which reserves it

Activations and the engine's own needs are what gpu_memory_utilization leaves. Models with another kind of cache (latent
attention, state spaces, sliding windows) need less of it than this says: weights that do not fit are an error, a cache
that seems not to is told.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import models
from tasks.config import is_local_path
from tasks.engines import VLLM_MEMORY
from tasks.errors import ConfigError
from tasks.sections import GeneratorConfig, ModelConfig, ScorerConfig
from tasks.store import Store
from tasks.training import PolicyConfig

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"F32": 4, "BF16": 2, "F16": 2}  # of a number in safetensors; others are quantised, and stay as they are
_HEADER = 100_000_000  # bytes, at most, of what a safetensors file says of its tensors
_GIB = 2**30
_DECIDING = ("quantization", "quantization_config", "cpu_offload_gb", "device_map")  # engine_args


@dataclass(frozen=True)
class Footprint:
    weights: float  # bytes
    per_token: float  # bytes of cache; 0 where its config.json does not say
    longest: int  # tokens of a sequence; 0 likewise


def fits(config: GeneratorConfig | ScorerConfig, store: Store, memory: float | None = None) -> str:
    """Whether the model fits the GPUs of one engine, in words. memory: bytes of a GPU; by default of those here.

    ConfigError when its weights alone do not.
    """
    if decides := [name for name in _DECIDING if name in config.engine_args]:
        return f"not known: engine_args has {decides[0]}, which decides it"
    needs = footprint(config, store)
    if isinstance(needs, str):
        return f"not known: {needs}"
    memory = gpu_memory() if memory is None else memory
    return _on_vllm(needs, config, memory) if config.engine == "vllm" else _on_transformers(needs, memory)


def fits_training(config: PolicyConfig, store: Store) -> str:
    """The weights alone, in words: gradients, optimiser and activations depend on how it is trained."""
    needs = footprint(ModelConfig(model=config.model, revision=config.revision, dtype=config.dtype), store)
    if isinstance(needs, str):
        return f"not known: {needs}"
    return f"not estimated; {_gib(needs.weights)} of weights in {config.dtype}, and what training takes beside them"


def _on_transformers(needs: Footprint, memory: float) -> str:
    words = f"{_gib(needs.weights)} of weights"
    if needs.weights > memory > 0:
        raise ConfigError(
            f"engine: transformers: {words} do not fit a GPU of {_gib(memory)}, and it does not split a model; take a "
            "smaller dtype, or engine: vllm with more gpus"
        )
    return f"{words}: leave {_gib(memory - needs.weights)} of one GPU" if memory else f"{words}, all on one GPU"


def _on_vllm(needs: Footprint, config: ModelConfig, memory: float) -> str:
    parts = max(1.0, config.gpus)
    share = config.engine_args.get("gpu_memory_utilization", VLLM_MEMORY * min(1.0, config.gpus))
    words, cache = f"{_gib(needs.weights)} of weights", needs.per_token * needs.longest
    if cache:
        words = f"{words}, {needs.per_token / 2**20:,.3f} MiB of cache per token"
    if not memory:
        least = _gib((needs.weights + cache) / share / parts)
        if cache:
            return f"{words}: {least} per GPU for one sequence of {needs.longest:,} tokens"
        return f"{words}: {least} per GPU, and a cache of which its config.json does not say how large it is"
    room = memory * share * parts - needs.weights
    if room <= 0:
        raise ConfigError(
            f"gpus: {config.gpus:g}: {words} do not fit {_gib(memory * share * parts)}; raise gpus, over which vLLM "
            "splits the model, or take a smaller dtype"
        )
    if not cache:
        return f"{words}: leave {_gib(room)} for a cache of which its config.json does not say how large it is"
    tokens = room / needs.per_token
    if tokens < needs.longest:
        return (
            f"{words}: room for {tokens:,.0f} tokens, less than one sequence of {needs.longest:,}; if vLLM refuses to "
            "start, lower max_model_len or raise gpus"
        )
    return f"{words}: room for {tokens / needs.longest:,.0f} sequences of {needs.longest:,} tokens at once"


def footprint(config: ModelConfig, store: Store) -> Footprint | str:
    """Or why it is not known. ConfigError where a file is damaged."""
    folder = _folder(config, store)
    if folder is None or not (folder / "config.json").exists():
        return "its files are not here"
    files = _weight_files(folder)
    if not all(file.exists() for file in files):
        return "not all of its files are here"
    if not files:
        return "it has no safetensors"
    about = _object(folder / "config.json", (folder / "config.json").read_bytes())
    arguments, on_vllm = config.engine_args, getattr(config, "engine", "") == "vllm"
    dtype = arguments.get("dtype", config.dtype)
    if dtype == "auto":
        dtype = about.get("dtype") or about.get("torch_dtype")
    # Where nobody says, transformers takes the weights as they are, and vLLM halves float32.
    held = _BYTES.get(str(dtype)) or (2 if on_vllm else None)
    weights = sum(_loaded(file, held) for file in files)
    about |= about.get("text_config") or {}
    asked = arguments.get("max_model_len", config.max_model_len) if on_vllm else config.max_model_len
    longest = asked if isinstance(asked, int) and asked > 0 else _number(about, "max_position_embeddings")
    cached = str(arguments.get("kv_cache_dtype", "auto"))
    numbers = _numbers_per_token(about) if on_vllm else 0
    return Footprint(weights, numbers * (1 if cached.startswith("fp8") else _BYTES.get(cached, held or 0)), longest)


def _numbers_per_token(about: dict[str, Any]) -> int:
    """That the cache holds; 0 where config.json does not say, or has other names for it."""
    heads = _number(about, "num_attention_heads")
    dimension = _number(about, "head_dim") or _number(about, "hidden_size") // max(1, heads)
    return 2 * _number(about, "num_hidden_layers") * (_number(about, "num_key_value_heads") or heads) * dimension


def _number(about: dict[str, Any], name: str) -> int:
    """0 where there is none."""
    return about[name] if isinstance(about.get(name), int) else 0


def _folder(config: ModelConfig, store: Store) -> Path | None:
    """Where its files are: a folder, a policy of the store, or the hub's cache; nothing is downloaded from the hub."""
    if config.model.startswith(models.POLICY) or is_local_path(config.model):
        return Path(os.path.expanduser(models.local(config.model, store)))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.model, revision=config.revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):  # ValueError: a path with nothing there is no hub name
        return None


def _weight_files(folder: Path) -> list[Path]:
    """Those that are loaded: some models come with their weights twice."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return [folder / name for name in sorted(set(_object(index, index.read_bytes())["weight_map"].values()))]
    if whole.exists():
        return [whole]
    return [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("consolidated")]


def _loaded(file: Path, held: int | None) -> float:
    """Bytes of a safetensors file's tensors once loaded. held: bytes of a float; None for as many as in the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        tensors = _object(file, opened.read(min(length, _HEADER)))
    tensors.pop("__metadata__", None)
    size = 0.0
    for tensor in tensors.values():
        start, end = tensor["data_offsets"]
        stored = _STORED.get(tensor["dtype"])
        size += (end - start) * (held / stored if held and stored else 1)
    return size


def _object(file: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that a file holds, or begins with. ConfigError where it does not."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"model: {file} is damaged: it has no JSON object where it should; fetch it again")
    return found


def gpu_memory() -> float:
    """Bytes of the smallest GPU here; 0 where there is none."""
    # A look at the driver first, without torch, whose import takes seconds.
    if not os.path.isdir("/proc/driver/nvidia/gpus") or importlib.util.find_spec("torch") is None:
        return 0.0
    import torch

    cards = range(torch.cuda.device_count())
    return float(min((torch.cuda.get_device_properties(card).total_memory for card in cards), default=0))


def _gib(size: float) -> str:
    return f"{size / _GIB:,.2f} GiB"
