"""The chain of two parts in one kernel: the state never leaves the chip.

With parts ``first [i_F, j_F, D]`` and ``second [i_S, j_S, D]``, a column of x or of y is a number
of two digits: (i_S, i_F) and (j_S, j_F) where the first part holds the minor one, else (i_F, i_S)
and (j_F, j_S).

    s[b, i_S, j_F, d] = Σ_{i_F} x[b, i_S, i_F] · first[i_F, j_F, d]
    y[b, j_F, j_S]    = Σ_{i_S, d} s[b, i_S, j_F, d] · second[i_S, j_S, d]

A program owns some rows, j_F and j_S and walks over (i_S, d). With in and out exchanged the same
kernel gives dx. Rows are few: the i_S of a tile are rows of the first product and its j_F rows of
the second, and the walk is split over programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpo_kernels.backends.triton.device import launch, precision, readable, strides_of
from mpo_kernels.backends.triton.product import sum_splits
from mpo_kernels.backends.triton.tiles import Chain, ChainTile, ceil_div


@triton.jit
def first_product(
    p_x,
    p_first,
    rows,
    stride_xm,
    stride_xk,
    o_b,
    o_in,
    o_out,
    o_rank,
    S: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``s [(BLOCK_B, GROUP_OUT), (GROUP_IN, BLOCK_D)]`` in x's dtype."""
    X_FIRST: tl.constexpr = 1 if S.first_minor else S.second_in
    X_SECOND: tl.constexpr = S.first_in if S.first_minor else 1
    ROWS: tl.constexpr = T.block_b * T.group_in
    COLUMNS: tl.constexpr = T.group_out * T.block_d
    # Columns in the order in which the part lies, so that it is read in vectors.
    OUT_MINOR: tl.constexpr = P.a_out == 1 and P.a_rank > 1
    b = o_b + (tl.arange(0, ROWS) // T.group_in).to(tl.int64)
    i_second = o_in + tl.arange(0, ROWS) % T.group_in
    c = tl.arange(0, COLUMNS)
    j_first = o_out + (c % T.group_out if OUT_MINOR else c // T.block_d)
    d = o_rank + (c // T.group_out if OUT_MINOR else c % T.block_d)
    b_x = p_x + b * stride_xm + (i_second * X_SECOND).to(tl.int64) * stride_xk
    b_first = p_first + j_first * P.a_out + d * P.a_rank
    m_x = (b < rows) & (i_second < S.second_in)
    m_first = (j_first < S.first_out) & (d < S.rank)
    s = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for k in range(0, S.first_in, T.block_k):
        i_first = k + tl.arange(0, T.block_k)
        m_i = i_first < S.first_in
        mask = m_x[:, None] & m_i[None, :]
        if S.in_features < S.first_in * S.second_in:
            column = i_second[:, None] * X_SECOND + i_first[None, :] * X_FIRST
            mask &= column < S.in_features
        x = tl.load(
            b_x[:, None] + (i_first * X_FIRST).to(tl.int64)[None, :] * stride_xk,
            mask=mask,
            other=0.0,
        )  # [(BLOCK_B, GROUP_IN), BLOCK_K]
        first = tl.load(
            b_first[None, :] + i_first[:, None] * P.a_in,
            mask=m_i[:, None] & m_first[None, :],
            other=0.0,
        )  # [BLOCK_K, (GROUP_OUT, BLOCK_D)] or [BLOCK_K, (BLOCK_D, GROUP_OUT)]
        s = tl.dot(x, first, s, input_precision=PRECISION)
    s = s.to(p_x.dtype.element_ty)
    if OUT_MINOR and T.group_out > 1:
        s = tl.reshape(s, (T.block_b, T.group_in, T.block_d, T.group_out))
        s = tl.permute(s, (0, 3, 1, 2))
    elif T.group_in > 1 and T.group_out > 1:
        s = tl.reshape(s, (T.block_b, T.group_in, T.group_out, T.block_d))
        s = tl.permute(s, (0, 2, 1, 3))
    return tl.reshape(s, (T.block_b * T.group_out, T.group_in * T.block_d))


@triton.jit
def second_product(
    acc,
    s,
    p_second,
    o_in,
    o_rank,
    j_second,
    S: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc [(BLOCK_B, GROUP_OUT), BLOCK_N] + s · second``."""
    q = tl.arange(0, T.group_in * T.block_d)
    i_second, d = o_in + q // T.block_d, o_rank + q % T.block_d
    m_second = (i_second < S.second_in) & (d < S.rank)
    second = tl.load(
        p_second + (i_second * P.b_in + d * P.b_rank)[:, None] + (j_second * P.b_out)[None, :],
        mask=m_second[:, None] & (j_second < S.second_out)[None, :],
        other=0.0,
    )  # [(GROUP_IN, BLOCK_D), BLOCK_N]
    return tl.dot(s, second, acc, input_precision=PRECISION)


@triton.jit
def store_rows(acc, p_bias, p_y, rows, o_b, o_out, j_second, S: tl.constexpr, T: tl.constexpr):
    """Write ``acc [(BLOCK_B, GROUP_OUT), BLOCK_N]`` and the bias to ``y [rows, out]``."""
    Y_FIRST: tl.constexpr = 1 if S.first_minor else S.second_out
    Y_SECOND: tl.constexpr = S.first_out if S.first_minor else 1
    g = tl.arange(0, T.block_b * T.group_out)
    b, j_first = o_b + (g // T.group_out).to(tl.int64), o_out + g % T.group_out
    column = j_first[:, None] * Y_FIRST + j_second[None, :] * Y_SECOND
    mask = ((b < rows) & (j_first < S.first_out))[:, None] & (j_second < S.second_out)[None, :]
    mask &= column < S.out_features
    if p_bias is not None:
        acc += tl.load(p_bias + column, mask=mask, other=0.0).to(tl.float32)
    y = acc.to(p_y.dtype.element_ty)
    tl.store(p_y + b[:, None] * S.out_features + column, y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def chain_kernel(
    p_x,
    p_first,
    p_second,
    p_bias,
    p_y,
    rows,
    stride_xm,
    stride_xk,
    S: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    OUT_GROUPS: tl.constexpr = (S.first_out + T.group_out - 1) // T.group_out
    N_BLOCKS: tl.constexpr = (S.second_out + T.block_n - 1) // T.block_n
    RANK_BLOCKS: tl.constexpr = (S.rank + T.block_d - 1) // T.block_d
    STEPS: tl.constexpr = (S.second_in + T.group_in - 1) // T.group_in * RANK_BLOCKS
    PER_SPLIT: tl.constexpr = (STEPS + T.splits - 1) // T.splits

    i_program, i_split = tl.program_id(0), tl.program_id(1)
    j_second = i_program % N_BLOCKS * T.block_n + tl.arange(0, T.block_n)
    o_out = i_program // N_BLOCKS % OUT_GROUPS * T.group_out
    o_b = (i_program // (N_BLOCKS * OUT_GROUPS)).to(tl.int64) * T.block_b
    p_y += i_split.to(tl.int64) * rows * S.out_features
    acc = tl.full((T.block_b * T.group_out, T.block_n), 0.0, tl.float32)
    for step in range(i_split * PER_SPLIT, min((i_split + 1) * PER_SPLIT, STEPS)):
        o_in, o_rank = step // RANK_BLOCKS * T.group_in, step % RANK_BLOCKS * T.block_d
        s = first_product(
            p_x, p_first, rows, stride_xm, stride_xk, o_b, o_in, o_out, o_rank, S, P, T, PRECISION
        )
        acc = second_product(acc, s, p_second, o_in, o_rank, j_second, S, P, T, PRECISION)
    store_rows(acc, p_bias, p_y, rows, o_b, o_out, j_second, S, T)


def chain(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, problem: Chain, tile: ChainTile
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in_features]``, in x's dtype.

    Args:
        x: fp16, bf16 or fp32, any strides.
        first, second: ``[in, out, D]``, any strides, of x's dtype.
        bias: ``[out_features]``, contiguous.
        problem: sizes of the parts and which digit they hold.
        tile: see ``tiles.py``.
    """
    rows, p, t = x.shape[0], problem, tile
    first = readable(first, t.block_k, t.group_out, t.block_d)
    second = readable(second, t.group_in, t.block_n, t.block_d)
    y = x.new_empty(rows, p.out_features)
    splits = t.splits if t.splits > 1 else None
    target = y if splits is None else x.new_empty((splits, *y.shape), dtype=torch.float32)
    programs = (
        ceil_div(rows, t.block_b)
        * ceil_div(p.first_out, t.group_out)
        * ceil_div(p.second_out, t.block_n)
    )
    launch(
        chain_kernel,
        (programs, t.splits),
        tile,
        x,
        first,
        second,
        bias if splits is None else None,
        target,
        rows,
        x.stride(0),
        x.stride(1),
        problem,
        strides_of(first, second),
        tile,
        precision(x.dtype),
    )
    return y if splits is None else sum_splits(target, bias, y)
