"""What users import stays where it is, whatever room holds it."""

from importlib import import_module

import pytest

PUBLIC = {
    "mpo_kernels": (
        *("Decomposition", "MPOEmbedding", "MPOLinear", "MPOShape", "Plan", "QuantizedMPOLinear"),
        *("available_backends", "decompose", "mpo_embedding", "mpo_linear", "reconstruct"),
        *("round_cores", "use_backend", "__version__"),
    ),
    "mpo_kernels.export": ("DECOMPOSITIONS",),
    "mpop": (
        *("CompressionConfig", "CompressionReport", "Exported", "MPOConfig", "ParameterCount"),
        *("Settler", "SqueezeReport", "balance", "compress", "count_parameters"),
        *("dequantize_centres", "export", "format_rows", "freeze_central", "inspect_model", "load"),
        *("merge", "model_card", "plot_spectra", "plot_trace", "push_to_hub", "quantize_centres"),
        *("save", "squeeze", "unfreeze"),
    ),
    "mpop.benchmark": ("benchmark",),
    "mpop.cli": ("main",),
    "mpop.demo": ("default_model", "main"),
    "mpop.finetune": ("evaluate", "finetune"),
    "mpop.peft": ("LightConfig",),
    "mpop.sentiment": ("write",),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module: str) -> None:
    found = import_module(module)
    assert [name for name in PUBLIC[module] if not callable(getattr(found, name))] == [
        name for name in PUBLIC[module] if name in ("__version__", "DECOMPOSITIONS")
    ]
    if hasattr(found, "__all__"):
        assert set(found.__all__) == set(PUBLIC[module])
