"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators: the plans' products.

Two operations for each multiply-add that is done, merging cores and recomputing for backward
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mpo_kernels import backends
from mpo_kernels.backends.torch import gather
from mpo_kernels.planning.plan import Gradients


def _of_plan(
    x: Tensor, cores: Sequence[Tensor], out_features: int, gradients: Gradients | None = None
) -> int:
    rows = x.shape[:-1].numel()
    if not rows:
        return 0
    features = (x.shape[-1], out_features)
    backend = backends.selected(x)
    plan = backend.plan_for(rows, x.dtype, x.device, cores, gradients, features)
    return 2 * plan.macs_for(rows)


@register_flop_formula(torch.ops.mpo_kernels.linear, get_raw=True)
def _linear(x: Tensor, cores: Any, bias: Any, out_features: int, out_val: Any = None) -> int:
    return _of_plan(x, cores, out_features)


@register_flop_formula(torch.ops.mpo_kernels.quantized_linear, get_raw=True)
def _quantized_linear(
    x: Tensor, cores: Any, scales: Any, bias: Any, out_features: int, out_val: Any = None
) -> int:
    return _of_plan(x, cores, out_features)


@register_flop_formula(torch.ops.mpo_kernels.linear_backward, get_raw=True)
def _linear_backward(
    grad: Tensor, x: Tensor, cores: Any, need_x: bool, need_cores: Any, out_val: Any = None
) -> int:
    return _of_plan(x, cores, grad.shape[-1], Gradients(need_x, tuple(need_cores)))


@register_flop_formula(torch.ops.mpo_kernels.embedding, get_raw=True)
def _embedding(ids: Tensor, cores: Any, *sizes: int, out_val: Any = None) -> int:
    return 2 * gather.macs(ids.numel(), cores)


@register_flop_formula(torch.ops.mpo_kernels.embedding_backward, get_raw=True)
def _embedding_backward(
    grad: Tensor, ids: Tensor, cores: Any, need_cores: Any, out_val: Any = None
) -> int:
    return 2 * gather.macs(ids.numel(), cores, need_cores) if ids.numel() else 0
