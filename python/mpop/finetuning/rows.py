"""A GLUE task's rows as a model takes them, and what training and squeezing begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from mpop.checkpoints.opening import check_output, load_tokenizer
from mpop.data.glue import Task, compute_metrics, get_task, load_split
from mpop.data.lengths import longest
from mpop.finetuning.trainer import Collator

EVAL_SPLITS = ("dev", "train-holdout")
# Subsets are the same for every seed, method and rate, so that runs differ in nothing else.
_SUBSET_SEED = 0
_MAX_HOLDOUT = 1000


class Prepared(NamedTuple):
    """A task, a model for it, and the encoded rows of both splits.

    Attributes:
        max_length: tokens that rows were cut to.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: Any
    train: Dataset
    evaluation: dict[str, Dataset]
    max_length: int

    @property
    def conditions(self) -> dict[str, Any]:
        """What results say of the rows."""
        return {
            "train_samples": len(self.train),
            "eval_samples": sum(map(len, self.evaluation.values())),
        }


def prepared(
    source: str | Path,
    task: str,
    output: str | Path,
    load: Callable[[Task], PreTrainedModel],
    prepare: Callable[[PreTrainedModel], Any] | None,
    *,
    data_dir: str | Path | None,
    eval_split: str,
    max_length: int,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
    overwrite: bool,
) -> Prepared:
    """Check what is asked for, then read the data and the model; the arguments are `finetune`'s.

    Args:
        load: the model for the task, `prepare`d after it.
    """
    check_choice("eval_split", eval_split, EVAL_SPLITS)
    check_positive(
        max_length=max_length,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    check_output(output, source, overwrite=overwrite)
    glue_task = get_task(task)
    train, evaluation = load_data(
        glue_task, data_dir, eval_split, max_train_samples, max_eval_samples
    )
    set_seed(seed)  # the task head is drawn while the model is loaded
    model = load(glue_task)
    tokenizer = padding_tokenizer(source, model)
    max_length = fitting(max_length, model, tokenizer)
    if prepare is not None:
        model = prepare(model)
    train, *others = (
        encoded(rows, tokenizer, max_length) for rows in (train, *evaluation.values())
    )
    evaluation = dict(zip(evaluation, others, strict=True))
    return Prepared(glue_task, tokenizer, model, train, evaluation, max_length)


def calibration_batches(
    model: PreTrainedModel, source: str | Path, task: str, data_dir: str | Path | None, samples: int
) -> list[dict[str, Tensor]]:
    """The first training rows of a task in a fixed order, as `mpop.compress` calibrates with.

    Args:
        source: what the model was loaded from.
    """
    rows = subset(load_split(get_task(task), "train", data_dir), samples)
    tokenizer = padding_tokenizer(source, model)
    return unlabelled(encoded(rows, tokenizer, fitting(128, model, tokenizer)), tokenizer)


def unlabelled(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Batches of encoded rows without their labels, 32 in each, but two at least: one judges."""
    size = 32 if len(rows) > 32 else max(1, -(-len(rows) // 2))
    batches = DataLoader(rows, size, collate_fn=Collator(tokenizer))
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def load_data(
    task: Task,
    data_dir: str | Path | None,
    eval_split: str,
    max_train_samples: int | None,
    max_eval_samples: int | None,
) -> tuple[Dataset, dict[str, Dataset]]:
    """The training rows and, by split, those to evaluate on; see `finetune`."""
    train = load_split(task, "train", data_dir).shuffle(seed=_SUBSET_SEED)
    if eval_split == "dev":
        evaluation = load_dev(task, data_dir, max_eval_samples)
    else:
        if len(train) < 10:
            raise ValueError(f"{len(train)} training rows are too few to hold a tenth of them out")
        cut = len(train) - min(_MAX_HOLDOUT, len(train) // 10)
        evaluation = {eval_split: subset(train.select(range(cut, len(train))), max_eval_samples)}
        train = train.select(range(cut))
    return subset(train, max_train_samples), evaluation


def load_dev(
    task: Task, data_dir: str | Path | None, max_samples: int | None
) -> dict[str, Dataset]:
    """The dev rows by split."""
    return {
        split: subset(load_split(task, split, data_dir), max_samples) for split in task.dev_splits
    }


def subset(rows: Dataset, size: int | None) -> Dataset:
    """A fixed random subset of at most this size."""
    if size is None or size >= len(rows):
        return rows
    return rows.shuffle(seed=_SUBSET_SEED).select(range(size))


def padding_tokenizer(source: str | Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, and what it pads with in the model's configuration.

    Where it has no padding token it pads with the model's, or with the token that ends a text.

    Raises:
        ValueError: there is none of them.
    """
    tokenizer, config = load_tokenizer(source), model.config.get_text_config()
    # What a row spells is text: BART and T5 refuse a batch whose rows differ in their ends.
    tokenizer.split_special_tokens = True
    if tokenizer.pad_token is None:
        known = config.pad_token_id in range(len(tokenizer))
        tokenizer.pad_token_id = config.pad_token_id if known else tokenizer.eos_token_id
    if tokenizer.pad_token is None:
        raise ValueError(f"{source}: expected a tokenizer with a token to pad with, got none")
    if config.pad_token_id is None:  # a decoder looks for the last token that is not this one
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def fitting(max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a row, within what the model and its tokenizer take."""
    return min(max_length, longest(model) or max_length, tokenizer.model_max_length)


def encoded(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows as token ids, with their `length` and `labels`."""
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
    # An encoder-decoder gives hidden states as well, others what their configuration asks for.
    trainer.preprocess_logits_for_metrics = lambda outputs, labels: (
        outputs[0] if isinstance(outputs, tuple) else outputs
    )
    metrics: dict[str, float] = {}
    outputs: dict[str, np.ndarray] = {}
    for split, rows in evaluation.items():
        prediction = trainer.predict(rows)
        outputs[split] = np.asarray(prediction.predictions)
        values = compute_metrics(task, outputs[split], np.asarray(prediction.label_ids))
        suffix = f"_{split.removeprefix('dev_')}" if metrics else ""
        metrics |= {name + suffix: value for name, value in values.items()}
    return metrics, outputs


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError unless the value is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(**values: float | None) -> None:
    """Raise a ValueError that names what is neither positive nor None."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
