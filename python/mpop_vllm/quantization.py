"""Which layers of a vLLM model an MPO checkpoint holds as cores."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from mpop_vllm.layers import MPOLinearMethod, MPOVocabularyMethod

if TYPE_CHECKING:
    from mpop.config import ModuleSpec


@register_quantization_config("mpo")
class MPOQuantizationConfig(QuantizationConfig):
    """The matrices that the checkpoint's ``quantization_config`` says are held as cores.

    Args:
        specs: by the name of the module in the checkpoint, and from the moment that vLLM builds
            the model by that in vLLM's.
    """

    def __init__(self, specs: dict[str, ModuleSpec]) -> None:
        super().__init__()
        self.specs = specs

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MPOQuantizationConfig:
        """From ``config.json``; a ValueError where it is not one that this version reads."""
        from mpop.config import MPOConfig  # takes seconds, which other models need not wait for

        return cls(MPOConfig(**config).specs())

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

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is held; the prefix is its name, which some models leave empty."""
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        is_head = isinstance(layer, ParallelLMHead)
        if is_head and (found := self._find(prefix)):
            return MPOVocabularyMethod(*found)
        model_config = get_current_vllm_config().model_config
        if is_head and not model_config.hf_text_config.tie_word_embeddings:
            return None
        size = (layer.org_vocab_size, layer.embedding_dim)
        for name, spec in self.specs.items():
            if (spec.kind, spec.shape.in_features, spec.shape.out_features) == ("embedding", *size):
                return MPOVocabularyMethod(name, spec)
        return None

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        parent, _, leaf = prefix.rpartition(".")
        if leaf == "qkv_proj":
            # BERT's self-attention is built under the name of its neighbour.
            parent = re.sub(r"\.attention\.output$", ".attention.self", parent)
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        found = [self._find(name) for name in names]
        if not any(found):
            return UnquantizedLinearMethod()
        return MPOLinearMethod(
            [matrix or (name, None) for name, matrix in zip(names, found, strict=True)]
        )

    def _find(self, name: str) -> tuple[str, ModuleSpec] | None:
        """The matrix of this name, which a bare model has with a shorter or longer prefix."""
        for known, spec in self.specs.items():
            if known == name or name.endswith(f".{known}") or known.endswith(f".{name}"):
                return known, spec
        return None


class MPOVocabParallelEmbedding(VocabParallelEmbedding):
    """Asks the configuration of an MPO checkpoint even where the model does not, as BERT's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = getattr(get_current_vllm_config_or_none(), "quant_config", None)
        if isinstance(config, MPOQuantizationConfig):
            kwargs.setdefault("quant_config", config)
        super().__init__(*args, **kwargs)


# A platform from elsewhere may replace this class by its own.
if not current_platform.is_out_of_tree():
    PluggableLayer.register_oot(MPOVocabParallelEmbedding, name="VocabParallelEmbedding")
