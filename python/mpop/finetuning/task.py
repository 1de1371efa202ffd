"""Fine-tuning and evaluation on a GLUE task: dense, all MPO tensors, or the light way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mpop.checkpoints.opening import check_file
from mpop.data.glue import Task, get_task
from mpop.finetuning.classifier import load_for_evaluation, load_for_training
from mpop.finetuning.resuming import begin, clear, last_checkpoint
from mpop.finetuning.rows import (
    check_choice,
    check_positive,
    encoded,
    fitting,
    load_dev,
    padding_tokenizer,
    predict,
    prepared,
)
from mpop.finetuning.trainer import (
    Collator,
    MPOTrainer,
    StopWhenDiverged,
    device_name,
    peak_memory,
    reset_peak_memory,
    runtime_arguments,
)
from mpop.models.config import CompressionConfig
from mpop.models.light import count_parameters
from mpop.models.quantized import dequantize_centres, quantize_centres

# Peak rates by method; a light run trains a tenth of the parameters and wants larger steps.
LEARNING_RATES = {"dense": 5e-5, "full": 5e-5, "light": 1e-4}
METHODS = tuple(LEARNING_RATES)
PRECISIONS = ("fp32", "bf16", "fp16")
# Within the output, while it is made.
_FOLDER = "finetuning"


def finetune(
    model_name_or_path: str | Path,
    task: str,
    output: str | Path,
    method: str = "dense",
    *,
    data_dir: str | Path | None = None,
    eval_split: str = "dev",
    config: CompressionConfig | None = None,
    epochs: float = 3.0,
    batch_size: int = 32,
    learning_rate: float | None = None,
    mpo_learning_rate: float | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    gradient_accumulation_steps: int = 1,
    precision: str = "fp32",
    max_length: int = 128,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    save_steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report_to: str = "none",
    prepare: Callable[[PreTrainedModel], Any] | None = None,
    centre_bits: int | None = None,
    **training_arguments: Any,
) -> dict[str, Any]:
    """Fine-tune on a GLUE task, evaluate, and save the model, its tokenizer and the results.

    Beside the model lie `results.json` and `predictions.npz`: the model's outputs on the
    evaluation rows, `[rows, num_labels]` by split.

    Args:
        model_name_or_path: A hub name or folder, dense or already compressed.
        task: A GLUE task name.
        output: The folder to write.
        method: `"dense"`: ordinary fine-tuning. `"full"`: compress, then train every tensor.
            `"light"`: compress and balance, then train all but the central tensors and dense
            embeddings. A checkpoint that is already compressed is trained as it is.
        data_dir: A folder in GLUE's own layout; without it the hub is used.
        eval_split: `"dev"`, or `"train-holdout"`: a tenth of the training rows (at most 1000),
            fixed and not trained on, for choosing settings without looking at dev.
        config: How to compress; by default at full rank, which changes no output, and for a light
            run with the `share` of `mpop.models.light.SHARE` and embeddings left dense.
        epochs: Passes over the training rows.
        batch_size: Rows per device and step.
        learning_rate: Peak rate of ordinary parameters: biases, norms, embeddings, head; by
            default the method's in `LEARNING_RATES`.
        mpo_learning_rate: Peak rate of the trained MPO tensors; `learning_rate` by default.
        weight_decay: AdamW's decay; biases and norms have none.
        warmup: Warm-up as a fraction of all steps; the rate then falls linearly to zero.
        gradient_accumulation_steps: Batches per optimizer step.
        precision: `"fp32"`, or autocast to `"bf16"` or `"fp16"`.
        max_length: Longer inputs are truncated to this many tokens, or to the model's own limit.
        max_train_samples: Train on a fixed random subset of this size.
        max_eval_samples: Evaluate on a fixed random subset of this size.
        seed: Seeds the task head, the data order and dropout.
        save_steps: Every so many steps, write a checkpoint that `resume` can use into the folder
            `finetuning` of the output, from which it goes when the run has ended.
        resume: Go on from the last checkpoint in `output`, with the same result as without the
            interruption, or begin where there is none yet.
        overwrite: Replace a model, or what is left of another run, in `output`.
        report_to: A tracker that transformers knows, e.g. `"tensorboard"`.
        prepare: Called with the loaded model; what it returns is trained instead, such as the
            same with other parameters frozen, or with adapters of peft.
        centre_bits: Hold the frozen centres of a light run in 8 or 4 bits while it trains; the
            saved model has their values in its own precision.
        **training_arguments: Anything else that `transformers.TrainingArguments` takes.

    Returns:
        The content of `results.json`: the primary `metric` and its `value`, all `metrics`,
        `trainable_parameters` and `total_parameters` (#Pr and #To), `train_seconds` (training
        only, since it was last resumed), `peak_memory_bytes`, `losses` as `[step, loss]` pairs,
        and the settings.

    Raises:
        ValueError: A bad argument, data file or checkpoint, or a run of other settings to resume;
            nothing has been written then.
        FloatingPointError: The loss is no longer finite; nothing is left of the run.
    """
    check_choice("method", method, METHODS)
    learning_rate = LEARNING_RATES[method] if learning_rate is None else learning_rate
    mpo_rate = learning_rate if mpo_learning_rate is None else mpo_learning_rate
    check_choice("precision", precision, PRECISIONS)
    check_positive(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mpo_learning_rate=mpo_rate,
        gradient_accumulation_steps=gradient_accumulation_steps,
        save_steps=save_steps,
    )
    if centre_bits is not None and method != "light":
        raise ValueError(
            f"centre_bits: expected method light, whose centres are frozen, got {method}"
        )
    output, folder = Path(output), Path(output) / _FOLDER
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "warmup_steps": warmup,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "train_sampling_strategy": "group_by_length",
            "save_strategy": SaveStrategy.STEPS if save_steps else SaveStrategy.NO,
            "save_steps": save_steps or 500,
            "save_total_limit": 1,
            "logging_steps": 0.05,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "seed": seed,
            "report_to": report_to,
            **runtime_arguments(precision),
            **training_arguments,
        }
    )
    settings = {
        "model": str(Path(model_name_or_path)),
        "task": task,
        "data_dir": None if data_dir is None else str(Path(data_dir)),
        "eval_split": eval_split,
        "method": method,
        "config": None if config is None else repr(config),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "mpo_learning_rate": mpo_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "precision": precision,
        "max_length": max_length,
        "max_train_samples": max_train_samples,
        "seed": seed,
        "centre_bits": centre_bits,
        "processes": arguments.world_size,
        **{name: repr(value) for name, value in training_arguments.items()},
    }
    last = last_checkpoint(folder, settings, resume=resume, overwrite=overwrite)
    start = prepared(
        model_name_or_path,
        task,
        output,
        lambda task: load_for_training(model_name_or_path, task, method, config),
        prepare,
        data_dir=data_dir,
        eval_split=eval_split,
        max_length=max_length,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
        seed=seed,
        overwrite=overwrite or last is not None,
    )
    model, parameters = start.model, count_parameters(start.model)
    if centre_bits is not None:
        quantize_centres(model, centre_bits)
    trainer = MPOTrainer(
        model=model,
        args=arguments,
        train_dataset=start.train,
        data_collator=Collator(start.tokenizer),
        processing_class=start.tokenizer,
        callbacks=[StopWhenDiverged()],
        mpo_learning_rate=mpo_rate,
    )
    if trainer.is_world_process_zero() and last is None:
        begin(folder, settings)
    reset_peak_memory(trainer.args.device)
    try:
        outcome = trainer.train(resume_from_checkpoint=last)
    except FloatingPointError:
        clear(folder)
        raise
    memory = peak_memory(trainer.args.device)
    if centre_bits is not None:
        dequantize_centres(model)
    trainer.save_model(str(output))  # before anything else may fail
    metrics, outputs = predict(trainer, start.task, start.evaluation)
    result = {
        **_result(start.task, metrics, parameters),
        "train_seconds": outcome.metrics["train_runtime"],
        **memory,
        "seed": seed,
        "method": method,
        "model": str(model_name_or_path),
        "eval_split": eval_split,
        **start.conditions,
        "steps": outcome.global_step,
        "epochs": epochs,
        "batch_size": batch_size * gradient_accumulation_steps * arguments.world_size,
        "learning_rate": learning_rate,
        "mpo_learning_rate": None if method == "dense" else mpo_rate,
        "max_length": start.max_length,
        "precision": precision,
        "centre_bits": centre_bits,
        "device": device_name(trainer),
        "losses": [
            [log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log
        ],
    }
    if trainer.is_world_process_zero():
        _save_predictions(output / "predictions.npz", outputs)
        text = json.dumps(result, indent=2) + "\n"
        (output / "results.json").write_text(text, encoding="utf-8")
        clear(folder)
    return result


def evaluate(
    model_name_or_path: str | Path,
    task: str,
    *,
    data_dir: str | Path | None = None,
    batch_size: int = 32,
    precision: str = "fp32",
    max_length: int = 128,
    max_eval_samples: int | None = None,
    predictions: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a fine-tuned checkpoint, dense or compressed, on a task's dev rows.

    Args:
        predictions: Where to write the model's outputs, `[rows, num_labels]` for each dev split,
            a `.npz` archive. The other arguments are those of :func:`finetune`.

    Returns:
        The same leading keys as :func:`finetune`; nothing is trained, so `train_seconds` is 0.

    Raises:
        ValueError: A bad argument or data file, predictions whose name does not end in `.npz`, or a
            checkpoint without this task's trained head.
        NotADirectoryError, IsADirectoryError: No folder for the predictions, or nothing but one.
    """
    check_choice("precision", precision, PRECISIONS)
    check_positive(batch_size=batch_size, max_length=max_length, max_eval_samples=max_eval_samples)
    if predictions is not None:
        check_file(predictions, "the predictions", ".npz")
    glue_task = get_task(task)
    evaluation = load_dev(glue_task, data_dir, max_eval_samples)
    model = load_for_evaluation(model_name_or_path, glue_task)
    tokenizer = padding_tokenizer(model_name_or_path, model)
    max_length = fitting(max_length, model, tokenizer)
    evaluation = {name: encoded(rows, tokenizer, max_length) for name, rows in evaluation.items()}
    arguments = TrainingArguments(
        output_dir=".",  # Trainer makes a folder even where nothing is written
        per_device_eval_batch_size=batch_size,
        report_to="none",
        **runtime_arguments(precision),
    )
    trainer = Trainer(model=model, args=arguments, data_collator=Collator(tokenizer))
    reset_peak_memory(trainer.args.device)
    metrics, outputs = predict(trainer, glue_task, evaluation)
    if predictions is not None and trainer.is_world_process_zero():
        _save_predictions(predictions, outputs)
    return {
        **_result(glue_task, metrics, count_parameters(model)),
        "train_seconds": 0.0,
        **peak_memory(trainer.args.device),
        "seed": None,
        "model": str(model_name_or_path),
        "eval_samples": sum(map(len, evaluation.values())),
        "max_length": max_length,
        "precision": precision,
        "device": device_name(trainer),
    }


def _save_predictions(path: str | Path, outputs: dict[str, np.ndarray]) -> None:
    np.savez(path, **outputs)  # type: ignore[arg-type]


def _result(task: Task, metrics: dict[str, float], parameters: Any) -> dict[str, Any]:
    return {
        "task": task.name,
        "metric": task.metric,
        "value": metrics[task.metric],
        "metrics": metrics,
        "trainable_parameters": parameters.trainable,
        "total_parameters": parameters.total,
    }
