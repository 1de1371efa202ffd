"""A row of x as a matrix: two products in a row, what is between them in registers.

In the terms of ``chain.py``, a row b of x is X_b ``[i_F, i_S]``, one of y Y_b ``[j_F, j_S]``. One
kernel computes ``out_q [m, n] = Σ_t (A_t [m, k] · B_q [k, j]) · C_t [j, n]``:

    |                    | q | t | A_t        | B_q     | C_t      |
    | y_b                | b | d | first_d^T  | X_b     | second_d |
    | dsecond_d          | d | b | X_b^T      | first_d | dY_b     |

With in and out exchanged y_b is dx_b, and with x and dy exchanged dsecond is the gradient of the
part that was first. A program holds some B_q and their sums and walks over t. The accumulators of
the bracket are, rounded to the input's dtype, the registers from which the second product reads it:
tall by 64 digits whatever the number of rows, it never leaves them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpo_kernels.backends.triton.device import launch
from mpo_kernels.backends.triton.product import sum_splits
from mpo_kernels.backends.triton.tiles import MATRIX_ROWS, Chain, MatrixTile, ceil_div, power_of_two


class View(NamedTuple):
    """A matrix within a row of x or y, or within a part: its sizes, strides and true elements.

    `elements` is 0 where none is padding, else those from there on are.
    """

    height: int
    width: int
    stride_height: int
    stride_width: int
    elements: int = 0

    @property
    def transposed(self) -> View:
        return View(self.width, self.height, self.stride_width, self.stride_height, self.elements)


@triton.jit
def placed(i, j, V: tl.constexpr):
    """Offsets ``[i, j]`` of elements, and which of them there are."""
    offset = i[:, None] * V.stride_height + j[None, :] * V.stride_width
    mask = (i < V.height)[:, None] & (j < V.width)[None, :]
    if V.elements:
        mask &= offset < V.elements
    return offset, mask


@triton.jit(do_not_specialize=["matrices", "steps", "steps_per_split"])
def matrix_kernel(
    p_a,
    p_b,
    p_c,
    p_bias,
    p_out,
    matrices,
    steps,
    steps_per_split,
    stride_a,
    stride_b,
    stride_c,
    stride_out,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    M_BLOCKS: tl.constexpr = (A.height + BLOCK_M - 1) // BLOCK_M
    N_BLOCKS: tl.constexpr = (C.width + BLOCK_N - 1) // BLOCK_N
    i_program, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = i_program % M_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    n = i_program // M_BLOCKS % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = (i_program // (M_BLOCKS * N_BLOCKS)).to(tl.int64) * MATRICES
    k = tl.arange(0, BLOCK_K)
    o_a, m_a = placed(m, k, A)
    start = i_split * steps_per_split
    stop = min(start + steps_per_split, steps)
    accs = ()  # type: tuple[tl.tensor, ...]
    for _ in tl.static_range(MATRICES):
        accs += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for o_j in range(0, B.width, BLOCK_J):
        j = o_j + tl.arange(0, BLOCK_J)
        o_b, m_b = placed(k, j, B)
        o_c, m_c = placed(j, n, C)
        bs = ()  # type: tuple[tl.tensor, ...]
        for q in tl.static_range(MATRICES):
            mask = m_b & (o_q + q < matrices)
            bs += (tl.load(p_b + (o_q + q) * stride_b + o_b, mask=mask, other=0.0),)
        for t in range(start, stop):
            a = tl.load(p_a + t * stride_a + o_a, mask=m_a, other=0.0)
            c = tl.load(p_c + t * stride_c + o_c, mask=m_c, other=0.0)
            sums = ()  # type: tuple[tl.tensor, ...]
            for q in tl.static_range(MATRICES):
                state = tl.dot(a, bs[q]).to(p_b.dtype.element_ty)
                sums += (tl.dot(state, c, accs[q]),)
            accs = sums
    o_out, m_out = placed(m, n, OUT)
    p_out += (i_split * matrices + o_q) * stride_out
    for q in tl.static_range(MATRICES):
        out = accs[q]
        if p_bias is not None:
            out += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_out + o_out, out.to(p_out.dtype.element_ty), mask=m_out & (o_q + q < matrices))
        p_out += stride_out


def views(p: Chain) -> tuple[View, View, View, View]:
    """Of X_b ``[i_F, i_S]``, first_d ``[i_F, j_F]``, second_d ``[i_S, j_S]``, Y_b ``[j_F, j_S]``.

    Parts lie bond by bond, as ``[D, in, out]`` of the layer.
    """

    def row(first: int, second: int, features: int) -> View:
        strides = (1, first) if p.first_minor else (second, 1)
        return View(first, second, *strides, features if features < first * second else 0)

    def part(ins: int, outs: int) -> View:
        return View(ins, outs, *((1, ins) if p.exchanged else (outs, 1)))

    return (
        row(p.first_in, p.second_in, p.in_features),
        part(p.first_in, p.first_out),
        part(p.second_in, p.second_out),
        row(p.first_out, p.second_out, p.out_features),
    )


class Constants(NamedTuple):
    """What the kernel is compiled for, in its order: of a tile all but its splits."""

    a: View
    b: View
    c: View
    out: View
    matrices: int
    block_m: int
    block_k: int
    block_j: int
    block_n: int


def constants(p: Chain, gradient: bool, tile: MatrixTile) -> Constants:
    """For y of a problem or for the gradient of its second part, as the table says."""
    of_x, of_first, of_second, of_y = views(p)
    if gradient:
        out = View(p.second_in, p.second_out, p.second_out, 1)
        operands = (of_x.transposed, of_first, of_y, out)
    else:
        operands = (of_first.transposed, of_x, of_second, of_y)
    block_k = max(16, power_of_two(p.first_in))
    return Constants(*operands, tile.matrices, MATRIX_ROWS, block_k, tile.block_j, tile.block_n)


def matrix_chain(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, problem: Chain, tile: MatrixTile
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in_features]``, in x's dtype.

    Args:
        x: fp16 or bf16, any strides.
        first, second: ``[in, out, D]``, any strides, of x's dtype.
        bias: ``[out_features]``, contiguous.
        problem: sizes of the parts and which digit they hold.
        tile: see ``tiles.py``; its `splits` divide D.
    """
    p = problem
    y = x.new_empty(x.shape[0], p.out_features)
    operands = _by_bond(first, p), _rows(x), _by_bond(second, p)
    return _contract(operands, bias, y, p.rank, constants(p, False, tile), tile)


