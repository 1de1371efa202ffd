"""Merging neighbouring cores as a plan says, and taking gradients of the parts apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_kernels.cores.chain import merge_cores
from mpo_kernels.planning.plan import groups


def merge(cores: Sequence[Tensor], split: Sequence[int]) -> list[Tensor]:
    """The parts between the cuts."""
    return [merge_cores(cores[a:b]) for a, b in groups(split, len(cores))]


def unmerge(
    cores: Sequence[Tensor],
    split: Sequence[int],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the cores from those of the merged parts."""
    result: list[Tensor | None] = []
    for (a, b), grad in zip(groups(split, len(cores)), grads, strict=True):
        result += _merge_backward(cores[a:b], grad, needs[a:b])
    return [
        None if grad is None else grad.reshape(core.shape).to(core.dtype).contiguous()
        for grad, core in zip(result, cores, strict=True)
    ]


def _merge_backward(
    cores: Sequence[Tensor], grad: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(cores)
    if grad is None or not any(needs):
        return grads
    if len(cores) > 1:
        # As precise as a sum, until it is in pieces.
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    lefts = [cores[0]]
    for k in range(1, len(cores) - 1):
        lefts.append(merge_cores([lefts[-1], cores[k]]))
    for k in range(len(cores) - 1, 0, -1):
        left, core = lefts[k - 1], cores[k].to(grad.dtype)
        d, i, j, _ = left.shape
        _, ik, jk, rk = core.shape
        split = grad.reshape(d, i, ik, j, jk, rk)
        if needs[k]:
            grads[k] = torch.tensordot(left.to(grad.dtype), split, dims=([0, 1, 2], [0, 1, 3]))
        if not any(needs[:k]):
            return grads
        grad = torch.tensordot(split, core, dims=([2, 4, 5], [1, 2, 3]))
    grads[0] = grad
    return grads


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total [m, n] + a [m, k] × b [k, n]``, in place; from the second on in fp32 or better."""
    if total is None:
        return a @ b
    total = total.to(torch.promote_types(a.dtype, torch.float32))
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)
