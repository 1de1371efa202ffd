"""What is saved for backward (x or ids, and the cores) and which gradients are formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpo_kernels import ops


def _scatter(grads: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that were formed, each at the place of its input."""
    formed = iter(grads)
    return [next(formed) if need else None for need in wanted]


def _setup_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, cores, _, _ = inputs
    ctx.save_for_backward(x, *cores)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    need_x, need_cores, need_bias, _ = ctx.needs_input_grad
    x, *cores = ctx.saved_tensors
    grads: list[Tensor] = []
    if need_x or any(need_cores):
        grads = torch.ops.mpo_kernels.linear_backward(grad, x, cores, need_x, list(need_cores))
    dx, *core_grads = _scatter(grads, [need_x, *need_cores])
    bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
    return dx, core_grads, bias_grad, None


def _setup_embedding(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, cores, _ = inputs
    ctx.save_for_backward(ids, *cores)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple:
    _, need_cores, _ = ctx.needs_input_grad
    ids, *cores = ctx.saved_tensors
    grads = torch.ops.mpo_kernels.embedding_backward(grad, ids, cores, list(need_cores))
    return None, _scatter(grads, list(need_cores)), None


def _once(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("MPO layers are differentiable once, expected no create_graph=True")


for _name, _backward, _setup in (
    ("linear", _linear_backward, _setup_linear),
    ("embedding", _embedding_backward, _setup_embedding),
    ("linear_backward", _once, None),
    ("embedding_backward", _once, None),
):
    torch.library.register_autograd(
        f"mpo_kernels::{_name}", _backward, setup_context=_setup, lib=ops._LIBRARY
    )
