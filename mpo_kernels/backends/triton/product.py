"""One product for every chain of digits: no operand is permuted, no result copied to its place.

    C[m, n] = Σ_k A[m, k] · B[k, n]

m, n and k are numbers of several digits, and an element's address is a sum of one stride for each:
a panel of W is written where it belongs, and a panel of its gradient read where it lies. A launch
holds one or two products. Sums over shares of k are added in a fixed order, by whoever reads them.

Where the device can, a launch is set up while the one before it on the stream still runs, and waits
for its end before it reads or writes anything (programmatic dependent launch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mpo_kernels.backends.triton.device import (
    can_begin_early,
    interpreted,
    launch,
    options_of,
    precision,
)
from mpo_kernels.backends.triton.tiles import ProductTile, ceil_div


class Product(NamedTuple):
    """Sizes of m, n and k (m is 0 where it is a number of rows), and of their digits, major first.

    `strides`: of m in A and C, of n in B and C, of k in A and B. `share`: from the sums over one
    share of k to those over the next.
    """

    m: int
    n: int
    k: int
    share: int
    sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    strides: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def product_of(
    a: str, b: str, c: str, sizes: Mapping[str, int], lies: Mapping[str, int] | None = None
) -> Product:
    """A product in einsum's notation: digits by name, in the order in which an operand lies.

    Args:
        a, b, c: names with blanks between: ``product_of("i j r", "r u v", "i u j v", sizes)``.
        sizes: of each digit.
        lies: sizes where an operand is a slice ``"a"``, ``"b"`` or ``"c"`` of what lies there, by
            ``"a i"``.
    """
    operands = {name: order.split() for name, order in (("a", a), ("b", b), ("c", c))}
    strides: dict[str, dict[str, int]] = {}
    for name, digits in operands.items():
        stride, strides[name] = 1, {}
        for digit in reversed(digits):
            strides[name][digit] = stride
            stride *= (lies or {}).get(f"{name} {digit}", sizes[digit])
    of_c = operands["c"]
    m = [digit for digit in of_c if digit in strides["a"]]
    n = [digit for digit in of_c if digit in strides["b"] and digit not in strides["a"]]
    k = list(dict.fromkeys(d for d in operands["a"] + operands["b"] if d not in strides["c"]))
    described = [
        _joined([(sizes[d], strides[x].get(d, 0), strides[y].get(d, 0)) for d in digits])
        for digits, x, y in ((m, "a", "c"), (n, "b", "c"), (k, "a", "b"))
    ]
    of_m, of_n, of_k = (math.prod(sizes[d] for d in digits) for digits in (m, n, k))
    m_sizes, n_sizes, k_sizes = (tuple(d[0] for d in digits) for digits in described)
    along = tuple((tuple(d[1] for d in e), tuple(d[2] for d in e)) for e in described)
    return Product(of_m, of_n, of_k, stride, (m_sizes, n_sizes, k_sizes), along)


def _joined(digits: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Digits ``(size, stride, stride)`` with those joined that lie as one in both operands."""
    joined: list[tuple[int, int, int]] = []
    for size, one, other in (d for d in digits if d[0] > 1):
        if joined and joined[-1][1:] == (size * one, size * other):
            size *= joined.pop()[0]
        joined.append((size, one, other))
    return joined or [(1, 0, 0)]


@triton.jit
def address(i, P: tl.constexpr, INDEX: tl.constexpr, OPERAND: tl.constexpr):
    """Where number i of an index (m, n, k: 0, 1, 2) lies in its first or second operand."""
    o = i * 0
    for d in tl.static_range(len(P.sizes[INDEX]) - 1, 0, -1):
        o += i % P.sizes[INDEX][d] * P.strides[INDEX][OPERAND][d]
        i = i // P.sizes[INDEX][d]
    return o + i * P.strides[INDEX][OPERAND][0]


