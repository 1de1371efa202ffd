"""The CUDA back end: one launch of the decode chain for few rows, the other back ends elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib import import_module
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpo_kernels.backends.cuda import extension
from mpo_kernels.backends.cuda.decode import DTYPES, Layout, chain_of, decode, layouts_of
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.backends.torch.merging import merge
from mpo_kernels.backends.triton import device as triton_device
from mpo_kernels.planning.candidates import chain_steps
from mpo_kernels.planning.figures import DeviceFigures, device_figures
from mpo_kernels.planning.plan import (
    Call,
    CoreShape,
    Gradients,
    Launch,
    Plan,
    best_of,
    groups,
    merged_parts,
    shapes_of,
)
from mpo_kernels.planning.work import Work, merge_work, time_of

if TYPE_CHECKING:
    from mpo_kernels._cuda import Chain

# Of the time that a schedule's model gives: medians of one to sixteen rows on an H200.
MEASURED = 1.35
# Library calls that take the host as long as one launch of the chain.
STARTED = 0.5


class CudaBackend(TorchBackend):
    """The decode chain at up to sixteen rows of fp16 or bf16; the rest is left to the others."""

    def plan(self, call: Call, device: torch.device, cores: Sequence[Tensor]) -> Plan:
        few = 1 <= call.rows <= extension.load().MAX_ROWS and call.dtype in DTYPES
        if call.gradients is not None or not few or len(cores) == 1:
            return rest_of(device, call.dtype).plan(call, device, cores)
        return _plan(call, layouts_of(cores), device, device_figures(device, call.dtype))

    def contract(
        self, plan: Plan, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, out_features: int
    ) -> Tensor:
        if plan.algorithm != "decode":
            return rest_of(x.device, x.dtype).contract(plan, x, cores, bias, out_features)
        if plan.rows != x.shape[0]:
            raise ValueError(f"expected the {plan.rows} rows of the plan, got {x.shape[0]}")
        parts = cores
        if len(plan.split) + 1 < len(cores):
            # As the schedule takes them to lie; a core that is a part by itself stays as it is.
            parts = [
                part.contiguous() if b - a > 1 else part
                for (a, b), part in zip(
                    groups(plan.split, len(cores)), merge(cores, plan.split), strict=True
                )
            ]
        return decode(x, parts, (), bias, out_features, plan.launches[0].tile)

    def quantized_linear(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        scales: Sequence[Tensor],
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        rows, module = x.shape[0], extension.load()
        parts, features = len(cores), (x.shape[1], out_features)
        if x.dtype in DTYPES and 1 <= rows <= module.MAX_ROWS and 2 <= parts <= module.MAX_PARTS:
            call = Call(shapes_of(cores), features, rows, x.dtype)
            figures, stored = device_figures(x.device, x.dtype), cores[0].dtype
            chain = quantized_chain(call, layouts_of(cores), stored, x.device, figures)
            if chain is not None:
                return decode(x, cores, scales, bias, out_features, chain)
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
    """The back end for what the decode chain does not compute."""
    if triton_device.unsupported(device, dtype):
        return TorchBackend()
    return import_module("mpo_kernels.backends.triton.backend").TritonBackend()


@lru_cache(maxsize=4096)
def _plan(
    call: Call, layouts: tuple[Layout, ...], device: torch.device, figures: DeviceFigures
) -> Plan:
    others = rest_of(device, call.dtype).plan(call, device, ())
    own = _decode_plans(call, layouts, extension.limits(device), figures)
    return best_of([*others.candidates, *own])


def _decode_plans(
    call: Call, layouts: tuple[Layout, ...], limits: tuple[int, int, int], figures: DeviceFigures
) -> Iterator[Plan]:
    """A plan for each way to merge the cores into two or three parts, from either end."""
    shapes, rows, features, dtype = call.shapes, call.rows, call.features, call.dtype
    for parts in range(2, extension.load().MAX_PARTS + 1):
        for split in combinations(range(1, len(shapes)), parts - 1):
            merged = merged_parts(shapes, split)
            if not merged:
                continue
            held = tuple(
                layouts[a] if b - a == 1 else _contiguous(part)
                for (a, b), part in zip(groups(split, len(shapes)), merged, strict=True)
            )
            merging = merge_work(shapes, split, dtype.itemsize, None)
            fixed = sum(w.macs for w in merging)
            moved = dtype.itemsize * (rows * sum(features) + sum(map(math.prod, merged)))
            for order in ("left", "right"):
                chain = chain_of(held, rows, features, order == "left", dtype, dtype, limits)
                if chain is None:
                    continue
                steps = chain_steps(merged, order)
                macs = rows * sum(step.batch * step.m * step.n * step.k for step in steps)
                seconds = time_of(merging, figures, _seconds(chain, figures), STARTED)
                yield Plan(
                    algorithm="decode",
                    order=order,
                    split=split,
                    rows=rows,
                    block=rows,
                    macs=macs + fixed,
                    bytes=moved + sum(w.bytes for w in merging),
                    predicted_us=seconds * 1e6,
                    launches=(Launch("y", order, chain),),
                    fixed_macs=fixed,
                )


def _seconds(chain: Chain, figures: DeviceFigures) -> float:
    return MEASURED * chain.seconds + figures.launch_seconds


def _contiguous(shape: CoreShape) -> Layout:
    """Of a part that was just merged."""
    _, i, j, r = shape
    return shape, (i * j * r, j * r, r, 1), True


@lru_cache(maxsize=4096)
def quantized_chain(
    call: Call,
    layouts: tuple[Layout, ...],
    stored: torch.dtype,
    device: torch.device,
    figures: DeviceFigures,
) -> Chain | None:
    """The faster of the two orders, None where neither fits the device or widening is faster."""
    limits = extension.limits(device)
    chains = [
        chain_of(layouts, call.rows, call.features, from_left, call.dtype, stored, limits)
        for from_left in (True, False)
    ]
    best = min((c for c in chains if c is not None), key=lambda c: c.seconds, default=None)
    if best is None:
        return None
    rest = rest_of(device, call.dtype).plan(call, device, ())
    # A byte of each element is read, and two are written, read and written scaled.
    widening = [Work(bytes=7 * math.prod(shape), count=2) for shape in call.shapes]
    widened = time_of(widening, figures) + 1e-6 * rest.predicted_us
    return best if time_of([], figures, _seconds(best, figures), STARTED) <= widened else None
