"""transformers' Trainer, told what MPO models and GLUE need of it."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback

from mpo_kernels import InterpolativeLinear
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpo_kernels.layers.module import MPOModule
from mpop.finetuning.settle import Loss


class MPOTrainer(Trainer):
    """A Trainer whose AdamW has a learning rate of its own for MPO tensors.

    Args:
        mpo_learning_rate: Peak rate of the trained cores; all else has `args.learning_rate`.
        loss: Of the model and a batch, a mean over its rows; the model's own by default.
    """

    def __init__(
        self, *args: Any, mpo_learning_rate: float, loss: Loss | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mpo_learning_rate, self.loss = mpo_learning_rate, loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The `loss` that was given, or the model's own."""
        if self.loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self.loss(model, inputs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As `from_pretrained` does, which knows what is renamed or fused in files.

        Trainer's own takes what has the names of the model, and says nothing of the rest.
        """
        trained = self.model
        if model is not None or not isinstance(trained, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(trained).from_pretrained(resume_from_checkpoint, dtype=trained.dtype)
        trained.load_state_dict(saved.state_dict())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Group the trained parameters by rate and decay; biases and norms do not decay."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            cores = _core_names(trained)
            decaying = set(self.get_decay_parameter_names(trained))
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    rate = self.mpo_learning_rate if name in cores else self.args.learning_rate
                    decay = self.args.weight_decay if name in decaying else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": rate, "weight_decay": decay}
                    for (rate, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer


class Collator(DataCollatorWithPadding):
    """Pads to the longest row of the batch; `length` is for the sampler, not for the model."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__([{k: v for k, v in row.items() if k != "length"} for row in rows])


class StopWhenDiverged(TrainerCallback):
    """Ends a training whose loss is no longer finite instead of saving its model."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower the learning rate"
            )


def runtime_arguments(precision: str) -> dict[str, Any]:
    """The `TrainingArguments` that training and evaluation share."""
    has_accelerator = torch.accelerator.is_available()
    return {
        "use_cpu": not has_accelerator,  # bf16 on a CPU has to be asked for
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "remove_unused_columns": False,  # keeps "length" for the sampler
        "average_tokens_across_devices": False,  # the loss is a mean over rows, not over tokens
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": has_accelerator,
    }


def reset_peak_memory(device: torch.device) -> None:
    """Start counting device memory afresh; a process's resident peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> dict[str, Any]:
    """`peak_memory_bytes`, and in `peak_memory_kind` what those bytes are."""
    if device.type == "cuda":
        peak, kind = torch.cuda.max_memory_allocated(), "device memory allocated by tensors"
    else:
        import resource  # absent on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        kind = "resident memory of the process since it started"
    return {"peak_memory_bytes": peak, "peak_memory_kind": kind}


def device_name(trainer: Trainer) -> str:
    """The accelerator's name, or `"cpu"`."""
    device = trainer.args.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _core_names(model: nn.Module) -> set[str]:
    """Of MPO layers, of those with quantised centres, and of adapters."""
    layers = MPOModule | InterpolativeLinear | BlockwiseLayer
    lists = ("cores", "auxiliary", "mpo_light_cores")
    return {
        f"{name}.{part}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, layers) or hasattr(module, "mpo_light_cores")
        for part in lists
        for key, _ in getattr(module, part, nn.Module()).named_parameters()
    }
