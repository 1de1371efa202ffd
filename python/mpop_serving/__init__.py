"""Serving MPO checkpoints with vLLM and SGLang: plug-ins that their entry points name.

See docs/how-to/vllm.md and docs/how-to/sglang.md.
"""


def register_vllm() -> None:
    """Make the quantization method ``"mpo"`` known; vLLM calls this in each of its processes."""
    import mpop_serving.vllm  # noqa: F401  registers when it is first imported


def register_sglang() -> None:
    """Make the quantization method ``"mpo"`` known; SGLang calls this in each of its processes."""
    import mpop_serving.sglang  # noqa: F401  registers when it is first imported
