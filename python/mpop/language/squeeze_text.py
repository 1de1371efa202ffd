"""Squeezing a decoder while it foretells a text, healed between the cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, set_seed

from mpop.checkpoints.opening import check_output
from mpop.data.text import read_text, token_ids, windows
from mpop.finetuning.rows import check_positive
from mpop.finetuning.squeeze_task import Squeezing
from mpop.language.healing import Teacher, autocast, opened, stacked
from mpop.language.perplexity import perplexity


def squeeze_on_text(
    model_name_or_path: str | Path,
    text: str | Path,
    teacher: str | Path,
    output: str | Path,
    *,
    evaluate: str | Path | None = None,
    seqlen: int = 512,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    **squeezing: Any,
) -> dict[str, Any]:
    """Squeeze a compressed decoder with light healing between the cuts, and save it.

    The metric is the mean log-likelihood of a target, in nats: a `max_drop` of 0.05 lets perplexity
    rise by 5 %. What is written is what `mpop.finetuning.squeeze_task.squeeze_on_task` writes.

    Args:
        model_name_or_path: a hub name or folder of a compressed decoder.
        text: a file or folder that `mpop.text_batches` reads, of which the last tenth is held out.
        teacher: see `mpop.heal`.
        evaluate: a text to measure on in the place of the last tenth.
        seqlen: tokens of a window, at most what the models have positions for.
        max_train_samples: windows to train on; all by default.
        max_eval_samples: windows to measure on; all by default.
        **squeezing: the fields of `Squeezing`, whose rows are windows; by default 4 a step, and 64
            to calibrate with.

    Returns:
        The content of `squeeze.json`: the report and the settings.

    Raises:
        ValueError: a bad argument or text, what `mpop.heal` says of the models, or `mpop.squeeze`.
        FloatingPointError: a loss that is no longer finite before anything is cut.
    """
    how = Squeezing(**{"batch_size": 4, "calibration_samples": 64, **squeezing})
    check_positive(
        seqlen=seqlen, max_train_samples=max_train_samples, max_eval_samples=max_eval_samples
    )
    check_output(output, model_name_or_path, teacher, overwrite=how.may_replace(output))
    set_seed(how.seed)
    start = opened(model_name_or_path, teacher, "light", seqlen, how.precision)
    model, tokenizer = start.model, start.tokenizer
    ids = token_ids(tokenizer, read_text(tokenizer, text), is_whole=False)
    if evaluate is None:
        ids, held_out = ids.tensor_split([len(ids) * 9 // 10])
    else:
        held_out = token_ids(tokenizer, read_text(tokenizer, evaluate), is_whole=False)
    seqlen = start.seqlen
    rows = windows(tokenizer, ids, text, samples=max_train_samples, seqlen=seqlen, seed=how.seed)
    # The same for every seed, so that runs differ in nothing else.
    measured = windows(
        tokenizer, held_out, evaluate or text, samples=max_eval_samples, seqlen=seqlen, seed=0
    )

    def likelihood(trainer: Trainer) -> float:
        with autocast(trainer.args.device, how.precision):
            found = perplexity(model, measured.flatten(), seqlen=seqlen, batch_size=how.batch_size)
        return -found.nats

    return how.run(
        model,
        tokenizer,
        model_name_or_path,
        output,
        rows=rows,  # type: ignore[arg-type]
        collate=stacked,
        metric="log_likelihood",
        evaluate=likelihood,
        calibration=[stacked([row]) for row in rows[: how.calibration_samples]] or None,
        settings={
            "text": str(text),
            "teacher": str(teacher),
            "evaluate": None if evaluate is None else str(evaluate),
            "seqlen": seqlen,
            "train_samples": len(rows),
            "eval_samples": len(measured),
        },
        loss=Teacher(start.teacher),
        dtype=start.dtype,
    )
