"""Fine-tuning and evaluation on a GLUE task: dense, all MPO tensors, or the light way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

import mpop
from mpop.glue import Task, compute_metrics, get_task, load_split
from mpop.pretrained import (
    check_output,
    load_for_evaluation,
    load_for_training,
    load_tokenizer,
)
from mpop.trainer import (
    Collator,
    MPOTrainer,
    StopWhenDiverged,
    device_name,
    peak_memory,
    reset_peak_memory,
    runtime_arguments,
)

# Peak rates by method; a light run trains a tenth of the parameters and wants larger steps.
LEARNING_RATES = {"dense": 5e-5, "full": 5e-5, "light": 1e-4}
METHODS = tuple(LEARNING_RATES)
EVAL_SPLITS = ("dev", "train-holdout")
PRECISIONS = ("fp32", "bf16", "fp16")
# Subsets are the same for every seed, method and rate, so that runs differ in nothing else.
_SUBSET_SEED = 0
_MAX_HOLDOUT = 1000


def finetune(
    model_name_or_path: str | Path,
    task: str,
    output: str | Path,
    method: str = "dense",
    *,
    data_dir: str | Path | None = None,
    eval_split: str = "dev",
    config: mpop.CompressionConfig | None = None,
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
            `"light"`: compress and balance, then train all but the central tensors. A checkpoint
            that is already compressed is trained as it is.
        data_dir: A folder in GLUE's own layout; without it the hub is used.
        eval_split: `"dev"`, or `"train-holdout"`: a tenth of the training rows (at most 1000),
            fixed and not trained on, for choosing settings without looking at dev.
        config: How to compress; by default at full rank, which changes no output.
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
        save_steps: Write a checkpoint that `resume` can use every so many steps.
        resume: Continue from the last checkpoint in `output`.
        report_to: A tracker that transformers knows, e.g. `"tensorboard"`.
        prepare: Called with the loaded model; what it returns is trained instead, such as the
            same with other parameters frozen, or with adapters of peft.
        centre_bits: Hold the frozen centres of a light run in 8 or 4 bits while it trains; the
            saved model has their values in its own precision.
        **training_arguments: Anything else that `transformers.TrainingArguments` takes.

    Returns:
        The content of `results.json`: the primary `metric` and its `value`, all `metrics`,
        `trainable_parameters` and `total_parameters` (#Pr and #To), `train_seconds` (training
        only), `peak_memory_bytes`, `losses` as `[step, loss]` pairs, and the settings.

    Raises:
        ValueError: A bad argument, data file or checkpoint; nothing has been written then.
        FloatingPointError: The loss is no longer finite.
    """
    _check_choice("method", method, METHODS)
    learning_rate = LEARNING_RATES[method] if learning_rate is None else learning_rate
    mpo_rate = learning_rate if mpo_learning_rate is None else mpo_learning_rate
    _check_choice("eval_split", eval_split, EVAL_SPLITS)
    _check_choice("precision", precision, PRECISIONS)
    check_positive(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mpo_learning_rate=mpo_rate,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_length=max_length,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
        save_steps=save_steps,
    )
    if centre_bits is not None and method != "light":
        raise ValueError(
            f"centre_bits: expected method light, whose centres are frozen, got {method}"
        )
    if centre_bits is not None and save_steps is not None:
        raise ValueError(
            "centre_bits: expected no save_steps, whose checkpoints could not be loaded"
        )
    check_output(output, model_name_or_path)
    glue_task = get_task(task)
    train, evaluation = load_data(
        glue_task, data_dir, eval_split, max_train_samples, max_eval_samples
    )
    set_seed(seed)  # the task head is drawn while the model is loaded
    tokenizer = load_tokenizer(model_name_or_path)
    model = load_for_training(model_name_or_path, glue_task, method, config)
    if prepare is not None:
        model = prepare(model)
    parameters = mpop.count_parameters(model)
    if centre_bits is not None:
        mpop.quantize_centres(model, centre_bits)
    max_length = fitting(max_length, model, tokenizer)
    train = encoded(train, tokenizer, max_length)
    evaluation = {name: encoded(rows, tokenizer, max_length) for name, rows in evaluation.items()}
    arguments = TrainingArguments(
        **{
            "output_dir": str(output),
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
    trainer = MPOTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        data_collator=Collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[StopWhenDiverged()],
        mpo_learning_rate=mpo_rate,
    )
    reset_peak_memory(trainer.args.device)
    outcome = trainer.train(resume_from_checkpoint=resume or None)
    memory = peak_memory(trainer.args.device)
    metrics, outputs = predict(trainer, glue_task, evaluation)
    result = {
        **_result(glue_task, metrics, parameters),
        "train_seconds": outcome.metrics["train_runtime"],
        **memory,
        "seed": seed,
        "method": method,
        "model": str(model_name_or_path),
        "eval_split": eval_split,
        "train_samples": len(train),
        "eval_samples": sum(map(len, evaluation.values())),
        "steps": outcome.global_step,
        "epochs": epochs,
        "batch_size": batch_size * gradient_accumulation_steps * arguments.world_size,
        "learning_rate": learning_rate,
        "mpo_learning_rate": None if method == "dense" else mpo_rate,
        "max_length": max_length,
        "precision": precision,
        "centre_bits": centre_bits,
        "device": device_name(trainer),
        "train_loss": outcome.training_loss,
        "losses": [
            [log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log
        ],
    }
    if centre_bits is not None:
        mpop.dequantize_centres(model)
    trainer.save_model()
    if trainer.is_world_process_zero():
        _save_predictions(Path(output) / "predictions.npz", outputs)
        text = json.dumps(result, indent=2) + "\n"
        (Path(output) / "results.json").write_text(text, encoding="utf-8")
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
            as a `.npz` archive. The other arguments are those of :func:`finetune`.

    Returns:
        The same leading keys as :func:`finetune`; nothing is trained, so `train_seconds` is 0.

    Raises:
        ValueError: A bad argument or data file, or a checkpoint without this task's trained head.
        NotADirectoryError, IsADirectoryError: No folder for the predictions, or nothing but one.
    """
    _check_choice("precision", precision, PRECISIONS)
    check_positive(batch_size=batch_size, max_length=max_length, max_eval_samples=max_eval_samples)
    if predictions is not None and not (folder := Path(predictions).absolute().parent).is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for the predictions")
    if predictions is not None and Path(predictions).is_dir():
        raise IsADirectoryError(f"{predictions}: expected a file for the predictions")
    glue_task = get_task(task)
    evaluation = _load_dev(glue_task, data_dir, max_eval_samples)
    model = load_for_evaluation(model_name_or_path, glue_task)
    tokenizer = load_tokenizer(model_name_or_path)
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
        **_result(glue_task, metrics, mpop.count_parameters(model)),
        "train_seconds": 0.0,
        **peak_memory(trainer.args.device),
        "seed": None,
        "model": str(model_name_or_path),
        "eval_samples": sum(map(len, evaluation.values())),
        "max_length": max_length,
        "precision": precision,
        "device": device_name(trainer),
    }


def calibration_batches(
    model_name_or_path: str | Path, task: str, data_dir: str | Path | None, samples: int
) -> list[dict[str, Tensor]]:
    """The first training rows of a task in a fixed order, as `mpop.compress` calibrates with."""
    tokenizer = load_tokenizer(model_name_or_path)
    rows = subset(load_split(get_task(task), "train", data_dir), samples)
    return unlabelled(encoded(rows, tokenizer, min(128, tokenizer.model_max_length)), tokenizer)


def unlabelled(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Batches of encoded rows, 32 in each, without their labels."""
    batches = DataLoader(rows, 32, collate_fn=Collator(tokenizer))
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def load_data(
    task: Task,
    data_dir: str | Path | None,
    eval_split: str,
    max_train_samples: int | None,
    max_eval_samples: int | None,
) -> tuple[Dataset, dict[str, Dataset]]:
    train = load_split(task, "train", data_dir).shuffle(seed=_SUBSET_SEED)
    if eval_split == "dev":
        evaluation = _load_dev(task, data_dir, max_eval_samples)
    else:
        if len(train) < 10:
            raise ValueError(f"{len(train)} training rows are too few to hold a tenth of them out")
        cut = len(train) - min(_MAX_HOLDOUT, len(train) // 10)
        evaluation = {eval_split: subset(train.select(range(cut, len(train))), max_eval_samples)}
        train = train.select(range(cut))
    return subset(train, max_train_samples), evaluation


def _load_dev(
    task: Task, data_dir: str | Path | None, max_samples: int | None
) -> dict[str, Dataset]:
    return {
        split: subset(load_split(task, split, data_dir), max_samples) for split in task.dev_splits
    }


def subset(rows: Dataset, size: int | None) -> Dataset:
    if size is None or size >= len(rows):
        return rows
    return rows.shuffle(seed=_SUBSET_SEED).select(range(size))


def fitting(max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(model.config, "max_position_embeddings", max_length)
    return min(max_length, positions, tokenizer.model_max_length)


def encoded(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    texts = [name for name in ("text", "text_pair") if name in rows.column_names]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            *(batch[name] for name in texts), truncation=True, max_length=max_length
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "length": lengths, "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def predict(
    trainer: Trainer, task: Task, evaluation: dict[str, Dataset]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and outputs; a second dev split's metrics carry its name, as in MNLI."""
    # Length-grouped evaluation would return the rows in another order.
    trainer.args.train_sampling_strategy = "random"
    metrics: dict[str, float] = {}
    outputs: dict[str, np.ndarray] = {}
    for split, rows in evaluation.items():
        prediction = trainer.predict(rows)
        outputs[split] = np.asarray(prediction.predictions)
        values = compute_metrics(task, outputs[split], np.asarray(prediction.label_ids))
        suffix = f"_{split.removeprefix('dev_')}" if metrics else ""
        metrics |= {name + suffix: value for name, value in values.items()}
    return metrics, outputs


def _save_predictions(path: str | Path, outputs: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # savez would append a suffix to a name
        np.savez(file, **outputs)  # type: ignore[arg-type]


def _result(task: Task, metrics: dict[str, float], parameters: Any) -> dict[str, Any]:
    return {
        "task": task.name,
        "metric": task.metric,
        "value": metrics[task.metric],
        "metrics": metrics,
        "trainable_parameters": parameters.trainable,
        "total_parameters": parameters.total,
    }


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
