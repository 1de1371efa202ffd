"""Which layers of an SGLang model an MPO checkpoint holds as cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.models.utils import WeightsMapper
from sglang.srt.server_args import add_quantization_method_choices
from torch import nn

from mpop_serving.names import find, fused, table
from mpop_sglang.layers import DenseLinearMethod, MPOLinearMethod, MPOVocabularyMethod, Unheld

if TYPE_CHECKING:
    from mpop.config import ModuleSpec

# Few of SGLang's models say which matrices they fuse.
_FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


class MPOQuantizationConfig(QuantizationConfig):
    """The matrices that the checkpoint's ``quantization_config`` says are held as cores.

    Args:
        specs: by the name of the module in the checkpoint.
        packed: by the name of a fused layer, those of its matrices; beside the usual ones.
        is_tied: whether the model's head is its word embedding.
    """

    def __init__(
        self,
        specs: Mapping[str, ModuleSpec],
        packed: Mapping[str, Sequence[str]] | None = None,
        is_tied: bool = False,
    ) -> None:
        super().__init__()
        self.specs, self.is_tied = specs, is_tied
        self.packed_modules_mapping = {**_FUSED, **(packed or {})}
        self.unheld = Unheld(specs)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MPOQuantizationConfig:
        """From ``config.json``; a ValueError where it is not one that this version reads."""
        from mpop.config import MPOConfig  # takes seconds, which other models need not wait for

        config = dict(config)
        # SGLang adds these.
        packed, model = config.pop("packed_modules_mapping", None), config.pop("hf_config", None)
        is_tied = bool(getattr(model, "tie_word_embeddings", False))
        return cls(MPOConfig(**config).specs(), packed, is_tied)

    def get_name(self) -> str:
        return "mpo"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where there is no kernel, torch's own products serve

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: WeightsMapper) -> None:
        self.specs = hf_to_sglang_mapper.apply_dict(self.specs)
        self.unheld = Unheld(self.specs)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is held; the prefix is its name."""
        if isinstance(layer, LinearBase):
            matrices = fused(self.specs, prefix, self.packed_modules_mapping)
            if matrices is None:
                return DenseLinearMethod(self.unheld)
            return MPOLinearMethod(matrices, self.unheld)
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        word_table = table(self.specs, (layer.org_vocab_size, layer.embedding_dim))
        if not isinstance(layer, ParallelLMHead):
            found = word_table
        else:
            found = find(self.specs, prefix)
            if found is None and word_table is not None and self.is_tied:
                raise ValueError(
                    f"{word_table[0]}: expected a head that is the embedding itself, got one of "
                    "its own in SGLang's model: compress with embeddings=False (mpop compress "
                    "--no-embeddings)"
                )
        return MPOVocabularyMethod(*found, self.unheld) if found else None


QUANTIZATION_METHODS["mpo"] = MPOQuantizationConfig
add_quantization_method_choices(["mpo"])