def matrix_gradient(
    x: Tensor, dy: Tensor, first: Tensor, problem: Chain, tile: MatrixTile
) -> Tensor:
    """``dsecond [i_S, j_S, D]`` in fp32, a view of ``[D, i_S, j_S]``.

    Args:
        x: ``[rows, in_features]``, fp16 or bf16, any strides.
        dy: ``[rows, out_features]``, of x's dtype, any strides.
        first: ``[i_F, j_F, D]``, any strides, of x's dtype.
        problem: sizes of the parts and which digit they hold.
        tile: see ``tiles.py``; its `splits` divide the rows.
    """
    p = problem
    out = x.new_empty((p.rank, p.second_in, p.second_out), dtype=torch.float32)
    operands = _rows(x), _by_bond(first, p), _rows(dy)
    _contract(operands, None, out, x.shape[0], constants(p, True, tile), tile)
    return out.permute(1, 2, 0)


def _rows(x: Tensor) -> Tensor:
    """Rows at any distance; copied where their columns are not side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _by_bond(part: Tensor, p: Chain) -> Tensor:
    """``[D, in, out]`` of the layer; copied where the bond is minor, as left parts lie."""
    return part.permute(*((2, 1, 0) if p.exchanged else (2, 0, 1))).contiguous()


def _contract(
    operands: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    steps: int,
    fixed: Constants,
    tile: MatrixTile,
) -> Tensor:
    """Write ``out``, the sums over ``steps`` of A_t, B_q and C_t, one q in each of its rows."""
    per_split = ceil_div(steps, tile.splits)
    splits = ceil_div(steps, per_split)
    target = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)
    programs = (
        ceil_div(fixed.a.height, fixed.block_m)
        * ceil_div(fixed.c.width, fixed.block_n)
        * ceil_div(len(out), fixed.matrices)
    )
    launch(
        matrix_kernel,
        (programs, splits),
        tile,
        *operands,
        bias if splits == 1 else None,
        target,
        len(out),
        steps,
        per_split,
        *(tensor.stride(0) for tensor in (*operands, out)),
        *fixed,
    )
    return out if splits == 1 else sum_splits(target, bias, out)
