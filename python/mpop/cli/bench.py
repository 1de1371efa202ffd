"""`mpop bench`: a compressed model beside its dense self."""

from __future__ import annotations

from typing import Any

from mpop.cli.options.parser import command
from mpop.cli.options.values import check_plot, positive_int


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands, "bench", "Time a compressed model beside its dense self on this machine.", run
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=positive_int,
        default=[1, 8, 32],
        metavar="N",
        help="texts at a time (1 8 32)",
    )
    parser.number("--length", 128, "tokens a text")
    parser.number("--new-tokens", 32, "tokens to generate, where the model does")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (fp32)"
    )
    parser.number("--repeats", 10, "calls timed")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens per second")


def run(model: str, plot: str | None, **options: Any) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from mpop.benchmark import benchmark, format_benchmark, plot_benchmark

    if plot:
        check_plot(plot)
    result = benchmark(model, **options)
    if plot:
        plot_benchmark(result, plot)
    return result, format_benchmark(result)
