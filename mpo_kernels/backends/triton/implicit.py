"""A GEMM whose weight is made on chip: a tile of W from the parts, used at once.

With parts ``left [i_L, j_L, D]`` and ``right [i_R, j_R, D]``:

    W[(i_L, i_R), (j_L, j_R)] = Σ_d left[i_L, j_L, d] · right[i_R, j_R, d]

Beside the GEMM's own multiply-adds a tile of W costs D / BLOCK_B of them. Between the chain, whose
work grows with D, and the panels, which pass through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mpo_kernels.backends.triton.launch import launch, precision, readable, strides_of
from mpo_kernels.backends.triton.tiles import ImplicitTile, TwoParts, ceil_div


@triton.jit(do_not_specialize=["rows"])
def implicit_kernel(
    p_x,
    p_left,
    p_right,
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
    BLOCK_K: tl.constexpr = T.left_in * T.right_in
    BLOCK_N: tl.constexpr = T.left_out * T.right_out
    LEFT_BLOCKS: tl.constexpr = (S.left_out + T.left_out - 1) // T.left_out
    RIGHT_BLOCKS: tl.constexpr = (S.right_out + T.right_out - 1) // T.right_out
    RIGHT_STEPS: tl.constexpr = (S.right_in + T.right_in - 1) // T.right_in
    STEPS: tl.constexpr = (S.left_in + T.left_in - 1) // T.left_in * RIGHT_STEPS

    i_program = tl.program_id(0)
    o_right = i_program % RIGHT_BLOCKS * T.right_out
    o_left = i_program // RIGHT_BLOCKS % LEFT_BLOCKS * T.left_out
    o_b = (i_program // (RIGHT_BLOCKS * LEFT_BLOCKS)).to(tl.int64) * T.block_b
    b = o_b + tl.arange(0, T.block_b)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    lefts = tl.arange(0, T.left_in * T.left_out)
    rights = tl.arange(0, T.right_in * T.right_out)
    j_left, j_right = o_left + lefts % T.left_out, o_right + rights % T.right_out
    acc = tl.full((T.block_b, BLOCK_N), 0.0, tl.float32)
    for step in range(0, STEPS):
        o_in_left, o_in_right = step // RIGHT_STEPS * T.left_in, step % RIGHT_STEPS * T.right_in
        i_left, i_right = o_in_left + lefts // T.left_out, o_in_right + rights // T.right_out
        m_left = (i_left < S.left_in) & (j_left < S.left_out)
        m_right = (i_right < S.right_in) & (j_right < S.right_out)
        w = tl.full((T.left_in * T.left_out, T.right_in * T.right_out), 0.0, tl.float32)
        for o_rank in range(0, S.rank, T.block_d):
            d = o_rank + tl.arange(0, T.block_d)
            left = tl.load(
                p_left + (i_left * P.a_in + j_left * P.a_out)[:, None] + (d * P.a_rank)[None, :],
                mask=m_left[:, None] & (d < S.rank)[None, :],
                other=0.0,
            )  # [(LEFT_IN, LEFT_OUT), BLOCK_D]
            right = tl.load(
                p_right + (i_right * P.b_in + j_right * P.b_out)[None, :] + (d * P.b_rank)[:, None],
                mask=m_right[None, :] & (d < S.rank)[:, None],
                other=0.0,
            )  # [BLOCK_D, (RIGHT_IN, RIGHT_OUT)]
            w = tl.dot(left, right, w, input_precision=PRECISION)
        w = w.to(p_x.dtype.element_ty)
        w = tl.reshape(w, (T.left_in, T.left_out, T.right_in, T.right_out))
        w = tl.reshape(tl.permute(w, (0, 2, 1, 3)), (BLOCK_K, BLOCK_N))
        row_left, row_right = o_in_left + k // T.right_in, o_in_right + k % T.right_in
        column = row_left * S.right_in + row_right
        m_k = (row_left < S.left_in) & (row_right < S.right_in) & (column < S.in_features)
        x = tl.load(
            p_x + b[:, None] * stride_xm + column.to(tl.int64)[None, :] * stride_xk,
            mask=(b < rows)[:, None] & m_k[None, :],
            other=0.0,
        )  # [BLOCK_B, (LEFT_IN, RIGHT_IN)]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    out_left, out_right = o_left + n // T.right_out, o_right + n % T.right_out
    column = out_left * S.right_out + out_right
    m_n = (out_left < S.left_out) & (out_right < S.right_out) & (column < S.out_features)
    if p_bias is not None:
        acc += tl.load(p_bias + column, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        p_y + b[:, None] * S.out_features + column[None, :],
        acc.to(p_y.dtype.element_ty),
        mask=(b < rows)[:, None] & m_n[None, :],
    )


def implicit(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    problem: TwoParts,
    tile: ImplicitTile,
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in_features]``, in x's dtype.

    Args:
        x: fp16, bf16 or fp32, any strides.
        left, right: ``[in, out, D]``, any strides, of x's dtype.
        bias: ``[out_features]``, contiguous.
        problem: sizes of the parts.
        tile: see ``tiles.py``.
    """
    p, t = problem, tile
    left = readable(left, t.left_in, t.left_out, t.block_d)
    right = readable(right, t.right_in, t.right_out, t.block_d)
    y = x.new_empty(x.shape[0], p.out_features)
    programs = (
        ceil_div(x.shape[0], t.block_b)
        * ceil_div(p.left_out, t.left_out)
        * ceil_div(p.right_out, t.right_out)
    )
    launch(
        implicit_kernel,
        (programs,),
        tile,
        x,
        left,
        right,
        bias,
        y,
        x.shape[0],
        *x.stride(),
        problem,
        strides_of(left, right),
        tile,
        precision(x.dtype),
    )
    return y
