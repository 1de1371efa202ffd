"""Squeezing a model with training between the cuts: what every metric shares, and a GLUE task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from mpop.checkpoints.folder import save
from mpop.checkpoints.opening import is_compressed
from mpop.compression.calibration import Batches
from mpop.finetuning.classifier import load_for_evaluation, trainable
from mpop.finetuning.rows import check_choice, check_positive, predict, prepared, subset, unlabelled
from mpop.finetuning.settle import Loss, Settler
from mpop.finetuning.squeeze import SqueezeRound, check_bounds, plot_trace, squeeze
from mpop.finetuning.trainer import Collator, MPOTrainer, runtime_arguments
from mpop.models.light import count_parameters


@dataclass(frozen=True)
class Squeezing:
    """How far a model is squeezed, and how it trains between the cuts.

    Attributes:
        max_drop: how far the metric, higher is better, may fall.
        max_rounds, step: see `mpop.squeeze`.
        settle_steps: optimizer steps between two cuts at most.
        window: steps whose mean loss tells whether it has settled.
        batch_size: rows a step.
        learning_rate: constant rate of all that is trained; low, since the model has been trained
            to the end of its schedule.
        calibration_samples: rows to train on that show what a cut does to the model's output; with
            0 each matrix's own relative error counts.
        precision: `"fp32"`, or autocast to `"bf16"`.
        seed: of the order of the rows.
        resume: go on from the state in the output.
        overwrite: replace a model, or what is left of another squeeze, in the output.
        on_round: told of each round as it ends.

    Raises:
        ValueError: a value out of its range.
    """

    max_drop: float
    max_rounds: int = 50
    step: float = 0.05
    settle_steps: int = 200
    window: int = 20
    batch_size: int = 32
    learning_rate: float = 2e-5
    calibration_samples: int = 1500
    precision: str = "fp32"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    on_round: Callable[[SqueezeRound], None] | None = None

    def __post_init__(self) -> None:
        positive = ("settle_steps", "window", "batch_size", "learning_rate")
        check_positive(**{name: getattr(self, name) for name in positive})
        check_bounds(self.max_drop, self.step, self.max_rounds)
        if self.calibration_samples < 0 or self.calibration_samples == 1:
            raise ValueError(
                f"calibration_samples: expected 0, or at least 2, got {self.calibration_samples}"
            )
        check_choice("precision", self.precision, ("fp32", "bf16"))

    def may_replace(self, output: str | Path) -> bool:
        """Whether to write over a model there: if that is asked for, or it is of this squeeze."""
        return self.overwrite or (self.resume and _state(output).exists())

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str | Path,
        output: str | Path,
        *,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Mapping[str, Tensor]],
        metric: str,
        evaluate: Callable[[Trainer], float],
        calibration: Batches | None,
        settings: Mapping[str, Any],
        loss: Loss | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Squeeze a model that trains already, and save it with `squeeze.json`.

        Args:
            source: where the model is from.
            rows, collate, loss: what it trains on; see `Settler`.
            metric: its name.
            evaluate: the metric, with a Trainer of the model to predict with.
            calibration: see `mpop.squeeze`.
            settings: what the result depends on besides, JSON-like.
            dtype: that the model is saved in.

        Returns:
            The content of `squeeze.json`: the report and the settings.
        """
        arguments = TrainingArguments(
            output_dir=str(output),
            per_device_eval_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.01,
            report_to="none",
            disable_tqdm=True,
            **runtime_arguments(self.precision),
        )
        trainer = MPOTrainer(
            model=model, args=arguments, data_collator=collate, mpo_learning_rate=self.learning_rate
        )
        model.to(arguments.device)  # type: ignore[arg-type]
        tuner = Settler(
            model,
            rows,
            collate,
            trainer.create_optimizer(),
            batch_size=self.batch_size,
            window=self.window,
            max_steps=self.settle_steps,
            seed=self.seed,
            autocast=torch.bfloat16 if self.precision == "bf16" else None,
            loss=loss,
        )
        known = {
            **settings,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "settle_steps": self.settle_steps,
            "window": self.window,
            "calibration_samples": self.calibration_samples,
            "precision": self.precision,
            "seed": self.seed,
        }
        state = _state(output)
        if self.overwrite and not self.resume and state.exists():
            shutil.rmtree(state.parent)
        report = squeeze(
            model,
            evaluate=lambda: evaluate(trainer),
            finetune=tuner,
            max_drop=self.max_drop,
            calibration=calibration,
            max_steps=self.max_rounds,
            step=self.step,
            state=state,
            resume=self.resume,
            settings={**known, "model": Path(source).name},
            on_round=self.on_round,
        )
        save(model.to(dtype), output)  # type: ignore[arg-type]
        tokenizer.save_pretrained(output)
        result = {
            "metric_name": metric,
            **report.to_dict(),
            "trainable_parameters": count_parameters(model).trainable,
            "max_drop": self.max_drop,
            **known,
            "model": str(source),
            "output": str(output),
        }
        text = json.dumps(result, indent=2) + "\n"
        (Path(output) / "squeeze.json").write_text(text, encoding="utf-8")
        plot_trace(report, state.with_name("trace.png"))
        return result


def _state(output: str | Path) -> Path:
    return Path(output) / "squeeze" / "state.pt"


def squeeze_on_task(
    model_name_or_path: str | Path,
    task: str,
    output: str | Path,
    *,
    data_dir: str | Path | None = None,
    eval_split: str = "dev",
    max_length: int = 128,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    prepare: Callable[[PreTrainedModel], Any] | None = None,
    **squeezing: Any,
) -> dict[str, Any]:
    """Squeeze a compressed, fine-tuned model with light fine-tuning between the cuts, and save it.

    Beside the model lie `squeeze.json`, `squeeze/trace.jsonl` (a line a round), `squeeze/trace.png`
    (metric against parameters) and `squeeze/state.pt`, from which `resume` goes on.

    Args:
        model_name_or_path: a folder with an MPO model of the task.
        **squeezing: the fields of `Squeezing`; the metric is the task's, a fraction of 1.
        The other arguments are those of `finetune`.

    Returns:
        The content of `squeeze.json`: the report and the settings.

    Raises:
        ValueError: a bad argument, data file or checkpoint, or what `mpop.squeeze` says.
        FloatingPointError: a loss that is no longer finite.
    """
    how = Squeezing(**squeezing)
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
        seed=how.seed,
        overwrite=how.may_replace(output),
    )
    glue_task = start.task
    return how.run(
        start.model,
        start.tokenizer,
        model_name_or_path,
        output,
        rows=start.train,
        collate=Collator(start.tokenizer),
        metric=glue_task.metric,
        evaluate=lambda judge: predict(judge, glue_task, start.evaluation)[0][glue_task.metric],
        calibration=unlabelled(subset(start.train, how.calibration_samples), start.tokenizer)
        or None,
        settings={
            "task": glue_task.name,
            "eval_split": eval_split,
            "max_length": start.max_length,
            **start.conditions,
        },
    )
