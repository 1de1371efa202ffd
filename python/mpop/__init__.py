"""MPOP on transformers: compress a model into matrix product operators, fine-tune it lightly.

Importing this package teaches `from_pretrained` and `save_pretrained` of transformers to read and
write MPO checkpoints.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

if find_spec("transformers") is not None:  # without it, the command still says what to install
    from mpop.checkpoints.card import model_card
    from mpop.checkpoints.folder import load, push_to_hub, save
    from mpop.checkpoints.quantizer import ON_ATTACH
    from mpop.compression.compress import compress, merge
    from mpop.compression.interpolate import interpolate
    from mpop.compression.report import CompressionReport
    from mpop.data.text import text_batches
    from mpop.finetuning.settle import Settler
    from mpop.finetuning.squeeze import SqueezeReport, squeeze
    from mpop.integrations.export import Exported, export
    from mpop.language.perplexity import Perplexity, perplexity
    from mpop.models.config import CompressionConfig, MPOConfig
    from mpop.models.light import (
        ParameterCount,
        balance,
        count_parameters,
        freeze_central,
        unfreeze,
    )
    from mpop.models.quantized import (
        dequantize_centres,
        optimize_for_inference,
        quantize,
        quantize_centres,
    )

    @ON_ATTACH.append
    def _tell_peft() -> None:
        if "peft" in sys.modules:  # without it, prompts would not find the words
            import_module("mpop.peft")


# Imported when first used.
_LAZY = {
    "format_rows": "mpop.compression.inspect",
    "heal": "mpop.language.healing",
    "inspect_model": "mpop.compression.inspect",
    "plot_spectra": "mpop.compression.inspect",
    "plot_trace": "mpop.finetuning.squeeze",
}

__all__ = [
    "CompressionConfig",
    "CompressionReport",
    "Exported",
    "MPOConfig",
    "ParameterCount",
    "Perplexity",
    "Settler",
    "SqueezeReport",
    "balance",
    "compress",
    "count_parameters",
    "dequantize_centres",
    "export",
    "format_rows",
    "freeze_central",
    "heal",
    "inspect_model",
    "interpolate",
    "load",
    "merge",
    "model_card",
    "optimize_for_inference",
    "perplexity",
    "plot_spectra",
    "plot_trace",
    "push_to_hub",
    "quantize",
    "quantize_centres",
    "save",
    "squeeze",
    "text_batches",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in __all__:
        raise ModuleNotFoundError(
            'mpop needs transformers: pip install "mpo-kernels[mpop]"', name="transformers"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
