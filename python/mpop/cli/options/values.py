"""Values of options: what they are, and one line for what they are not."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path


def task(text: str) -> str:
    """The name of a GLUE task."""
    from mpop.data.glue import get_task

    try:
        return get_task(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive_int(text: str) -> int:
    """At least 1."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")


def positive_float(text: str) -> float:
    """Above 0, and finite."""
    if (value := _finite(text)) > 0:
        return value
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def share(text: str) -> float:
    """Above 0 and below 1."""
    if 0 < (value := _finite(text)) < 1:
        return value
    raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, got {text!r}")


def fall(text: str) -> float:
    """At least 0, and finite."""
    if (value := _finite(text)) >= 0:
        return value
    raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")


def _finite(text: str) -> float:
    """The number, NaN where it is none."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    return math.nan


def device(text: str) -> str:
    """A device of torch that is there."""
    import torch

    here = ["cpu"]
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()):
        count = torch.accelerator.device_count()
        here += [found.type, *(f"{found.type}:{k}" for k in range(count))]
    if text not in here:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(here)}, got {text!r}")
    return text


def check_plot(path: str) -> None:
    """Raise an OSError or a ValueError, before the work is done, unless it can be drawn there."""
    from matplotlib.figure import Figure

    from mpop.checkpoints.opening import check_file

    check_file(path, "the plot")
    suffix, known = Path(path).suffix[1:].lower(), Figure().canvas.get_supported_filetypes()
    if suffix and suffix not in known:
        raise ValueError(f"{path}: expected one of {', '.join(known)}, got {suffix!r}")
