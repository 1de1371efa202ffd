"""`mpop squeeze`: cut bonds while a task's metric holds."""

from __future__ import annotations

import math
import sys
from typing import Any

from mpop.cli.options.parser import command
from mpop.cli.options.values import fall, positive_float


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands,
        "squeeze",
        "Cut the bonds that carry least while a task's metric holds, with light fine-tuning.",
        run,
    )
    parser.add_output()
    parser.add_data(("fp32", "bf16"))
    parser.add_argument(
        "--max-drop",
        type=fall,
        required=True,
        metavar="D",
        help="how far the metric may fall, as a fraction of 1: 0.01 is a point",
    )
    parser.number("--max-rounds", 50, "cuts at most")
    parser.number(
        "--step",
        0.05,
        "fraction of the cores' parameters that the first round cuts",
        positive_float,
        "F",
    )
    parser.number("--settle-steps", 200, "optimizer steps between two cuts at most")
    parser.number("--window", 20, "steps whose mean loss tells whether it has settled")
    parser.number("--learning-rate", 2e-05, "constant rate", positive_float, "LR")
    parser.add_training_set()
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=1500,
        metavar="N",
        help="training rows that show what a cut costs; 0: matrices' own errors do (1500)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the squeeze in --output")


def run(model: str, **options: Any) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from tqdm import tqdm

    from mpop.finetuning.squeeze_task import squeeze_on_task

    def show(made: Any) -> None:
        tqdm.write(
            f"round {made.step}: {made.cuts} bonds cut, {made.parameters:,} parameters, "
            f"metric {math.nan if made.metric is None else made.metric:.4f}, "
            f"{'kept' if made.kept else 'undone'}",
            file=sys.stderr,
        )

    result = squeeze_on_task(model, on_round=show, **options)
    text = (
        f"{result['output']}: {result['parameters']:,} of {result['parameters_before']:,} "
        f"parameters, {result['metric_name']} {result['metric']:.4f} "
        f"(before: {result['metric_before']:.4f})"
    )
    if result["parameters"] == result["parameters_before"]:
        text += f"; no cut was within --max-drop {result['max_drop']}"
    return result, text
