"""The CUDA back end: one launch of the decode chain for few rows, the other back ends elsewhere.

Every function is that of ``backends/torch``; the plan says which kernels compute a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib import import_module
from itertools import combinations
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mpo_kernels.backends import torch as library
from mpo_kernels.backends.cuda import extension
from mpo_kernels.backends.cuda.decode import DTYPES, Layout, chain_of, decode, layouts_of
from mpo_kernels.backends.torch.merging import merge
from mpo_kernels.backends.triton import device as triton_device
from mpo_kernels.figures import DeviceFigures, device_figures
from mpo_kernels.plan import (
    CoreShape,
    Gradients,
    Plan,
    Work,
    best_of,
    chain_steps,
    features_of,
    groups,
    merge_work,
    merged_parts,
    shapes_of,
    time_of,
)

if TYPE_CHECKING:
    from mpo_kernels._cuda import Chain

__all__ = [
    "embedding",
    "embedding_backward",
    "linear",
    "linear_backward",
    "plan_for",
    "quantized_linear",
]


# Of the time that a schedule's model gives: medians of one to sixteen rows on an H200.
MEASURED = 1.35
# Library calls that take the host as long as one launch of the chain.
STARTED = 0.5


class Launch(NamedTuple):
    """The kernel of a plan: what it gives, the part it contracts first, and its schedule."""

    result: str
    first: str
    tile: Chain


@cache
def _rest(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The back end for what the decode chain does not compute."""
    if triton_device.unsupported(device, dtype):
        return library
    return import_module("mpo_kernels.backends.triton.backend")


def plan_for(
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    cores: Sequence[Tensor],
    gradients: Gradients | None = None,
    features: tuple[int, int] | None = None,
) -> Plan:
    """The plan for ``x [rows, in]``, forward or (with ``gradients``) backward.

    ``features`` are the true in and out of the layer, by default those of the factors.
    """
    most = extension.load().MAX_ROWS
    if gradients is not None or not 1 <= rows <= most or dtype not in DTYPES or len(cores) == 1:
        return _rest(device, dtype).plan_for(rows, dtype, device, cores, gradients, features)
    features = features or features_of(shapes_of(cores))
    layouts = layouts_of(cores)
    return _plan(layouts, features, rows, dtype, device, device_figures(device, dtype))


@lru_cache(maxsize=4096)
def _plan(
    layouts: tuple[Layout, ...],
    features: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    figures: DeviceFigures,
) -> Plan:
    sizes = [torch.empty(size, device="meta") for size, _, _ in layouts]
    others = _rest(device, dtype).plan_for(rows, dtype, device, sizes, None, features)
    own = _decode_plans(layouts, features, rows, dtype, extension.limits(device), figures)
    return best_of([*others.candidates, *own])


def _decode_plans(
    layouts: tuple[Layout, ...],
    features: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    limits: tuple[int, int, int],
    figures: DeviceFigures,
) -> Iterator[Plan]:
    """A plan for each way to merge the cores into two or three parts, from either end."""
    shapes: list[CoreShape] = [(d, i, j, r) for (d, i, j, r), _, _ in layouts]
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
                    macs=macs + sum(w.macs for w in merging),
                    bytes=moved + sum(w.bytes for w in merging),
                    predicted_us=seconds * 1e6,
                    launches=(Launch("y", order, chain),),
                )


def _seconds(chain: Chain, figures: DeviceFigures) -> float:
    return MEASURED * chain.seconds + figures.launch_seconds


def _contiguous(shape: CoreShape) -> Layout:
    """Of a part that was just merged."""
    _, i, j, r = shape
    return shape, (i * j * r, j * r, r, 1), True


def linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    plan: Plan | None = None,
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in]``, all of one dtype."""
    rows, features = x.shape[0], (x.shape[1], out_features)
    plan = plan or plan_for(rows, x.dtype, x.device, cores, None, features)
    if plan.algorithm != "decode":
        return _rest(x.device, x.dtype).linear(x, cores, bias, out_features, plan)
    if plan.rows != rows:
        raise ValueError(f"expected the {plan.rows} rows of the plan, got {rows}")
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
    x: Tensor,
    cores: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """:func:`linear` with cores of one byte an element; see ``quantize.py``.

    Bytes are read as they are at up to sixteen rows of fp16 or bf16, where that is faster than
    widening the cores first.
    """
    rows, module = x.shape[0], extension.load()
    parts, features = len(cores), (x.shape[1], out_features)
    if x.dtype in DTYPES and 1 <= rows <= module.MAX_ROWS and 2 <= parts <= module.MAX_PARTS:
        layouts = layouts_of(cores)
        figures = device_figures(x.device, x.dtype)
        chain = quantized_chain(layouts, rows, features, x.dtype, cores[0].dtype, x.device, figures)
        if chain is not None:
            return decode(x, cores, scales, bias, out_features, chain)
    rest = _rest(x.device, x.dtype)
    return rest.quantized_linear(x, cores, scales, bias, out_features)


@lru_cache(maxsize=4096)
def quantized_chain(
    layouts: tuple[Layout, ...],
    rows: int,
    features: tuple[int, int],
    element: torch.dtype,
    stored: torch.dtype,
    device: torch.device,
    figures: DeviceFigures,
) -> Chain | None:
    """The faster of the two orders, None where neither fits the device or widening is faster."""
    limits = extension.limits(device)
    chains = [
        chain_of(layouts, rows, features, from_left, element, stored, limits)
        for from_left in (True, False)
    ]
    best = min((c for c in chains if c is not None), key=lambda c: c.seconds, default=None)
    if best is None:
        return None
    sizes = [torch.empty(size, device="meta") for size, _, _ in layouts]
    rest = _rest(device, element).plan_for(rows, element, device, sizes, None, features)
    # A byte of each element is read, and two are written, read and written scaled.
    widening = [Work(bytes=7 * size.numel(), count=2) for size in sizes]
    widened = time_of(widening, figures) + 1e-6 * rest.predicted_us
    return best if time_of([], figures, _seconds(best, figures), STARTED) <= widened else None


def linear_backward(
    grad: Tensor,
    x: Tensor,
    cores: Sequence[Tensor],
    gradients: Gradients,
    plan: Plan | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx [rows, in]`` and each core's gradient, ``None`` (and not computed) where not asked."""
    return _rest(x.device, x.dtype).linear_backward(grad, x, cores, gradients, plan)


def embedding(ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
    """Rows ``[len(ids), embedding_dim]`` of the table."""
    return _rest(ids.device, cores[0].dtype).embedding(ids, cores, embedding_dim)


def embedding_backward(
    grad: Tensor, ids: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the cores from ``grad [len(ids), embedding_dim]``."""
    return _rest(ids.device, cores[0].dtype).embedding_backward(grad, ids, cores, needs)
