"""Parts of a model's own class, over cores: word embeddings, and experts.

Gemma's and BART's embeddings scale what `super().forward(ids)` gives. An MPO layer takes the place
that `nn.Embedding` has above such a class, which goes on working, and is recognised by its model.

Experts are modules whose parameters hold a matrix for each of them. Those that transformers can
compute by grouped products (`transformers.integrations.moe`) say how: whether there is a gate,
which `_apply_gate` is, a bias, and which way the matrices lie. Here their `forward` does the same
with `MPOExperts` in a parameter's place.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpo_kernels import MPOExperts
from mpo_kernels.layers.unformed import UnformedLayer
from mpo_kernels.ops.grouped import grouped_mm

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
    """`layer` below the methods of a subclass of `nn.Embedding`, or above those of experts."""

    def reduce(self: Any, protocol: Any) -> Any:
        # A class made at run time is not found by its name.
        return _empty, (dense, layer), vars(self)

    if layer is RoutedExperts:
        bases = (layer, dense)
    else:
        bases = (dense, type(layer.__name__, (layer, nn.Embedding), {}))
    return type(f"MPO{dense.__name__}", bases, {"__reduce_ex__": reduce})


def _empty(dense: Any, layer: Any) -> nn.Module:
    made = _over(dense, layer)
    return made.__new__(made)


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """What holds the matrices of experts that transformers can group; none of another module."""
    kind: Any = module
    if not {"is_transposed", "has_bias", "has_gate"} <= vars(module).keys():
        return ()
    if not hasattr(module, "_apply_gate") or getattr(module, "_is_expert_parallel", False):
        return ()
    return (_first(kind), "down_proj")


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


class DenseExperts(NamedTuple):
    """A parameter of experts, where a layer that holds a matrix is asked for."""

    owner: Any
    name: str

    @property
    def weight(self) -> nn.Parameter:
        """As the model has it."""
        return self.owner.get_parameter(self.name)

    def inputs(self, x: Tensor, index: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the matrices are fed in a call of the experts, by expert.

        Args:
            x, index, gates: see :meth:`RoutedExperts.forward`.

        Returns:
            ``[rows, in]`` sorted by expert, int32 ``[E]`` where each one's rows end, and what the
            outputs are multiplied by, ``[rows]``.
        """
        routes = _Routes(self.owner, index)
        rows = routes.rows(x)
        if self.name == "down_proj":
            rows = routes.hidden(rows)
        return rows, routes.offsets, gates.flatten()[routes.order]

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """Of the experts; the hook is told of this in their place."""
        return self.owner.register_forward_pre_hook(lambda _, inputs: hook(self, inputs))


class _Routes:
    """The rows of a call of experts, sorted by expert: each token as often as it is routed."""

    def __init__(self, experts: Any, index: Tensor) -> None:
        self.experts, self.times = experts, index.shape[-1]
        self.chosen, self.order = index.flatten().sort(stable=True)
        first = torch.arange(
            1, experts.num_experts + 1, dtype=self.chosen.dtype, device=self.chosen.device
        )
        self.offsets = torch.searchsorted(self.chosen, first).int()

    def rows(self, x: Tensor) -> Tensor:
        return x[self.order // self.times]

    def project(self, name: str, x: Tensor) -> Tensor:
        held = getattr(self.experts, name)
        if isinstance(held, MPOExperts):
            y = held(x, self.offsets)
        else:
            y = grouped_mm(x, held if self.experts.is_transposed else held.mT, self.offsets)
        if self.experts.has_bias:
            y = y + getattr(self.experts, f"{name}_bias")[self.chosen]
        return y

    def hidden(self, x: Tensor) -> Tensor:
        y = self.project(_first(self.experts), x)
        return self.experts._apply_gate(y) if self.experts.has_gate else self.experts.act_fn(y)

    def sum_of(self, y: Tensor) -> Tensor:
        """Over the experts of each token."""
        return y[self.order.argsort()].view(-1, self.times, y.shape[1]).sum(1)


class RoutedExperts(nn.Module):
    """The `forward` of experts of which a projection at least is held as cores."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: ``[tokens, k]``, the experts of each token.
            top_k_weights: ``[tokens, k]``, what their outputs are multiplied by.
        """
        experts: Any = self
        routes = _Routes(experts, top_k_index)
        y = routes.project("down_proj", routes.hidden(routes.rows(hidden_states)))
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        gates = top_k_weights.flatten()[routes.order, None]
        return routes.sum_of(y * gates).to(hidden_states.dtype)


def hold(owner: Any, name: str, new: MPOExperts | nn.Parameter) -> None:
    """Let experts hold a projection as cores, or as a parameter again, in their own layout."""
    del (owner._modules if name in owner._modules else owner._parameters)[name]
    setattr(owner, name, new)
    held = any(isinstance(module, MPOExperts) for module in owner.children())
    dense = type(owner).__bases__[1] if isinstance(owner, RoutedExperts) else type(owner)
    owner.__class__ = _over(dense, RoutedExperts) if held else dense
