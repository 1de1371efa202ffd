"""Healing a compressed decoder: its cores learn what the dense model says of every token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from mpop.checkpoints.folder import replaced, write
from mpop.checkpoints.opening import (
    check_output,
    copy_companions,
    is_compressed,
    load_as_saved,
    shared_tokenizer,
)
from mpop.data.lengths import longest
from mpop.data.text import read_text, text_batches, token_ids
from mpop.finetuning.classifier import trainable
from mpop.finetuning.resuming import begin, clear, last_checkpoint
from mpop.finetuning.rows import check_choice, check_positive
from mpop.finetuning.trainer import (
    MPOTrainer,
    StopWhenDiverged,
    device_name,
    peak_memory,
    reset_peak_memory,
    runtime_arguments,
)
from mpop.language.perplexity import CHUNK, Perplexity, check_tokens, perplexity, vocabulary_of
from mpop.models.light import count_parameters
from mpop.models.matrices import mpo_modules

# Peak rates by method.
LEARNING_RATES = {"light": 3e-4, "full": 1e-4}
METHODS = tuple(LEARNING_RATES)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Within the output, while it is made.
_FOLDER = "healing"


def heal(
    model_name_or_path: str | Path,
    teacher: str | Path,
    text: str | Path,
    output: str | Path,
    method: str = "light",
    *,
    tokens: int = 1_000_000,
    learning_rate: float | None = None,
    seqlen: int = 512,
    batch_size: int = 4,
    precision: str = "fp32",
    seed: int = 0,
    evaluate: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_log: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a compressed decoder on its teacher's distributions over next tokens, and save it.

    The loss is KL(teacher || model), mean over the targets of windows of text. Cores are trained as
    `method` says, norms and biases as well; what is dense of two dimensions or more stays as it is,
    routers of experts too. While it trains, a twentieth of the steps at a time, a checkpoint is
    written into the folder `healing` of the output, from which `resume` goes on with the same
    result; it goes when the model, in the dtype that it came in, and `heal.json` beside it take
    their place in one step.

    Args:
        model_name_or_path: a hub name or folder of a compressed decoder.
        teacher: the dense one, or another of the same vocabulary.
        text: what `mpop.text_batches` reads; its windows are passed over again where they are few.
        output: the folder to write.
        method: `"light"`: all cores but the central ones; `"full"`: every core.
        tokens: to train on, rounded up to whole steps.
        learning_rate: peak rate, by default the method's in `LEARNING_RATES`; it warms up for 6 %
            of the steps and then falls linearly to zero.
        seqlen: tokens of a window, at most what the models have positions for.
        batch_size: windows a step and device.
        precision: `"fp32"`, or autocast to `"bf16"`, with the teacher's weights in it.
        seed: of the windows and their order.
        evaluate: a text as `text` whose perplexity is measured before and after, in windows of
            `seqlen` as `mpop.perplexity` takes them.
        resume: go on from the checkpoint in `output`, or begin where there is none yet.
        overwrite: replace a model, or what is left of another run, in `output`.
        on_log: told now and then of the step, of how many, and of the mean loss since the last.

    Returns:
        The content of `heal.json`: the settings, `losses` as `[step, loss]` pairs, `tokens` trained
        on, `tokens_per_second`, and with `evaluate` `perplexity`, `perplexity_before`,
        `perplexity_teacher`, `divergence` and `divergence_before`.

    Raises:
        ValueError: a bad argument or text, a model that is dense, quantised or no decoder, a
            teacher of another vocabulary, NaN or Inf in either, or a run of other settings to
            resume; nothing has been written then.
        FloatingPointError: the loss is no longer finite; nothing is left of the run.
    """
    check_choice("method", method, METHODS)
    learning_rate = LEARNING_RATES[method] if learning_rate is None else learning_rate
    check_choice("precision", precision, tuple(PRECISIONS))
    check_positive(tokens=tokens, learning_rate=learning_rate, batch_size=batch_size)
    if seqlen < 2:
        raise ValueError(f"seqlen: expected at least 2, one token to foretell, got {seqlen}")
    output = Path(output)
    texts = [text] if evaluate is None else [text, evaluate]
    check_output(output, model_name_or_path, teacher, *texts, overwrite=overwrite)
    folder = output / _FOLDER
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.01,
        warmup_steps=0.06,
        save_strategy=SaveStrategy.STEPS,
        save_total_limit=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        seed=seed,
        report_to="none",
        **runtime_arguments(precision),
    )
    at_once = arguments.train_batch_size * arguments.world_size
    settings = {
        "model": str(Path(model_name_or_path)),
        "teacher": str(Path(teacher)),
        "text": str(Path(text)),
        "method": method,
        "tokens": tokens,
        "learning_rate": learning_rate,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "precision": precision,
        "seed": seed,
        "processes": arguments.world_size,
    }
    last = last_checkpoint(folder, settings, resume=resume, overwrite=overwrite)
    set_seed(seed)
    start = opened(model_name_or_path, teacher, method, seqlen, precision)
    model, seqlen = start.model, start.seqlen
    arguments.max_steps = math.ceil(tokens / (at_once * seqlen))
    arguments.save_steps = arguments.logging_steps = math.ceil(arguments.max_steps / 20)
    needed = arguments.max_steps * at_once
    batches = text_batches(start.tokenizer, text, samples=needed, seqlen=seqlen, seed=seed)
    windows = [ids for batch in batches for ids in batch["input_ids"]]
    check_tokens(model, torch.stack(windows))
    held_out = None
    if evaluate is not None:
        content = read_text(start.tokenizer, evaluate)
        held_out = token_ids(start.tokenizer, content, is_whole=True)
    model.to(arguments.device)  # type: ignore[arg-type]

    def measured() -> Perplexity | None:
        if held_out is None:
            return None
        dense = start.teacher.to(arguments.device)  # type: ignore[arg-type]
        try:
            with autocast(arguments.device, precision):
                return perplexity(model, held_out, seqlen=seqlen, against=dense)
        except ValueError as error:
            raise ValueError(f"{evaluate}: {error}") from error

    before = measured()
    trainer = MPOTrainer(
        model=model,
        args=arguments,
        # As often as it takes, so that every step is full.
        train_dataset=list(islice(cycle(windows), needed)),
        data_collator=stacked,
        callbacks=[StopWhenDiverged(), _Progress(on_log)],
        mpo_learning_rate=learning_rate,
        loss=Teacher(start.teacher),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero() and last is None:
        begin(folder, settings)
    reset_peak_memory(arguments.device)
    try:
        outcome = trainer.train(resume_from_checkpoint=last)
        after = measured()
    except FloatingPointError:
        clear(folder)
        raise
    parameters = count_parameters(model)
    result: dict[str, Any] = {
        **settings,
        "output": str(output),
        "seqlen": seqlen,
        "tokens": trainer.state.num_input_tokens_seen,
        "windows": len(windows),
        "steps": outcome.global_step,
        "losses": [
            [log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log
        ],
        "trainable_parameters": parameters.trainable,
        "total_parameters": parameters.total,
        "train_seconds": outcome.metrics["train_runtime"],
        "tokens_per_second": outcome.metrics["train_samples_per_second"] * seqlen,
        **peak_memory(arguments.device),
        "device": device_name(trainer),
    }
    if before is not None and after is not None:
        assert before.against is not None
        result |= {
            "evaluate": str(evaluate),
            "perplexity": after.perplexity,
            "perplexity_before": before.perplexity,
            "perplexity_teacher": before.against.perplexity,
            "divergence": after.divergence,
            "divergence_before": before.divergence,
        }
    if trainer.is_world_process_zero():
        model.to(start.dtype)  # type: ignore[arg-type]
        with replaced(output, wholly=overwrite) as new:
            write(model, new, Path(model_name_or_path))
            copy_companions(model_name_or_path, new)
            (new / "heal.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        clear(folder)
    return result


class Opened(NamedTuple):
    """A compressed decoder that trains in fp32, its teacher, and what both read.

    Attributes:
        seqlen: tokens of a window that both have positions for.
        dtype: that the model came in.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seqlen: int
    dtype: torch.dtype


def opened(
    source: str | Path, teacher: str | Path, method: str, seqlen: int, precision: str
) -> Opened:
    """Load both; the arguments are `heal`'s.

    Raises:
        ValueError: a model that is dense, quantised or no decoder, another vocabulary, or NaN or
            Inf in a parameter.
    """
    if not is_compressed(source):
        raise ValueError(f"{source} is dense; compress it first (mpop compress)")
    tokenizer = shared_tokenizer(source, teacher)
    model, dense = load_as_saved(source), load_as_saved(teacher)
    vocabulary_of(model, dense)
    dtype = model.dtype
    trainable(model, method).float()
    for path, each in ((source, model), (teacher, dense)):
        if bad := next((n for n, p in each.named_parameters() if not p.isfinite().all()), None):
            raise ValueError(f"{path}: expected finite parameters, got NaN or Inf in {bad}")
    held = {id(p) for _, module in mpo_modules(model) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in held:
            parameter.requires_grad_(False)
    dense.to(PRECISIONS[precision])  # type: ignore[arg-type]
    seqlen = min(seqlen, *(longest(each) or seqlen for each in (model, dense)))
    return Opened(model, dense, tokenizer, seqlen, dtype)


class Teacher:
    """How far a model's distributions are from those of a decoder of its vocabulary, as a loss.

    Args:
        model: it is not trained; it goes where the first batch is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    def __call__(self, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        self.model.to(inputs["input_ids"].device)
        with torch.no_grad():
            against = self.model(**inputs, use_cache=False).logits
        return divergence(student(**inputs, use_cache=False).logits, against)


def divergence(logits: Tensor, against: Tensor) -> Tensor:
    """Mean KL(against || model) of a target's distribution, in nats; fp32 a chunk at a time.

    Args:
        logits, against: ``[windows, n, vocabulary]``, of which the last of a window has no target.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for own, other in zip(logits, against, strict=True):
        for part in zip(own[:-1].split(CHUNK), other[:-1].split(CHUNK), strict=True):
            total = total + checkpoint(_divergences, *part, use_reentrant=False)
    return total / (len(logits) * (logits.shape[1] - 1))


def _divergences(own: Tensor, other: Tensor) -> Tensor:
    own, other = (each.float().log_softmax(-1) for each in (own, other))
    return functional.kl_div(own, other, reduction="sum", log_target=True)


def stacked(windows: list[Tensor]) -> dict[str, Tensor]:
    """A batch of windows ``[n]`` as a decoder takes it."""
    return {"input_ids": torch.stack(windows)}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """One of `PRECISIONS`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class _Progress(TrainerCallback):
    """Tells of each loss that is logged."""

    def __init__(self, tell: Callable[[int, int, float], None] | None) -> None:
        self.tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.tell is not None and state.is_world_process_zero and "loss" in (logs or {}):
            self.tell(state.global_step, state.max_steps, logs["loss"])
