"""DPO through TRL, from a local copy of a published version to a local model folder.

Loss: -log sigmoid(beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))]), beta on summed
log-probabilities (Rafailov et al. 2023, arXiv 2305.18290; the implementation is TRL's). The reference is the model that
training starts from; its log-probabilities are computed once before the first step, so it takes no memory during
training. At step 1 policy and reference are equal and the loss is ln 2: anything else means broken data or model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tasks.config import TrainConfig
from tasks.errors import RunError
from tasks.records import Counts

OnStep = Callable[[int, int, dict[str, float]], None]  # step, steps, metrics
OnSave = Callable[[Path], None]  # folder of a finished checkpoint


def train_dpo(
    config: TrainConfig,
    model: str,
    data: Path,
    folder: Path,
    on_step: OnStep,
    on_save: OnSave,
    checkpoint: Path | None = None,
) -> Counts:
    """Train; leaves folder/model and folder/metrics.jsonl. Returns pairs in, trained on, and dropped as too long.

    model: folder or hub name; data: folder with the version's Parquet files; checkpoint: folder to resume from.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        model, revision=config.policy.revision or None, trust_remote_code=config.policy.trust_remote_code
    )
    pairs, counts = _load_pairs(data, tokenizer, config.train.max_length, folder / "cache")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model,
            revision=config.policy.revision or None,
            trust_remote_code=config.policy.trust_remote_code,
            dtype=config.policy.dtype,
        ),
        args=_arguments(config, folder / "checkpoints", counts.out),
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[_Follow(on_step, on_save)],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder / "model"))
    (folder / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle: nobody needs it, nobody should load it
    steps = [_lasting(entry) for entry in trainer.state.log_history if "loss" in entry]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step, sort_keys=True) + "\n" for step in steps))
    return counts


def _lasting(entry: dict[str, float]) -> dict[str, float]:
    """A step's metrics that are the same however often training was interrupted: TRL counts tokens from the last start.

    For the same reason the summary at the end, which holds times, is left out: a policy's version depends on no clock.
    """
    return {name: value for name, value in entry.items() if name != "num_tokens"}


def _load_pairs(data: Path, tokenizer: Any, max_length: int, cache: Path) -> tuple[Dataset, Counts]:
    """The pairs that fit into max_length. TRL would cut the longer ones, and drop the longest, without a word."""
    files = sorted(str(file) for file in data.glob("*.parquet"))
    pairs = load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    fitting = pairs.filter(lambda row: _tokens(tokenizer, row) <= max_length)
    dropped = len(pairs) - len(fitting)
    if not len(fitting):
        raise RunError(f"train: all {len(pairs)} pairs are longer than max_length {max_length}; raise it")
    return fitting, Counts(len(pairs), len(fitting), {"longer than max_length": dropped} if dropped else {})


def _tokens(tokenizer: Any, row: dict[str, Any]) -> int:
    """Tokens of the prompt with the longer response."""
    sides = [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    return max(len(tokenizer.apply_chat_template(side, tokenize=True, return_dict=False)) for side in sides)


def _arguments(config: TrainConfig, folder: Path, pairs: int) -> DPOConfig:
    train = config.train
    micro = min(train.micro_batch_size, train.batch_size)
    steps = train.max_steps or max(1, math.ceil(train.epochs * pairs / train.batch_size))
    on_gpu = torch.cuda.is_available() and config.policy.gpus > 0
    return DPOConfig(
        output_dir=str(folder),
        loss_type=["sigmoid"],
        beta=train.beta,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(train.warmup_ratio * steps),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=train.batch_size // micro,
        max_length=train.max_length,
        gradient_checkpointing=train.gradient_checkpointing,
        bf16=config.policy.dtype == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        precompute_ref_log_probs=True,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen
        save_steps=train.save_steps or max(1, math.ceil(steps / 10)),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )


class _Follow(TrainerCallback):
    """Passes steps and checkpoints on, and stops a run that cannot come to anything."""

    def __init__(self, on_step: OnStep, on_save: OnSave) -> None:
        self.report_step, self.report_save = on_step, on_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise RunError(
                f"train: the loss is {loss} at step {state.global_step}; lower learning_rate, check the data"
            )
        if state.global_step == 1 and abs(loss - math.log(2)) > 0.02:
            raise RunError(f"train: DPO's loss at step 1 is {loss:.4f}, not ln 2: policy and reference differ")
        self.report_step(state.global_step, state.max_steps, dict(logs or {}))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report_save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
