"""`mpop squeeze`: cut bonds while a task's metric holds."""

from __future__ import annotations

import math
import sys
from typing import Any

from mpop.cli.options.parser import command, refuse
from mpop.cli.options.values import fall, positive_float

# Options that only one of the two metrics has.
_OF = {"task": ("data_dir", "eval_split", "max_length"), "text": ("teacher", "evaluate", "seqlen")}


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands,
        "squeeze",
        "Cut the bonds that carry least while a metric holds, with light training between: that of "
        "a task, or of a decoder the log-likelihood of a text.",
        run,
    )
    parser.add_new_output("it, not the files beside it")
    choice = parser.add_mutually_exclusive_group(required=True)
    parser.add_data(("fp32", "bf16"), choice)
    choice.add_argument(
        "--text",
        metavar="FILE",
        help="heal on the windows of this text, whose last tenth is held out to measure on; its "
        "rows are windows, 4 a step and 64 to calibrate with by default",
    )
    parser.add_argument(
        "--teacher", metavar="DENSE", help="of --text: whose distributions are learnt"
    )
    parser.add_argument(
        "--evaluate", metavar="FILE", help="of --text: measure on this, not on its last tenth"
    )
    parser.number("--seqlen", None, "of --text: tokens of a window (512)")
    parser.add_argument(
        "--max-drop",
        type=fall,
        required=True,
        metavar="D",
        help="how far the metric may fall: a fraction of 1, 0.01 is a point; of --text nats a "
        "token, 0.05 lets perplexity rise by 5 %%",
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
        metavar="N",
        help="training rows that show what a cut costs; 0: matrices' own errors do (1500)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the squeeze in --output")
    # What is not given is the function's, and of the other metric an error.
    parser.set_defaults(batch_size=None, max_length=None, eval_split=None)


def run(
    model: str, task: str | None, text: str | None, **options: Any
) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from tqdm import tqdm

    from mpop.finetuning.squeeze_task import squeeze_on_task
    from mpop.language.squeeze_text import squeeze_on_text

    def show(made: Any) -> None:
        tqdm.write(
            f"round {made.step}: {made.cuts} bonds cut, {made.parameters:,} parameters, "
            f"metric {math.nan if made.metric is None else made.metric:.4f}, "
            f"{'kept' if made.kept else 'undone'}",
            file=sys.stderr,
        )

    other = "text" if text is None else "task"
    options = {name: value for name, value in options.items() if value is not None}
    refuse(options, _OF[other], f"--{other}")
    if text is None:
        assert task is not None
        result = squeeze_on_task(model, task, on_round=show, **options)
    elif "teacher" not in options:
        raise ValueError("--text: expected a --teacher to heal by, got none")
    else:
        result = squeeze_on_text(model, text, on_round=show, **options)
    line = (
        f"{result['output']}: {result['parameters']:,} of {result['parameters_before']:,} "
        f"parameters, {result['metric_name']} {result['metric']:.4f} "
        f"(before: {result['metric_before']:.4f})"
    )
    if text is not None:
        after, before = (math.exp(-result[name]) for name in ("metric", "metric_before"))
        line += f", perplexity {after:,.4f} (before: {before:,.4f})"
    if result["parameters"] == result["parameters_before"]:
        line += f"; no cut was within --max-drop {result['max_drop']}"
    return result, line
