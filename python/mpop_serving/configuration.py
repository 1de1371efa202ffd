"""What vLLM and SGLang ask alike of the configuration of a quantization method."""

from __future__ import annotations

from typing import Any

import torch

NAME = "mpo"


def specs_of(config: dict[str, Any]) -> dict[str, Any]:
    """The compressed matrices by name, of a checkpoint's ``quantization_config``.

    Raises:
        ValueError: it is not one that this version reads, or experts are held as cores.
    """
    from mpop.models.config import MPOConfig  # takes seconds, which other models need not wait for

    specs = MPOConfig(**config).specs()
    if experts := [name for name, spec in specs.items() if spec.kind == "experts"]:
        raise ValueError(
            f"{experts[0]}: expected experts as dense weights, got cores, which are not served: "
            "compress with --exclude '*.experts.*', or merge (mpop merge)"
        )
    return specs


class Configuration:
    """Before the base class of either."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where there is no kernel, torch's own products serve

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json
