"""`mpop finetune`: fine-tune on a GLUE task, and evaluate."""

from __future__ import annotations

from typing import Any

from mpop.cli.options.parser import command, metrics_table
from mpop.cli.options.values import positive_float, share


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "finetune", "Fine-tune on a GLUE task and evaluate.", run)
    parser.add_new_output("it, not the files beside it")
    parser.add_data()
    parser.add_argument(
        "--method",
        choices=("dense", "full", "light"),
        default="dense",
        help="dense: ordinary fine-tuning; full: compress at full rank, train every tensor; "
        "light: compress by --share, train all but the central tensors and embeddings (dense)",
    )
    parser.number(
        "--share",
        None,
        "trained parameters of each matrix of a light run, as a fraction of the dense ones (0.1)",
        share,
        "S",
    )
    parser.add_argument(
        "--centre-bits",
        type=int,
        choices=(4, 8),
        help="hold the frozen centres of a light run in so many bits while it trains",
    )
    parser.add_training_set()
    parser.number("--epochs", 3.0, "passes over the data", positive_float)
    parser.number(
        "--learning-rate",
        None,
        "peak rate of all but MPO tensors (5e-5; light 1e-4)",
        positive_float,
        "LR",
    )
    parser.number(
        "--mpo-learning-rate",
        None,
        "peak rate of the trained MPO tensors (--learning-rate)",
        positive_float,
        "LR",
    )
    parser.number("--gradient-accumulation-steps", 1, "batches per optimizer step")
    parser.number("--save-steps", None, "write a checkpoint every N steps")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output, or begin"
    )
    parser.add_argument(
        "--report-to", default="none", metavar="NAME", help="a tracker, e.g. tensorboard (none)"
    )


def run(model: str, share: float | None, **options: Any) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from mpop.finetuning.task import finetune
    from mpop.models.config import CompressionConfig

    method = options["method"]
    if options["mpo_learning_rate"] is not None and method == "dense":
        raise ValueError("--mpo-learning-rate: expected --method full or light, got dense")
    if share is not None:
        if method != "light":
            raise ValueError(f"--share: expected --method light, got {method}")
        options["config"] = CompressionConfig(share=share, embeddings=False)
    result = finetune(model, **options)
    return result, metrics_table(result)
