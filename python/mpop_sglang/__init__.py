"""SGLang serves MPO checkpoints: the plug-in that its entry point names; see docs/sglang.md."""


def register() -> None:
    """Make the quantization method ``"mpo"`` known; SGLang calls this in each of its processes."""
    import mpop_sglang.quantization  # noqa: F401  registers when it is first imported
