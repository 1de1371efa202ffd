"""What users import stays where it is, whatever room holds it."""

from importlib import import_module

import pytest

PUBLIC = {
    "mpo_kernels": "Decomposition InterpolativeLinear MPOEmbedding MPOExperts MPOLinear MPOShape "
    "Plan QuantizedInterpolativeLinear QuantizedMPOLinear __version__ available_backends decompose "
    "mpo_embedding mpo_linear reconstruct round_cores use_backend",
    "mpo_kernels.export": "DECOMPOSITIONS",
    "mpop": "CompressionConfig CompressionReport Exported MPOConfig ParameterCount Perplexity "
    "Settler SqueezeReport balance compress count_parameters dequantize_centres export format_rows "
    "freeze_central heal inspect_model interpolate load merge model_card optimize_for_inference "
    "perplexity plot_spectra plot_trace push_to_hub quantize quantize_centres save squeeze "
    "text_batches unfreeze",
    "mpop.benchmark": "benchmark",
    "mpop.cli": "main",
    "mpop.demo": "default_model main",
    "mpop.finetune": "evaluate finetune",
    "mpop.peft": "LightConfig",
    "mpop.sentiment": "write",
}
NO_FUNCTIONS = ("__version__", "DECOMPOSITIONS")


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module: str) -> None:
    """Functions and classes, not modules that took their names."""
    found, names = import_module(module), PUBLIC[module].split()
    assert [n for n in names if not callable(getattr(found, n)) and n not in NO_FUNCTIONS] == []
    assert set(getattr(found, "__all__", names)) == set(names)
