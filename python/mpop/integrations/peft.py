"""Light fine-tuning as a method of peft, and peft's LoRA and prompts over MPO layers.

Importing this module registers them: peft trains, saves and loads them by its own functions then.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import wraps
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from torch import nn

from mpo_kernels import MPOEmbedding
from mpo_kernels.layers.blockwise import BlockwiseEmbedding
from mpop.integrations.light_config import PEFT_TYPE, LightConfig
from mpop.integrations.light_layer import PREFIX, LightLayer, base_of
from mpop.integrations.light_model import LightModel
from mpop.integrations.lora import MPOLoraLinear, MPOLoraModel

__all__ = ["LightConfig", "LightLayer", "LightModel", "MPOLoraLinear", "MPOLoraModel"]


def _finding_words(setup: Any) -> Any:
    """peft's setup of a prompt, which finds words that are an MPO as it finds a dense table.

    It searches the parameters for one with a row a word, and takes the module that has it.
    """

    @wraps(setup)
    def with_tables(self: PeftModel, adapter_name: str) -> None:
        with ExitStack() as after:
            for module in self.base_model.modules():
                words: Any = base_of(module)
                if isinstance(words, MPOEmbedding | BlockwiseEmbedding):
                    one = next(words.parameters()).new_empty(1, 1)
                    table = one.expand(words.num_embeddings, words.embedding_dim)
                    module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
                    after.callback(module._parameters.pop, "weight", None)
            setup(self, adapter_name)

    return with_tables


PeftModel._setup_prompt_encoder = _finding_words(  # type: ignore[method-assign]
    PeftModel._setup_prompt_encoder
)
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LightConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = LightModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = MPOLoraModel
