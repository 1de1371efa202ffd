"""Gradient of a part of the chain: recomputed from x, summed over rows in fp32, never with dW.

In the terms of ``chain.py``:

    dsecond[i_S, j_S, d] = Σ_{b, j_F} s[b, i_S, j_F, d] · dy[b, j_F, j_S]

A program owns some (i_S, d) and j_S and walks over rows and j_F. Splits of the rows are summed by a
second kernel in a fixed order, so the result does not change from run to run. With x and dy, in and
out exchanged, the same kernel gives the gradient of the part that was first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpo_kernels.backends.triton.chain import first_product
from mpo_kernels.backends.triton.launch import launch, precision, readable, strides_of, sum_splits
from mpo_kernels.backends.triton.tiles import Chain, ChainTile, ceil_div


@triton.jit(do_not_specialize=["rows", "rows_per_split"])
def chain_gradient_kernel(
    p_x,
    p_dy,
    p_first,
    p_out,
    rows,
    rows_per_split,
    stride_xm,
    stride_xk,
    stride_dym,
    stride_dyk,
    S: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Y_FIRST: tl.constexpr = 1 if S.first_minor else S.second_out
    Y_SECOND: tl.constexpr = S.first_out if S.first_minor else 1
    N_BLOCKS: tl.constexpr = (S.second_out + T.block_n - 1) // T.block_n
    RANK_BLOCKS: tl.constexpr = (S.rank + T.block_d - 1) // T.block_d
    OUT_GROUPS: tl.constexpr = (S.first_out + T.group_out - 1) // T.group_out

    i_program, i_split = tl.program_id(0), tl.program_id(1)
    j_second = i_program % N_BLOCKS * T.block_n + tl.arange(0, T.block_n)
    o_rank = i_program // N_BLOCKS % RANK_BLOCKS * T.block_d
    o_in = i_program // (N_BLOCKS * RANK_BLOCKS) * T.group_in
    g = tl.arange(0, T.block_b * T.group_out)
    acc = tl.full((T.block_n, T.group_in * T.block_d), 0.0, tl.float32)
    o_row = i_split.to(tl.int64) * rows_per_split
    stop = min(o_row + rows_per_split, rows)
    for step in range(0, (rows_per_split + T.block_b - 1) // T.block_b * OUT_GROUPS):
        o_b, o_out = o_row + step // OUT_GROUPS * T.block_b, step % OUT_GROUPS * T.group_out
        s = first_product(
            p_x, p_first, stop, stride_xm, stride_xk, o_b, o_in, o_out, o_rank, S, P, T, PRECISION
        )  # [(BLOCK_B, GROUP_OUT), (GROUP_IN, BLOCK_D)]
        b, j_first = o_b + (g // T.group_out).to(tl.int64), o_out + g % T.group_out
        column = j_first[None, :] * Y_FIRST + j_second[:, None] * Y_SECOND
        mask = ((b < stop) & (j_first < S.first_out))[None, :] & (j_second < S.second_out)[:, None]
        dy = tl.load(
            p_dy + b[None, :] * stride_dym + column.to(tl.int64) * stride_dyk,
            mask=mask & (column < S.out_features),
            other=0.0,
        )  # [BLOCK_N, (BLOCK_B, GROUP_OUT)]
        acc = tl.dot(dy, s, acc, input_precision=PRECISION)
    q = tl.arange(0, T.group_in * T.block_d)
    i_second, d = o_in + q // T.block_d, o_rank + q % T.block_d
    tl.store(
        p_out
        + i_split.to(tl.int64) * (S.second_in * S.second_out * S.rank)
        + (i_second * (S.second_out * S.rank) + d)[None, :]
        + (j_second * S.rank)[:, None],
        acc,
        mask=((i_second < S.second_in) & (d < S.rank))[None, :]
        & (j_second < S.second_out)[:, None],
    )


def chain_gradient(x: Tensor, dy: Tensor, first: Tensor, problem: Chain, tile: ChainTile) -> Tensor:
    """``dsecond [i_S, j_S, D]`` in fp32.

    Args:
        x: ``[rows, in_features]``, fp16, bf16 or fp32, any strides.
        dy: ``[rows, out_features]``, of x's dtype, any strides.
        first: ``[i_F, j_F, D]``, any strides, of x's dtype.
        problem: sizes of the parts and which digit they hold.
        tile: see ``tiles.py``; its `splits` divide the rows.
    """
    rows, p, t = x.shape[0], problem, tile
    first = readable(first, t.block_k, t.group_out, t.block_d)
    out = x.new_empty((p.second_in, p.second_out, p.rank), dtype=torch.float32)
    splits = min(t.splits, ceil_div(rows, t.block_b))
    target = out if splits == 1 else out.new_empty(splits, *out.shape)
    programs = (
        ceil_div(p.second_in, t.group_in)
        * ceil_div(p.rank, t.block_d)
        * ceil_div(p.second_out, t.block_n)
    )
    launch(
        chain_gradient_kernel,
        (programs, splits),
        tile,
        x,
        dy,
        first,
        target,
        rows,
        ceil_div(ceil_div(rows, t.block_b), splits) * t.block_b,
        *x.stride(),
        *dy.stride(),
        problem,
        strides_of(first),
        tile,
        precision(x.dtype),
    )
    return out if splits == 1 else sum_splits(target, None, out)
