"""Word embeddings of a model's own class, over cores.

Gemma's and BART's scale what `super().forward(ids)` gives. An MPO layer takes the place that
`nn.Embedding` has above such a class, which goes on working, and is recognised by its model.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import nn

from mpo_kernels.layers.unformed import UnformedLayer

_NOT_HELD = {*vars(nn.Embedding(1, 1, device="meta"))}
_TENSORS = ("_parameters", "_buffers", "_modules")


class Adopted(NamedTuple):
    """A subclass of `nn.Embedding`, and the names of what its instance holds beside a table."""

    dense: type
    attributes: frozenset[str]
    tensors: frozenset[str]


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Let `new`, over cores or dense, be of the class that `old` stands for, with all it holds.

    Nothing changes where that is `nn.Embedding` itself, or no embedding at all.
    """
    adopted = getattr(old, "adopted", None)
    if adopted is None:
        if not isinstance(old, nn.Embedding) or type(old) is nn.Embedding:
            return
        tensors = {name for kind in _TENSORS for name in vars(old)[kind]} - {"weight"}
        names = vars(old).keys() - _NOT_HELD
        adopted = Adopted(type(old), frozenset(names), frozenset(tensors))
    layer: Any = type(new)
    new.__class__ = _over(adopted.dense, layer) if _is_formless(new) else adopted.dense
    vars(new).update({name: vars(old)[name] for name in adopted.attributes})
    for kind in _TENSORS:
        held = vars(old)[kind].items()
        vars(new)[kind].update({name: v for name, v in held if name in adopted.tensors})
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & adopted.tensors
    if _is_formless(new):
        vars(new)["adopted"] = adopted


def _is_formless(module: nn.Module) -> bool:
    return isinstance(module, UnformedLayer)


@cache
def _over(dense: Any, layer: Any) -> Any:
    """`layer` below the methods of a subclass of `nn.Embedding`."""

    def reduce(self: Any, protocol: Any) -> Any:
        # A class made at run time is not found by its name.
        return _empty, (dense, layer), vars(self)

    base = type(layer.__name__, (layer, nn.Embedding), {})
    return type(f"MPO{dense.__name__}", (dense, base), {"__reduce_ex__": reduce})


def _empty(dense: Any, layer: Any) -> nn.Module:
    made = _over(dense, layer)
    return made.__new__(made)
