"""`mpop bench`: a compressed model beside its dense self."""

from __future__ import annotations

from typing import Any

from mpop.cli.options import command, positive_int


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands,
        "bench",
        "Time a compressed model beside its dense self on this machine.",
        run,
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=positive_int,
        default=[1, 8, 32],
        metavar="N",
        help="texts at a time (1 8 32)",
    )
    parser.add_argument(
        "--length", type=positive_int, default=128, metavar="N", help="tokens a text (128)"
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_int,
        default=32,
        metavar="N",
        help="tokens to generate, where the model does (32)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (fp32)"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=10, metavar="N", help="calls timed (10)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw tokens per second")


def run(model: str, plot: str | None, **options: Any) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    from mpop.benchmark import benchmark, format_benchmark, plot_benchmark

    result = benchmark(model, **options)
    if plot:
        plot_benchmark(result, plot)
    return result, format_benchmark(result)
