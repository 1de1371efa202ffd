"""SGLang: which layers of a model an MPO checkpoint holds as cores, and how they know their place.

SGLang's models pass over tensors of a checkpoint that they have no parameter for, with a warning at
most, and leave dense weights as they were allocated. So each method asks, once the weights are
loaded, whether every matrix that the checkpoint has as cores has found its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import (
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.models.utils import WeightsMapper
from sglang.srt.server_args import add_quantization_method_choices
from torch import nn

from mpop_serving.configuration import NAME, Configuration, specs_of
from mpop_serving.layers import LinearMethod, Place, VocabularyMethod
from mpop_serving.names import find, fused, table

if TYPE_CHECKING:
    from mpop.models.config import ModuleSpec

# Few of SGLang's models say which matrices they fuse.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Unheld:
    """Names of the checkpoint's compressed matrices that no layer holds yet."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)

    def check(self) -> None:
        """Raise a ValueError that names what is left."""
        for name in self.names:
            raise ValueError(
                f"{name}: no layer that SGLang builds in this process holds cores of it: compress "
                f"with exclude=({name!r},) (mpop compress --exclude '{name}'); "
                f"{len(self.names)} matrices are so"
            )


class _Checked:
    """Before another class of methods, whose work it checks."""

    unheld: Unheld
    matrices: Sequence[Any]

    @staticmethod
    def place(layer: Any) -> Place:
        return Place(*get_group_rank_size(layer.tp_group))

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        super().create_weights(layer, *sizes, **options)  # type: ignore[misc]
        for matrix in self.matrices:
            self.unheld.names.pop(matrix.name, None)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.unheld.check()
        super().process_weights_after_loading(layer)  # type: ignore[misc]


class MPOLinearMethod(_Checked, LinearMethod, LinearMethodBase):
    """A linear layer of SGLang; see :class:`LinearMethod`."""

    def __init__(self, matrices: Sequence[tuple[str, ModuleSpec | None]], unheld: Unheld) -> None:
        super().__init__(matrices)
        self.unheld = unheld


class MPOVocabularyMethod(_Checked, VocabularyMethod, LinearMethodBase):
    """An embedding or head of SGLang; see :class:`VocabularyMethod`."""

    def __init__(self, name: str, spec: ModuleSpec, unheld: Unheld) -> None:
        super().__init__(name, spec)
        self.unheld = unheld


class DenseLinearMethod(UnquantizedLinearMethod):
    """A linear layer that is dense in the checkpoint."""

    def __init__(self, unheld: Unheld) -> None:
        super().__init__()
        self.unheld = unheld

    def process_weights_after_loading(self, layer: Any) -> None:
        self.unheld.check()
        super().process_weights_after_loading(layer)


class MPOQuantizationConfig(Configuration, QuantizationConfig):
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

        config = dict(config)
        # SGLang adds these.
        packed, model = config.pop("packed_modules_mapping", None), config.pop("hf_config", None)
        is_tied = bool(getattr(model, "tie_word_embeddings", False))
        return cls(specs_of(config), packed, is_tied)

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


QUANTIZATION_METHODS[NAME] = MPOQuantizationConfig
add_quantization_method_choices([NAME])
