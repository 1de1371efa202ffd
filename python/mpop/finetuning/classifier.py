"""Sequence classifiers and regressors of GLUE tasks: opened to be trained, or to be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from mpop.checkpoints.folder import load
from mpop.checkpoints.opening import from_pretrained, is_compressed
from mpop.compression.compress import compress
from mpop.data.glue import Task
from mpop.models.config import CompressionConfig
from mpop.models.light import SHARE, balance, freeze_central
from mpop.models.matrices import check_not_quantized


def load_for_training(
    source: str | Path, task: Task, method: str, config: CompressionConfig | None
) -> PreTrainedModel:
    """A sequence classifier, or regressor, for `task` that `method` can train at once.

    Raises:
        ValueError: No such model, or a compressed one that was to be dense or compressed again.
    """
    compressed = is_compressed(source)
    if compressed and method == "dense":
        raise ValueError(f"{source} is already compressed; use method full or light, or merge it")
    if compressed and config is not None:
        raise ValueError(f"{source} is already compressed; it cannot be compressed again")
    options: dict[str, Any] = {
        "num_labels": task.num_labels,
        "problem_type": "regression" if task.is_regression else "single_label_classification",
        "ignore_mismatched_sizes": True,  # another task's head is replaced
    }
    if task.labels:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {name: i for i, name in enumerate(task.labels)}
    model, _ = _load_classifier(source, **options)
    if method != "dense" and not compressed:
        if config is None and method == "light":
            config = CompressionConfig(share=SHARE, embeddings=False)
        compress(model, config)
        if method == "light":
            balance(model)
    return trainable(model, method)


def trainable(model: PreTrainedModel, method: str) -> PreTrainedModel:
    """The model, with everything trained that `method` trains.

    Raises:
        ValueError: A matrix whose cores are quantised.
    """
    check_not_quantized(model)
    model.requires_grad_(True)
    if method == "light":
        freeze_central(model)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    # BERT-type heads ignore num_items_in_batch; Trainer would scale their mean loss a second time.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return model


def load_for_evaluation(source: str | Path, task: Task) -> PreTrainedModel:
    """A classifier whose head is part of the checkpoint and fits `task`.

    Raises:
        ValueError: No such model, no trained head, or one of another size or with other labels.
    """
    model, info = _load_classifier(source)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"{source} has no trained task head ({missing}); fine-tune it first")
    if model.config.num_labels != task.num_labels:
        raise ValueError(
            f"{source} has {model.config.num_labels} outputs; {task.name} needs {task.num_labels}"
        )
    id2label: Any = model.config.id2label
    names = [str(id2label[i]).lower() for i in range(task.num_labels)]
    unnamed = [f"label_{i}" for i in range(task.num_labels)]
    if task.labels and names not in (unnamed, list(task.labels)):
        raise ValueError(
            f"{source} has the outputs {', '.join(names)}; {task.name} needs "
            f"{', '.join(task.labels)} (where they mean the same, rename id2label in config.json)"
        )
    return model


def _load_classifier(source: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    # Left to itself transformers would go on in the checkpoint's own, perhaps half, precision.
    options |= {"dtype": torch.float32, "output_loading_info": True}
    if is_compressed(source):
        loaded: Any = load(source, AutoModelForSequenceClassification, **options)
        return loaded
    return from_pretrained(AutoModelForSequenceClassification, source, **options)
