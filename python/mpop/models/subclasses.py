"""Word embeddings of a model's own class, over cores.

Gemma's and BART's scale what `super().forward(ids)` gives. Such methods go on working above an MPO
layer: they are the same functions, whose `super()` is that layer.
"""

from __future__ import annotations

from functools import cache
from types import CellType, FunctionType
from typing import Any, NamedTuple

from torch import nn

# What every class has, and what a layer of cores does in its own way.
_NOT_ADDED = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__", "__init__"),
    *("reset_parameters", "extra_repr", "from_pretrained"),
}
_NOT_HELD = {*vars(nn.Embedding(1, 1, device="meta"))}
_TENSORS = ("_parameters", "_buffers", "_modules")


class Adopted(NamedTuple):
    """A subclass of `nn.Embedding`, and the names of what its instance holds beside a table."""

    dense: type
    attributes: frozenset[str]
    tensors: frozenset[str]


def can_be_adopted(cls: type) -> bool:
    """Whether all that a subclass of `nn.Embedding` adds are its own plain methods and values."""
    own = _own_classes(cls)
    return {*cls.__mro__} == {*nn.Embedding.__mro__, *own} and all(
        isinstance(value, FunctionType | property | staticmethod | bool | int | float | str | None)
        and not hasattr(value, "__wrapped__")
        for each in own
        for value in _added(each).values()
    )


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Let `new`, over cores or dense, be of the class that `old` stands for, with all it holds.

    Nothing changes where that is `nn.Embedding` itself, or no embedding at all.
    """
    adopted = getattr(old, "adopted", None)
    if adopted is None:
        if not _own_classes(type(old)):
            return
        tensors = {name for kind in _TENSORS for name in vars(old)[kind]} - {"weight"}
        names = vars(old).keys() - _NOT_HELD
        adopted = Adopted(type(old), frozenset(names), frozenset(tensors))
    is_dense, layer = isinstance(new, nn.Embedding), new.__class__
    new.__class__ = adopted.dense if is_dense else _over(adopted.dense, layer)  # type: ignore[arg-type]
    vars(new).update({name: vars(old)[name] for name in adopted.attributes})
    for kind in _TENSORS:
        held = vars(old)[kind].items()
        vars(new)[kind].update({name: v for name, v in held if name in adopted.tensors})
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & adopted.tensors
    if not is_dense:
        vars(new)["adopted"] = adopted


def _own_classes(cls: type) -> list[type]:
    """Those below `nn.Embedding`, the nearest to it first."""
    return [each for each in reversed(cls.__mro__) if nn.Embedding in each.__mro__[1:]]


def _added(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in _NOT_ADDED}


@cache
def _over(dense: Any, layer: Any) -> Any:
    """`layer` below the methods of a subclass of `nn.Embedding`."""

    def reduce(self: Any, protocol: Any) -> Any:
        # A class made at run time is not found by its name.
        return _empty, (dense, layer), vars(self)

    made = layer
    for each in _own_classes(dense):
        cell = CellType()
        names = {name: _in_class(value, cell) for name, value in _added(each).items()}
        made = type(f"MPO{each.__name__}", (made,), {**names, "__reduce_ex__": reduce})
        cell.cell_contents = made
    return made


def _empty(dense: Any, layer: Any) -> nn.Module:
    made = _over(dense, layer)
    return made.__new__(made)


def _in_class(value: Any, cell: CellType) -> Any:
    """The same function, whose `super()` looks above the class in the cell."""
    if not isinstance(value, FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    closure = tuple(
        cell if name == "__class__" else old
        for name, old in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    )
    code, defaults = value.__code__, value.__defaults__
    made = FunctionType(code, value.__globals__, value.__name__, defaults, closure)
    made.__kwdefaults__ = value.__kwdefaults__
    return made
