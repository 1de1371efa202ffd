"""`mpop heal`: train a compressed decoder on what the dense one says."""

from __future__ import annotations

import sys
from typing import Any

from mpop.cli.options.parser import command
from mpop.cli.options.values import positive_float


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands, "heal", "Train a compressed decoder on the dense one's distributions.", run
    )
    parser.add_new_output()
    parser.add_argument(
        "--teacher", required=True, metavar="DENSE", help="a hub name or folder of the dense one"
    )
    parser.add_argument(
        "--text",
        required=True,
        metavar="SOURCE",
        help="to train on: a .txt or .jsonl file (text, or messages through the chat template), a "
        "folder of them, or a data set of the hub, owner/name or owner/name:configuration",
    )
    parser.add_argument(
        "--method",
        choices=("light", "full"),
        default="light",
        help="light: train all but the central tensors; full: every tensor (light)",
    )
    parser.number("--tokens", 1_000_000, "tokens to train on")
    parser.number(
        "--learning-rate", None, "peak rate (light 3e-4, full 1e-4)", positive_float, "LR"
    )
    parser.number("--seqlen", 512, "tokens of a window, at most what the models take")
    parser.number("--batch-size", 4, "windows per device")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="autocast (fp32)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the windows and their order (0)"
    )
    parser.add_argument(
        "--evaluate", metavar="FILE", help="measure the perplexity of this text before and after"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, or begin it"
    )


def run(model: str, **options: Any) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from mpop.language.healing import heal

    def show(step: int, steps: int, loss: float) -> None:
        print(f"step {step} of {steps}: KL {loss:.4f}", file=sys.stderr, flush=True)

    result = heal(model, on_log=show, **options)
    lines = [
        f"{result['output']}: {result['tokens']:,} tokens, "
        f"{result['tokens_per_second']:,.0f} a second, "
        f"{result['trainable_parameters']:,} of {result['total_parameters']:,} parameters trained"
    ]
    if "perplexity" in result:
        lines += [
            f"{result['evaluate']}: perplexity {result['perplexity']:,.4f} "
            f"(before: {result['perplexity_before']:,.4f}, "
            f"teacher: {result['perplexity_teacher']:,.4f}), "
            f"KL {result['divergence']:.4f} (before: {result['divergence_before']:.4f})"
        ]
    return result, "\n".join(lines)
