"""What is saved for backward (x or ids, and the cores) and which gradients are formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from mpo_kernels.ops.schemas import LIBRARY


def _scatter(grads: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that were formed, each at the place of its input."""
    formed = iter(grads)
    return [next(formed) if need else None for need in wanted]


def writable(y: Tensor) -> Tensor:
    """The result of a Function's forward, as no view: in place of one a model could not write."""
    return torch.ops.aten._unsafe_view(y, y.shape)


# forward with a context of its own: a separate setup_context inspects signatures at every call.
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, out_features: int, *cores: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *cores)
        with torch._C._AutoDispatchBelowAutograd():
            return writable(torch.ops.mpo_kernels.linear(x, cores, bias, out_features))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        need_x, need_bias, _, *need_cores = ctx.needs_input_grad
        x, *cores = ctx.saved_tensors
        grads: list[Tensor] = []
        if need_x or any(need_cores):
            with torch._C._AutoDispatchBelowAutograd():
                grads = torch.ops.mpo_kernels.linear_backward(grad, x, cores, need_x, need_cores)
        dx, *core_grads = _scatter(grads, [need_x, *need_cores])
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return dx, bias_grad, None, *core_grads


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, num_embeddings: int, embedding_dim: int, *cores: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids, *cores)
        with torch._C._AutoDispatchBelowAutograd():
            rows = torch.ops.mpo_kernels.embedding(ids, cores, num_embeddings, embedding_dim)
            return writable(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        _, _, _, *need_cores = ctx.needs_input_grad
        ids, *cores = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            grads = torch.ops.mpo_kernels.embedding_backward(grad, ids, cores, need_cores)
        return None, None, None, *_scatter(grads, need_cores)


def _trains(*tensors: Tensor | None) -> bool:
    # Functions refuse a tangent of forward mode; an operator below them would lose it.
    tangents = forward_ad._current_level >= 0
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return tangents or trains


# Registered at the Autograd key by hand: torch.library.register_autograd flattens every call's
# arguments in Python, which costs more than a small layer.
def _linear(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    if _trains(x, bias, *cores):
        return _Linear.apply(x, bias, out_features, *cores)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mpo_kernels.linear(x, cores, bias, out_features)


def _embedding(ids: Tensor, cores: list[Tensor], num_embeddings: int, embedding_dim: int) -> Tensor:
    if _trains(*cores):
        return _Embedding.apply(ids, num_embeddings, embedding_dim, *cores)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mpo_kernels.embedding(ids, cores, num_embeddings, embedding_dim)


def _below_autograd(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.mpo_kernels, name).default

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


LIBRARY.impl("linear", _linear, "Autograd")
LIBRARY.impl("embedding", _embedding, "Autograd")
for name in ("linear_backward", "embedding_backward"):
    LIBRARY.impl(name, _below_autograd(name), "Autograd")
