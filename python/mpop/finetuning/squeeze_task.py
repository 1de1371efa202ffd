"""Squeezing a fine-tuned MPO model on a GLUE task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mpop.checkpoints.folder import save
from mpop.checkpoints.opening import is_compressed
from mpop.finetuning.classifier import load_for_evaluation, trainable
from mpop.finetuning.rows import check_choice, check_positive, predict, prepared, subset, unlabelled
from mpop.finetuning.settle import Settler
from mpop.finetuning.squeeze import SqueezeRound, check_bounds, plot_trace, squeeze
from mpop.finetuning.trainer import Collator, MPOTrainer, runtime_arguments
from mpop.models.light import count_parameters


def squeeze_on_task(
    model_name_or_path: str | Path,
    task: str,
    output: str | Path,
    *,
    max_drop: float,
    data_dir: str | Path | None = None,
    eval_split: str = "dev",
    max_rounds: int = 50,
    step: float = 0.05,
    settle_steps: int = 200,
    window: int = 20,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
    max_length: int = 128,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    calibration_samples: int = 1500,
    precision: str = "fp32",
    seed: int = 0,
    resume: bool = False,
    on_round: Callable[[SqueezeRound], None] | None = None,
    prepare: Callable[[PreTrainedModel], Any] | None = None,
) -> dict[str, Any]:
    """Squeeze a compressed, fine-tuned model with light fine-tuning between the cuts, and save it.

    Beside the model lie `squeeze.json`, `squeeze/trace.jsonl` (a line a round), `squeeze/trace.png`
    (metric against parameters) and `squeeze/state.pt`, from which `resume` goes on.

    Args:
        model_name_or_path: a folder with an MPO model of the task.
        max_drop: how far the task's metric, a fraction of 1, may fall.
        max_rounds, step: see `mpop.squeeze`.
        settle_steps: optimizer steps between two cuts at most.
        window: steps whose mean loss tells whether it has settled.
        learning_rate: constant rate of all that is trained; low, since the model has been trained
            to the end of its schedule.
        calibration_samples: training rows that show what a cut does to the model's output; with 0
            each matrix's own relative error counts.
        precision: `"fp32"`, or autocast to `"bf16"`.
        The other arguments are those of `finetune`.

    Returns:
        The content of `squeeze.json`: the report and the settings.

    Raises:
        ValueError: a bad argument, data file or checkpoint, or what `mpop.squeeze` says.
        FloatingPointError: a loss that is no longer finite.
    """
    check_positive(
        settle_steps=settle_steps, window=window, batch_size=batch_size, learning_rate=learning_rate
    )
    check_bounds(max_drop, step, max_rounds)
    if calibration_samples < 0:
        raise ValueError(f"calibration_samples: expected at least 0, got {calibration_samples}")
    check_choice("precision", precision, ("fp32", "bf16"))
    if not is_compressed(model_name_or_path):
        raise ValueError(
            f"{model_name_or_path} is dense; fine-tune it with --method light first, then squeeze"
        )
    start = prepared(
        model_name_or_path,
        task,
        output,
        lambda task: trainable(load_for_evaluation(model_name_or_path, task), "light"),
        prepare,
        data_dir=data_dir,
        eval_split=eval_split,
        max_length=max_length,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
        seed=seed,
    )
    model, collate = start.model, Collator(start.tokenizer)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.01,
        report_to="none",
        disable_tqdm=True,
        **runtime_arguments(precision),
    )
    trainer = MPOTrainer(model=model, args=arguments, mpo_learning_rate=learning_rate)
    model.to(arguments.device)
    judge = Trainer(model=model, args=arguments, data_collator=collate)
    tuner = Settler(
        model,
        start.train,
        collate,
        trainer.create_optimizer(),
        batch_size=batch_size,
        window=window,
        max_steps=settle_steps,
        seed=seed,
        autocast=torch.bfloat16 if precision == "bf16" else None,
    )
    batches = unlabelled(subset(start.train, calibration_samples), start.tokenizer)
    folder = Path(output) / "squeeze"
    report = squeeze(
        model,
        evaluate=lambda: predict(judge, start.task, start.evaluation)[0][start.task.metric],
        finetune=tuner,
        max_drop=max_drop,
        calibration=batches or None,
        max_steps=max_rounds,
        step=step,
        state=folder / "state.pt",
        resume=resume,
        settings={
            "task": start.task.name,
            "eval_split": eval_split,
            **start.conditions,
            "model": Path(model_name_or_path).name,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "max_length": start.max_length,
            "settle_steps": settle_steps,
            "window": window,
            "calibration_samples": calibration_samples,
            "precision": precision,
            "seed": seed,
        },
        on_round=on_round,
    )
    save(model, output)
    start.tokenizer.save_pretrained(output)
    result = {
        "task": start.task.name,
        "metric_name": start.task.metric,
        **report.to_dict(),
        "trainable_parameters": count_parameters(model).trainable,
        "max_drop": max_drop,
        "eval_split": eval_split,
        "learning_rate": learning_rate,
        **start.conditions,
        "seed": seed,
        "model": str(model_name_or_path),
        "output": str(output),
    }
    text = json.dumps(result, indent=2) + "\n"
    (Path(output) / "squeeze.json").write_text(text, encoding="utf-8")
    plot_trace(report, folder / "trace.png")
    return result
