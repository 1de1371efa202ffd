"""The CUDA back end: thin products for few rows of a served layer; the others do the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from itertools import combinations

import torch
from torch import Tensor

from mpo_kernels.backends.cuda import extension
from mpo_kernels.backends.cuda.decode import DTYPES, decode
from mpo_kernels.backends.cuda.thin import (
    MAX_PARTS,
    MAX_ROWS,
    Chain,
    Layout,
    chain_of,
    laid_out,
    laid_out_chain,
)
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.backends.torch.merging import merge
from mpo_kernels.backends.triton import device as triton_device
from mpo_kernels.cores.quantize import LARGEST
from mpo_kernels.planning.figures import DeviceFigures, device_figures
from mpo_kernels.planning.plan import (
    Call,
    Gradients,
    Launch,
    Plan,
    best_of,
    merged_parts,
    shapes_of,
)
from mpo_kernels.planning.work import time_of

# Library calls that take the host as long as one launch of a product.
STARTED = 0.25


class CudaBackend(TorchBackend):
    """Thin products at up to sixteen rows of fp16 or bf16 where cores lie so."""

    def plan(self, call: Call, device: torch.device, cores: Sequence[Tensor]) -> Plan:
        if call.gradients is not None or not _serves(call):
            return rest_of(device, call.dtype).plan(call, device, cores)
        figures = device_figures(device, call.dtype)
        return _plan(call, layouts_of(cores), call.dtype, device, figures)

    def quantized_plan(self, call: Call, device: torch.device, cores: Sequence[Tensor]) -> Plan:
        if not _serves(call):
            return rest_of(device, call.dtype).quantized_plan(call, device, cores)
        figures = device_figures(device, call.dtype)
        return _plan(call, layouts_of(cores), cores[0].dtype, device, figures)

    def served(self, cores: Sequence[Tensor], rows: int, features: tuple[int, int]) -> list[Tensor]:
        stored, device, shapes = cores[0].dtype, cores[0].device, shapes_of(cores)
        in_bytes = stored in LARGEST
        dtype = DTYPES[0] if in_bytes else stored
        parts = rest_of(device, dtype).served(cores, rows, features)
        call = Call(shapes_of(parts), features, rows, dtype)
        if not _serves(call):
            return parts
        figures, cuts = device_figures(device, dtype), range(1, len(shapes))
        if in_bytes:
            seconds, splits = math.inf, [tuple(cuts)]
        else:
            seconds = 1e-6 * rest_of(device, dtype).plan(call, device, parts).predicted_us
            splits = [split for n in range(1, MAX_PARTS) for split in combinations(cuts, n)]
        best: tuple[tuple[int, ...], bool] | None = None
        sizes = rows, features, stored.itemsize, extension.limits(device)[1]
        for split in splits:
            merged = merged_parts(shapes, split)
            chain = laid_out_chain(merged, *sizes, figures) if merged else None
            if chain and (now := _time(chain, figures)) < seconds:
                seconds, best = now, (split, chain.from_left)
        if best is None:
            return parts
        split, from_left = best
        return [laid_out(part, from_left) for part in merge(cores, split)]

    def contract(
        self, plan: Plan, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, out_features: int
    ) -> Tensor:
        if plan.algorithm != "decode":
            return rest_of(x.device, x.dtype).contract(plan, x, cores, bias, out_features)
        if plan.rows != x.shape[0]:
            raise ValueError(f"expected the {plan.rows} rows of the plan, got {x.shape[0]}")
        return decode(x, cores, (), bias, plan.launches[0].tile)

    def quantized_linear(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        scales: Sequence[Tensor],
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        call = Call(shapes_of(cores), (x.shape[1], out_features), x.shape[0], x.dtype)
        if _serves(call):
            plan = self.quantized_plan(call, x.device, cores)
            if plan.algorithm == "decode":
                return decode(x, cores, scales, bias, plan.launches[0].tile)
        rest = rest_of(x.device, x.dtype)
        return rest.quantized_linear(x, cores, scales, bias, out_features)

    def contract_backward(
        self, plan: Plan, grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        return rest_of(x.device, x.dtype).contract_backward(plan, grad, x, cores, gradients)

    def embedding(self, ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
        return rest_of(ids.device, cores[0].dtype).embedding(ids, cores, embedding_dim)

    def embedding_backward(
        self, grad: Tensor, ids: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        rest = rest_of(ids.device, cores[0].dtype)
        return rest.embedding_backward(grad, ids, cores, needs)


@cache
def rest_of(device: torch.device, dtype: torch.dtype) -> TorchBackend:
    """The back end for what thin products do not compute."""
    if triton_device.unsupported(device, dtype):
        return TorchBackend()
    return import_module("mpo_kernels.backends.triton.backend").TritonBackend()


def _serves(call: Call) -> bool:
    return call.dtype in DTYPES and 1 <= call.rows <= MAX_ROWS


def layouts_of(cores: Sequence[Tensor]) -> tuple[Layout, ...]:
    """What tiles depend on."""
    return tuple([(core.shape, core.stride()) for core in cores])


def _chain(
    layouts: tuple[Layout, ...],
    call: Call,
    from_left: bool,
    stored: torch.dtype,
    device: torch.device,
    figures: DeviceFigures,
) -> Chain | None:
    _, multiprocessors = extension.limits(device)
    size, features = stored.itemsize, call.features
    return chain_of(layouts, call.rows, features, from_left, size, multiprocessors, figures)


def _time(chain: Chain, figures: DeviceFigures) -> float:
    return time_of([], figures, chain.seconds, STARTED * len(chain.products))


@lru_cache(maxsize=4096)
def _plan(
    call: Call,
    layouts: tuple[Layout, ...],
    stored: torch.dtype,
    device: torch.device,
    figures: DeviceFigures,
) -> Plan:
    shapes, rows, dtype = call.shapes, call.rows, call.dtype
    rest = rest_of(device, dtype)
    plan = rest.plan if stored == dtype else rest.quantized_plan
    plans = list(plan(call, device, ()).candidates)
    for order in ("left", "right"):
        chain = _chain(layouts, call, order == "left", stored, device, figures)
        if chain is not None:
            moved = dtype.itemsize * rows * sum(call.features)
            moved += stored.itemsize * sum(map(math.prod, shapes))
            plans.append(
                Plan(
                    algorithm="decode",
                    order=order,
                    split=tuple(range(1, len(shapes))),
                    rows=rows,
                    block=rows,
                    macs=sum(p.m * p.k * p.columns for p in chain.products),
                    bytes=moved,
                    predicted_us=1e6 * _time(chain, figures),
                    launches=(Launch("y", order, chain),),
                )
            )
    return best_of(plans)
