"""`mpop evaluate`: a fine-tuned model on a task."""

from __future__ import annotations

from typing import Any

from mpop.cli.options.parser import command, metrics_table


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "evaluate", "Evaluate a fine-tuned model on a task.", run)
    parser.add_data()
    parser.add_argument("--predictions", metavar="FILE.npz", help="write the model's outputs there")


def run(model: str, **options: Any) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from mpop.finetuning.task import evaluate

    result = evaluate(model, **options)
    return result, metrics_table(result)
