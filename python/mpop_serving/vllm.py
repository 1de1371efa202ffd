"""vLLM: which layers of a model an MPO checkpoint holds as cores, and how they know their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
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

from mpop_serving.configuration import NAME, Configuration, specs_of
from mpop_serving.layers import LinearMethod, Place, VocabularyMethod
from mpop_serving.names import find, fused, table

if TYPE_CHECKING:
    from mpop.models.config import ModuleSpec


def _place(layer: Any) -> Place:
    return Place(layer.tp_rank, layer.tp_size)


class MPOLinearMethod(LinearMethod, LinearMethodBase):
    """A linear layer of vLLM; see :class:`LinearMethod`."""

    place = staticmethod(_place)


class MPOVocabularyMethod(VocabularyMethod, LinearMethodBase):
    """An embedding or head of vLLM; see :class:`VocabularyMethod`."""

    place = staticmethod(_place)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embedding computes the logits as well, from the same cores."""
        return embed_tokens


@register_quantization_config(NAME)
class MPOQuantizationConfig(Configuration, QuantizationConfig):
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
        return cls(specs_of(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse what vLLM would only miss when it loads the weights, in another process.

        Raises:
            ValueError: a classifier's pooler as cores, of which vLLM builds a dense one.
        """
        architectures = getattr(hf_config, "architectures", None) or []
        poolers = [name for name in self.specs if name.endswith("pooler.dense")]
        if poolers and any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ValueError(
                f"{poolers[0]}: expected to be dense in a classifier that vLLM serves: compress "
                "with exclude=('*pooler.dense',) (mpop compress --exclude '*pooler.dense')"
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is held; the prefix is its name, which some models leave empty."""
        if isinstance(layer, LinearBase):
            matrices = fused(self.specs, prefix, self.packed_modules_mapping)
            return MPOLinearMethod(matrices) if matrices else UnquantizedLinearMethod()
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        is_head = isinstance(layer, ParallelLMHead)
        if is_head and (found := find(self.specs, prefix)):
            return MPOVocabularyMethod(*found)
        model_config = get_current_vllm_config().model_config
        if is_head and not model_config.hf_text_config.tie_word_embeddings:
            return None
        found = table(self.specs, (layer.org_vocab_size, layer.embedding_dim))
        return MPOVocabularyMethod(*found) if found else None


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
