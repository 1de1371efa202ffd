"""MPOP on transformers: compress a model into matrix product operators, fine-tune it lightly.

Importing this package teaches `from_pretrained` and `save_pretrained` of transformers to read and
write MPO checkpoints.
"""

from importlib import import_module
from typing import Any

from mpop.checkpoint import load, save
from mpop.compress import CompressionReport, compress, merge
from mpop.config import CompressionConfig, MPOConfig
from mpop.light import ParameterCount, count_parameters, freeze_central, unfreeze

# Imported when first used. A function named as its module has to be imported above instead: the
# module, once imported from elsewhere, would take its name here.
_LAZY = {
    "format_rows": "mpop.inspect",
    "inspect_model": "mpop.inspect",
    "plot_spectra": "mpop.inspect",
}

__all__ = [
    "CompressionConfig",
    "CompressionReport",
    "MPOConfig",
    "ParameterCount",
    "compress",
    "count_parameters",
    "format_rows",
    "freeze_central",
    "inspect_model",
    "load",
    "merge",
    "plot_spectra",
    "save",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