@triton.jit
def product(
    p_a,
    p_b,
    p_bias,
    p_c,
    rows,
    pid,
    P: tl.constexpr,
    T: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M = P.m if P.m > 0 else rows
    N_BLOCKS: tl.constexpr = (P.n + T.block_n - 1) // T.block_n
    STEPS: tl.constexpr = (P.k + T.block_k - 1) // T.block_k
    SHARE: tl.constexpr = (STEPS + T.splits - 1) // T.splits
    MIXED: tl.constexpr = p_a.dtype.element_ty != p_b.dtype.element_ty
    tiles = (M + T.block_m - 1) // T.block_m * N_BLOCKS
    split, pid = pid // tiles, pid % tiles
    m = (pid // N_BLOCKS).to(tl.int64) * T.block_m + tl.arange(0, T.block_m)
    n = pid % N_BLOCKS * T.block_n + tl.arange(0, T.block_n)
    m_m, m_n = (m < M)[:, None], (n < P.n)[None, :]
    p_a += address(m, P, 0, 0)[:, None]
    p_b += address(n, P, 1, 0)[None, :]
    acc = tl.full((T.block_m, T.block_n), 0.0, tl.float32)
    for step in range(split * SHARE, min((split + 1) * SHARE, STEPS)):
        k = step * T.block_k + tl.arange(0, T.block_k)
        m_a, m_b = m_m, m_n
        if P.k % T.block_k > 0:
            m_a, m_b = m_m & (k < P.k)[None, :], m_n & (k < P.k)[:, None]
        a = tl.load(p_a + address(k, P, 2, 0)[None, :], mask=m_a, other=0.0)
        b = tl.load(p_b + address(k, P, 2, 1)[:, None], mask=m_b, other=0.0)
        if MIXED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    p_c += split.to(tl.int64) * P.share
    p_c += address(m, P, 0, 1)[:, None] + address(n, P, 1, 1)[None, :]
    if p_bias is not None:
        acc += tl.load(p_bias + n, mask=n < P.n, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(p_c, mask=m_m & m_n, other=0.0)
    tl.store(p_c, acc.to(p_c.dtype.element_ty), mask=m_m & m_n)


@triton.jit(do_not_specialize=["rows", "first"])
def product_kernel(
    p_a,
    p_b,
    p_bias,
    p_c,
    rows,
    first,
    q_a,
    q_b,
    q_c,
    P: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    U: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first product has `first` programs, the second one, if any, the rest."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # after the wait: what comes next begins when all before has ended
    pid = tl.program_id(0)
    if Q is None or pid < first:
        product(p_a, p_b, p_bias, p_c, rows, pid, P, T, ADD, PRECISION)
    else:
        product(q_a, q_b, None, q_c, rows, pid - first, Q, U, False, PRECISION)


class Task:
    """A product with its tile, and what was compiled for it.

    Triton's own search for that takes the host longer than the launch.
    """

    __slots__ = ("_compiled", "product", "tile")

    def __init__(self, product: Product, tile: ProductTile) -> None:
        self.product, self.tile = product, tile
        self._compiled: dict[Any, Any] = {}

    def programs(self, rows: int) -> int:
        p, t = self.product, self.tile
        return ceil_div(p.m or rows, t.block_m) * ceil_div(p.n, t.block_n) * t.splits


class Job(NamedTuple):
    """A task and its operands; `c` is ``[splits, …]`` in fp32 where the tile shares k out."""

    task: Task
    a: Tensor
    b: Tensor
    c: Tensor


def run(job: Job, other: Job | None = None, *, add: bool = False) -> None:
    """One launch of one or two independent products; the first is added to its `c` if ``add``."""
    _run(job, other, None, 0, add)


def run_rows(job: Job, bias: Tensor | None) -> None:
    """A product whose m are the rows of its `a`, and a bias ``[n]`` added to each of them."""
    _run(job, None, bias, job.a.shape[0], False)


def _run(job: Job, other: Job | None, bias: Tensor | None, rows: int, add: bool) -> None:
    task, a, b, c = job
    second, *operands = other or (None, None, None, None)
    first = programs = task.programs(rows)
    tile, mixed = task.tile, a.dtype != b.dtype
    if second is not None:
        programs += second.programs(0)
        if second.tile.num_warps > tile.num_warps:
            tile = tile._replace(num_warps=second.tile.num_warps)
    early = can_begin_early(a.device)
    arguments = (
        *(a, b, bias, c, rows, first),
        *operands,
        *(task.product, task.tile),
        *((None, None) if second is None else (second.product, second.tile)),
        *(add, precision(torch.float32 if mixed else a.dtype), early),
    )
    tensors = [t for t in (a, b, c, bias, *operands) if t is not None]
    pointers, types = 0, [second, add, bias is None]
    for tensor in tensors:
        pointers |= tensor.data_ptr()
        types.append(tensor.dtype)
    key = (*types, a.device, arguments[-2])
    compiled = task._compiled.get(key)
    here = not a.is_cuda or a.get_device() == torch.cuda.current_device()
    if compiled is not None and here and pointers % 16 == 0:
        compiled[programs, 1, 1](*arguments)
        return
    launch(product_kernel, (programs,), tile, *arguments, early=early)
    if here and pointers % 16 == 0 and not interpreted():
        options = options_of(tile, early)
        task._compiled[key] = product_kernel.warmup(*arguments, grid=(1,), **options)


class SumTile(NamedTuple):
    """Elements of a program."""

    block: int = 1024
    num_warps: int = 4
    num_stages: int = 1


@triton.jit(do_not_specialize=["size", "splits", "width"])
def sum_kernel(p_splits, p_bias, p_out, size, splits, width, T: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * T.block + tl.arange(0, T.block)
    mask = o < size
    total = tl.full((T.block,), 0.0, tl.float32)
    for _ in range(0, splits):
        total += tl.load(p_splits + o, mask=mask, other=0.0)
        p_splits += size
    if p_bias is not None:
        total += tl.load(p_bias + o % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=mask)


def sum_splits(splits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``out = splits.sum(0) + bias``, ``splits [n, *out.shape]`` in fp32, in a fixed order."""
    tile = SumTile()
    launch(
        sum_kernel,
        (ceil_div(out.numel(), tile.block),),
        tile,
        splits,
        bias,
        out,
        out.numel(),
        splits.shape[0],
        out.shape[-1],
        tile,
    )
    return out
