"""`mpop export`: a program that runs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpop.cli.options.parser import command

EXPORTS = ("onnx", "pt2", "aoti")


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands, "export", "Write a model as a program that runs without this package.", run
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="O",
        help="onnx: the folder to write onnx/model.onnx, config and tokenizer in; "
        "else the .pt2 file to write",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=EXPORTS,
        help="onnx; pt2: for torch.export.load; aoti: compiled for this machine by AOTInductor",
    )


def run(model: str, output: str, format: str) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    import mpop
    from mpop.checkpoints.opening import copy_companions, load_as_saved
    from mpop.integrations.export import check_request

    check_request(Path(output), format)
    made = mpop.export(load_as_saved(model).float(), output, format)
    if format == "onnx":
        copy_companions(model, output)
    result = {"model": model, "output": output, "format": format, **made._asdict()}
    text = f"{output}: {made.bytes / 1e6:.1f} MB, outputs within {made.error:.1e} of the model's"
    return result, text
