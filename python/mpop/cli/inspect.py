"""`mpop inspect`: a model's matrices, ranks and entropies."""

from __future__ import annotations

from typing import Any

from mpop.cli.options.parser import command
from mpop.cli.options.values import check_plot


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "inspect", "List a model's matrices: shapes, ranks, entropies.", run)
    parser.add_device()
    parser.add_argument("--plot", metavar="FILE", help="draw the singular values of each bond")


def run(model: str, device: str, plot: str | None) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    import mpop
    from mpop.checkpoints.opening import load_as_saved

    if plot:
        check_plot(plot)
    loaded = load_as_saved(model).to(device)  # type: ignore[arg-type]
    rows = mpop.inspect_model(loaded)
    if plot:
        mpop.plot_spectra(loaded, plot)
    result = {"model": model, "rows": [row.to_dict() for row in rows]}
    return result, mpop.format_rows(rows)
