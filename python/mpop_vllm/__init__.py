"""vLLM serves MPO checkpoints: the plug-in that vLLM finds by its entry point; see docs/vllm.md."""


def register() -> None:
    """Make the quantization method ``"mpo"`` known; vLLM calls this in each of its processes."""
    import mpop_vllm.quantization  # noqa: F401  registers when it is first imported
