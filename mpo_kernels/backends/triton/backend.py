"""The Triton back end: fused kernels where they win, the library's GEMMs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mpo_kernels.backends.torch import merging
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.backends.triton import panels, tuning
from mpo_kernels.backends.triton.chain import chain
from mpo_kernels.backends.triton.device import limits
from mpo_kernels.backends.triton.gather import gather, gather_gradient
from mpo_kernels.backends.triton.matrix import matrix_chain, matrix_gradient
from mpo_kernels.backends.triton.planning import plan_fused
from mpo_kernels.backends.triton.tiles import GatherTile, MatrixTile, TwoParts
from mpo_kernels.planning.figures import device_figures
from mpo_kernels.planning.plan import (
    Call,
    Gradients,
    Launch,
    Plan,
    merged_parts,
    row_bucket,
    shapes_of,
)
from mpo_kernels.planning.work import merge_work


class TritonBackend(TorchBackend):
    """One kernel for two parts, forward and backward, where a plan has launches; and embeddings."""

    def plan(self, call: Call, device: torch.device, cores: Sequence[Tensor]) -> Plan:
        return plan_fused(call, device_figures(device, call.dtype), limits(device))

    def contract(
        self, plan: Plan, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, out_features: int
    ) -> Tensor:
        if plan.algorithm == "panels" and x.dtype in panels.DTYPES:
            y = x.new_empty(x.shape[0], out_features)
            panels.forward(x, cores, bias, y, plan)
            return y
        if not plan.launches:
            return super().contract(plan, x, cores, bias, out_features)
        bias = None if bias is None else bias.contiguous()
        return _product(x, *_factors(_merged(cores, plan.split)), bias, plan.launches[0])

    def contract_backward(
        self, plan: Plan, grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        if plan.algorithm == "panels" and x.dtype in panels.DTYPES:
            return panels.backward(grad, x, cores, gradients, plan)
        if not plan.launches:
            return super().contract_backward(plan, grad, x, cores, gradients)
        merged = _merged(cores, plan.split)
        left, right = _factors(merged)
        dx: Tensor | None = None
        sums: dict[str, Tensor] = {}
        for launch in plan.launches:
            if launch.result == "dx":
                dx = _product(grad, left, right, None, launch)
            else:
                sums[launch.result] = _part_gradient(grad, x, left, right, launch)
        grads = sums.get("left"), sums.get("right")
        return dx, _unmerged(cores, plan.split, merged, grads, gradients.cores)

    def embedding(self, ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
        split = _table_split(len(ids), cores)
        if split is None:
            return super().embedding(ids, cores, embedding_dim)
        merged = _merged(cores, (split,))
        problem, tile = _table(len(ids), merged, embedding_dim, "gather")
        return gather(ids.contiguous(), *_factors(merged), problem, tile)

    def embedding_backward(
        self, grad: Tensor, ids: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        split = _table_split(len(ids), cores)
        # The kernel adds atomically; where torch asks for deterministic algorithms torch sorts.
        if split is None or torch.are_deterministic_algorithms_enabled():
            return super().embedding_backward(grad, ids, cores, needs)
        merged = _merged(cores, (split,))
        left, right = _factors(merged)
        problem, tile = _table(len(ids), merged, grad.shape[1], "gather_gradient")
        ids, of_left, of_right = ids.contiguous(), None, None
        if any(needs[:split]):
            of_left = gather_gradient(grad, ids, right, True, problem, tile).unsqueeze(0)
        if any(needs[split:]):
            total = gather_gradient(grad, ids, left, False, problem, tile)
            of_right = total.permute(2, 0, 1).unsqueeze(3)
        return _unmerged(cores, (split,), merged, (of_left, of_right), needs)


# Of each group of cores its first one, its first two merged, …, the part.
Merged: TypeAlias = Sequence[Sequence[Tensor]]


def _merged(cores: Sequence[Tensor], split: Sequence[int]) -> Merged:
    if cores[0].dtype in panels.DTYPES:
        return panels.merge(cores, split)
    return [[part] for part in merging.merge(cores, split)]


def _unmerged(
    cores: Sequence[Tensor],
    split: Sequence[int],
    merged: Merged,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the cores from those of the parts, in fp32."""
    if cores[0].dtype in panels.DTYPES:
        sums = [None if grad is None else grad.contiguous()[None] for grad in grads]
        return panels.unmerge(cores, split, merged, sums, needs)
    return merging.unmerge(cores, split, grads, needs)


def _factors(merged: Merged) -> tuple[Tensor, Tensor]:
    """``left [1, i, j, D]`` and ``right [D, i, j, 1]`` as views ``[i, j, D]``."""
    left, right = merged[0][-1], merged[1][-1]
    return left[0], right[..., 0].permute(1, 2, 0)


def _product(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, launch: Launch) -> Tensor:
    """y from x or, with in and out exchanged, dx from dy."""
    if launch.result == "dx":
        left, right = left.transpose(0, 1), right.transpose(0, 1)
    first, second = (left, right) if launch.first == "left" else (right, left)
    kernel = matrix_chain if isinstance(launch.tile, MatrixTile) else chain
    return kernel(x, first, second, bias, launch.problem, launch.tile)


def _part_gradient(grad: Tensor, x: Tensor, left: Tensor, right: Tensor, launch: Launch) -> Tensor:
    """The gradient ``[1, i, j, D]`` or ``[D, i, j, 1]`` of one part, in fp32."""
    of_left = launch.result == "left"
    other = right if of_left else left
    if launch.first == "x":
        total = matrix_gradient(x, grad, other, launch.problem, launch.tile)
    else:
        total = matrix_gradient(grad, x, other.transpose(0, 1), launch.problem, launch.tile)
        total = total.transpose(0, 1)
    return total.unsqueeze(0) if of_left else total.permute(2, 0, 1).unsqueeze(3)


def _table(
    tokens: int, merged: Merged, embedding_dim: int, kernel: str
) -> tuple[TwoParts, GatherTile]:
    parts = [group[-1] for group in merged]
    (left, right), like = shapes_of(parts), parts[0]
    problem = TwoParts(*left[1:3], *right[1:3], left[3], left[1] * right[1], embedding_dim)
    best = tuning.best(kernel, problem, row_bucket(tokens), like.dtype, limits(like.device))
    if best is None:
        raise RuntimeError(f"no tile of {kernel} fits {like.device}: {problem}")
    return problem, best.tile


def _table_split(tokens: int, cores: Sequence[Tensor]) -> int | None:
    """Where two parts form rows with the fewest multiply-adds; None where no two parts fit."""
    shapes = shapes_of(cores)
    ways: list[tuple[int, int]] = []
    for k in range(1, len(shapes)):
        if tokens and (parts := merged_parts(shapes, (k,))):
            left, right = parts
            merging = sum(w.macs for w in merge_work(shapes, (k,), 1, None))
            ways.append((merging + tokens * left[2] * left[3] * right[2], k))
    return min(ways)[1] if ways else None
