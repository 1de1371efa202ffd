"""The methods with SGLang's base classes, and how its layers know their place.

SGLang's models pass over tensors of a checkpoint that they have no parameter for, with a warning at
most, and leave dense weights as they were allocated. So each method asks, once the weights are
loaded, whether every matrix that the checkpoint has as cores has found its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mpop_serving.layers import LinearMethod, Place, VocabularyMethod

if TYPE_CHECKING:
    from mpop.config import ModuleSpec


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
    """A linear layer of SGLang; see :class:`mpop_serving.layers.LinearMethod`."""

    def __init__(self, matrices: Sequence[tuple[str, ModuleSpec | None]], unheld: Unheld) -> None:
        super().__init__(matrices)
        self.unheld = unheld


class MPOVocabularyMethod(_Checked, VocabularyMethod, LinearMethodBase):
    """An embedding or head of SGLang; see :class:`mpop_serving.layers.VocabularyMethod`."""

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
