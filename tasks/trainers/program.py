"""The training program: a local copy of a published version in, a model folder and its metrics out, by TRL.

At step 1 policy and reference are equal: log-ratios are 0 and DPO's loss is ln 2. Anything else means broken data or a
broken model, and ends the run before it costs more.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, KTOConfig

from tasks.config import TrainConfig
from tasks.errors import ConfigError, RunError
from tasks.objectives import kto
from tasks.objectives.settings import Kto
from tasks.records import Counts
from tasks.trainers.data import load_pairs, unpaired
from tasks.trainers.pairs import Kept, PairTrainer
from tasks.trainers.unpaired import UnpairedTrainer
from tasks.training import micro_batch

_LN2 = {"dpo", "dpo_norm", "gdpo", "dadpo", "tisdpo"}  # the loss where policy and reference are equal
_CLOSE = 0.02


@dataclass(frozen=True)
class Hooks:
    """What the program tells whoever started it."""

    on_step: Callable[[int, int, dict[str, float]], None]  # step, steps, metrics
    on_save: Callable[[Path], None]  # folder of a finished checkpoint


@dataclass(frozen=True)
class Files:
    """Local places. model, helpers: folders or hub names; data: folder with the version's Parquet files; work: where
    `model`, `metrics.jsonl` and `logs` are left; checkpoint: folder to go on from."""

    model: str
    data: Path
    work: Path
    checkpoint: Path | None = None
    helpers: tuple[str, ...] = ()


def run(config: TrainConfig, files: Files, kept: Kept, hooks: Hooks) -> Counts:
    """Train. Returns pairs in, trained on, and dropped as too long."""
    tokenizer = AutoTokenizer.from_pretrained(
        files.model, revision=config.policy.revision or None, trust_remote_code=config.policy.trust_remote_code
    )
    pairs, counts = load_pairs(config, files.data, tokenizer, files.work / "cache")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(files.work / "logs")
    trainer = _trainer(config, files, kept, hooks, pairs, tokenizer)
    trainer.train(resume_from_checkpoint=str(files.checkpoint) if files.checkpoint else None)
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if config.train.lora:
            model = model.float().merge_and_unload()  # in a narrower type, small changes would be rounded away
        model.to(getattr(torch, config.policy.dtype)).save_pretrained(files.work / "model")
        tokenizer.save_pretrained(files.work / "model")
        steps = [_lasting(entry) for entry in trainer.state.log_history if "loss" in entry]
        lines = "".join(json.dumps(step, sort_keys=True) + "\n" for step in steps)
        (files.work / "metrics.jsonl").write_text(lines)
    trainer.accelerator.wait_for_everyone()
    if wandb := sys.modules.get("wandb"):
        wandb.finish()  # or a process that trains on would write into the same run
    return counts


def _trainer(
    config: TrainConfig, files: Files, kept: Kept, hooks: Hooks, pairs: Dataset, tokenizer: Any
) -> PairTrainer | UnpairedTrainer:
    # What is trained is float32: in bfloat16 most weights do not take a step of 1e-6. Adapters are so by themselves.
    common: dict[str, Any] = {
        "model": _load(config, files.model, config.policy.dtype if config.train.lora else "float32"),
        "peft_config": _adapters(config),
        "processing_class": tokenizer,
        "callbacks": [_Follow(config, hooks)],
    }
    settings = config.train.settings
    if isinstance(settings, Kto):
        rows = unpaired(pairs, config.train.seed)
        desirable, undesirable = kto.weights(sum(rows["label"]), len(rows) - sum(rows["label"]), settings)
        return UnpairedTrainer(
            args=KTOConfig(
                **_arguments(config, files, len(pairs), per_pair=2),
                beta=settings.beta,
                desirable_weight=desirable,
                undesirable_weight=undesirable,
            ),
            train_dataset=rows,
            **common,
        )
    arguments = DPOConfig(
        **_arguments(config, files, len(pairs)),
        beta=settings.beta,
        loss_type=[settings.trl or "sigmoid"],
        train_sampling_strategy="sequential" if config.train.by_margin else "random",
    )
    helpers = [partial(_load, config, model, config.policy.dtype) for model in files.helpers]
    return PairTrainer(config, kept, helpers, args=arguments, train_dataset=pairs, **common)


def _load(config: TrainConfig, model: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        model,
        revision=config.policy.revision or None,
        trust_remote_code=config.policy.trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
    )


def _adapters(config: TrainConfig) -> LoraConfig | None:
    lora = config.train.lora
    if lora is None:
        return None
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _lasting(entry: dict[str, float]) -> dict[str, float]:
    """A step's metrics that are the same however often training was interrupted: TRL counts tokens from the last start.

    For the same reason the summary at the end, which holds times, is left out: a policy's version depends on no clock.
    """
    return {name: value for name, value in entry.items() if name != "num_tokens"}


def _arguments(config: TrainConfig, files: Files, pairs: int, per_pair: int = 1) -> dict[str, Any]:
    """per_pair: rows of a batch that stand for one of the configuration's pairs."""
    train, workers = config.train, config.policy.workers
    micro = micro_batch(train, config.policy)
    steps = train.max_steps or max(1, math.ceil(train.epochs * pairs / train.batch_size))
    on_gpu = config.policy.gpus > 0
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("policy.gpus: PyTorch sees no GPU here; install its CUDA build, or set gpus: 0")
    return {
        "output_dir": str(files.work / "checkpoints"),
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(train.warmup_ratio * steps),
        "max_steps": steps,
        "per_device_train_batch_size": micro * per_pair,
        "gradient_accumulation_steps": train.batch_size // (micro * workers),
        "max_length": train.max_length,
        "gradient_checkpointing": train.gradient_checkpointing,
        "bf16": config.policy.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "disable_dropout": not (train.lora and train.lora.dropout),
        "dataloader_pin_memory": on_gpu,
        "precompute_ref_log_probs": True,
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN loss must be seen
        "save_steps": train.save_steps or max(1, math.ceil(steps / 10)),
        "save_total_limit": 2,
        "report_to": train.report_to or "none",
        "run_name": config.name,
        "disable_tqdm": True,
    }


class _Follow(TrainerCallback):
    """Passes steps and checkpoints on, and stops a run that cannot come to anything."""

    def __init__(self, config: TrainConfig, hooks: Hooks) -> None:
        self.config, self.hooks = config, hooks

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise RunError(
                f"train: the loss is {loss} at step {state.global_step}; lower learning_rate, check the data"
            )
        objective = self.config.train.objective
        if state.global_step == 1 and objective in _LN2 and abs(loss - math.log(2)) > _CLOSE:
            raise RunError(
                f"train: {objective}'s loss at step 1 is {loss:.4f}, not ln 2: policy and reference differ; check the "
                "model, or remove what the store keeps under references/"
            )
        if state.is_world_process_zero:
            self.hooks.on_step(state.global_step, state.max_steps, dict(logs or {}))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.hooks.on_save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
