"""The methods with vLLM's base class, and how its layers know their place."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.linear import LinearMethodBase

from mpop_serving.layers import LinearMethod, Place, VocabularyMethod


def _place(layer: Any) -> Place:
    return Place(layer.tp_rank, layer.tp_size)


class MPOLinearMethod(LinearMethod, LinearMethodBase):
    """A linear layer of vLLM; see :class:`mpop_serving.layers.LinearMethod`."""

    place = staticmethod(_place)


class MPOVocabularyMethod(VocabularyMethod, LinearMethodBase):
    """An embedding or head of vLLM; see :class:`mpop_serving.layers.VocabularyMethod`."""

    place = staticmethod(_place)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embedding computes the logits as well, from the same cores."""
        return embed_tokens
