"""Rows of a table by their ids, from two parts; the table is never formed.

With parts ``left [i_L, j_L, D]`` and ``right [i_R, j_R, D]``, the row of id (i_L, i_R) is
``left[i_L] [j_L, D] × right[i_R]ᵀ [D, j_R]``. A repeated id is formed again: to find it would make
the host wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpo_kernels.backends.triton.device import launch, precision, readable, strides_of
from mpo_kernels.backends.triton.tiles import GatherTile, TwoParts, ceil_div


@triton.jit
def gather_kernel(
    p_ids,
    p_left,
    p_right,
    p_rows,
    S: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LEFT_BLOCKS: tl.constexpr = (S.left_out + T.block_left - 1) // T.block_left
    RIGHT_BLOCKS: tl.constexpr = (S.right_out + T.block_right - 1) // T.block_right
    i_program = tl.program_id(0)
    j_right = i_program % RIGHT_BLOCKS * T.block_right + tl.arange(0, T.block_right)
    o_left = i_program // RIGHT_BLOCKS % LEFT_BLOCKS * T.block_left
    j_left = o_left + tl.arange(0, T.block_left)
    token = (i_program // (RIGHT_BLOCKS * LEFT_BLOCKS)).to(tl.int64)
    number = tl.load(p_ids + token)
    i_left, i_right = number // S.right_in, number % S.right_in
    # An id out of range reads nothing: its row is zero.
    valid = (number >= 0) & (i_left < S.left_in)
    row = tl.full((T.block_left, T.block_right), 0.0, tl.float32)
    for o_rank in range(0, S.rank, T.block_d):
        d = o_rank + tl.arange(0, T.block_d)
        left = tl.load(
            p_left + i_left * P.a_in + (j_left * P.a_out)[:, None] + (d * P.a_rank)[None, :],
            mask=valid & (j_left < S.left_out)[:, None] & (d < S.rank)[None, :],
            other=0.0,
        )
        right = tl.load(
            p_right + i_right * P.b_in + (j_right * P.b_out)[None, :] + (d * P.b_rank)[:, None],
            mask=valid & (j_right < S.right_out)[None, :] & (d < S.rank)[:, None],
            other=0.0,
        )
        row = tl.dot(left, right, row, input_precision=PRECISION)
    column = j_left[:, None] * S.right_out + j_right[None, :]
    mask = (j_left < S.left_out)[:, None] & (j_right < S.right_out)[None, :]
    tl.store(
        p_rows + token * S.out_features + column,
        row.to(p_rows.dtype.element_ty),
        mask=mask & (column < S.out_features),
    )


@triton.jit(do_not_specialize=["tokens"])
def gather_gradient_kernel(
    p_grad,
    p_ids,
    p_order,
    p_other,
    p_out,
    tokens,
    stride_gm,
    stride_gk,
    S: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    OF_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[i, j, d] += Σ grad · other`` over the tokens whose digit is i, for one of the parts."""
    # Digits: `own` of the part whose gradient this is, `other` of the other part.
    OWN_IN: tl.constexpr = S.left_in if OF_LEFT else S.right_in
    OWN_OUT: tl.constexpr = S.left_out if OF_LEFT else S.right_out
    OTHER_OUT: tl.constexpr = S.right_out if OF_LEFT else S.left_out
    OWN_STRIDE: tl.constexpr = S.right_out if OF_LEFT else 1
    OTHER_STRIDE: tl.constexpr = 1 if OF_LEFT else S.right_out
    BLOCK_OWN: tl.constexpr = T.block_left if OF_LEFT else T.block_right
    BLOCK_OTHER: tl.constexpr = T.block_right if OF_LEFT else T.block_left
    OWN_BLOCKS: tl.constexpr = (OWN_OUT + BLOCK_OWN - 1) // BLOCK_OWN
    RANK_BLOCKS: tl.constexpr = (S.rank + T.block_d - 1) // T.block_d
    i_program = tl.program_id(0)
    j_own = i_program % OWN_BLOCKS * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    d = i_program // OWN_BLOCKS % RANK_BLOCKS * T.block_d + tl.arange(0, T.block_d)
    o_token = i_program // (OWN_BLOCKS * RANK_BLOCKS) * T.block_b
    b_out = p_out + (j_own * S.rank)[:, None] + d[None, :]
    m_out = (j_own < OWN_OUT)[:, None] & (d < S.rank)[None, :]
    acc = tl.full((BLOCK_OWN, T.block_d), 0.0, tl.float32)
    # Tokens come sorted by their own digit: one sum is written for each run of equal digits.
    current = tl.full((), -1, tl.int64)
    for step in range(o_token, min(o_token + T.block_b, tokens)):
        token = tl.load(p_order + step)
        number = tl.load(p_ids + token).to(tl.int64)
        own = number // S.right_in if OF_LEFT else number % S.right_in
        i_other = number % S.right_in if OF_LEFT else number // S.right_in
        valid = (number >= 0) & (number < S.left_in * S.right_in)
        if own != current:
            if current >= 0 and current < OWN_IN:
                tl.atomic_add(b_out + current * (OWN_OUT * S.rank), acc, mask=m_out, sem="relaxed")
            acc = tl.full((BLOCK_OWN, T.block_d), 0.0, tl.float32)
            current = own
        for o_other in range(0, OTHER_OUT, BLOCK_OTHER):
            j_other = o_other + tl.arange(0, BLOCK_OTHER)
            column = j_own[:, None] * OWN_STRIDE + j_other[None, :] * OTHER_STRIDE
            mask = (j_own < OWN_OUT)[:, None] & (j_other < OTHER_OUT)[None, :]
            grad = tl.load(
                p_grad + token * stride_gm + column.to(tl.int64) * stride_gk,
                mask=valid & mask & (column < S.out_features),
                other=0.0,
            )
            other = tl.load(
                p_other + i_other * P.a_in + (j_other * P.a_out)[:, None] + (d * P.a_rank)[None, :],
                mask=valid & (j_other < OTHER_OUT)[:, None] & (d < S.rank)[None, :],
                other=0.0,
            )
            acc = tl.dot(grad, other, acc, input_precision=PRECISION)
    if current >= 0 and current < OWN_IN:
        tl.atomic_add(b_out + current * (OWN_OUT * S.rank), acc, mask=m_out, sem="relaxed")


def gather(ids: Tensor, left: Tensor, right: Tensor, problem: TwoParts, tile: GatherTile) -> Tensor:
    """Rows ``[len(ids), out_features]``.

    Args:
        ids: ``[tokens]``, int32 or int64, contiguous; one out of range gives a row of zeros.
        left, right: ``[in, out, D]``, fp16, bf16 or fp32, any strides.
        problem: sizes of the parts.
        tile: see ``tiles.py``.
    """
    p, t = problem, tile
    left = readable(left, 1, t.block_left, t.block_d)
    right = readable(right, 1, t.block_right, t.block_d)
    rows = left.new_empty(len(ids), p.out_features)
    blocks = ceil_div(p.left_out, t.block_left) * ceil_div(p.right_out, t.block_right)
    launch(
        gather_kernel,
        (len(ids) * blocks,),
        tile,
        ids,
        left,
        right,
        rows,
        problem,
        strides_of(left, right),
        tile,
        precision(left.dtype),
    )
    return rows


def gather_gradient(
    grad: Tensor, ids: Tensor, other: Tensor, of_left: bool, problem: TwoParts, tile: GatherTile
) -> Tensor:
    """Gradient ``[in, out, D]`` of one part in fp32, summed with atomic additions.

    Args:
        grad: ``[tokens, out_features]``, of the parts' dtype, any strides.
        ids: ``[tokens]``, int32 or int64, contiguous.
        other: the other part ``[in, out, D]``, any strides.
        of_left: whether the left part's gradient is asked for.
        problem: sizes of the parts.
        tile: see ``tiles.py``.
    """
    p, t = problem, tile
    own_in, own_out, block, wanted = (
        (p.left_in, p.left_out, t.block_left, t.block_right)
        if of_left
        else (p.right_in, p.right_out, t.block_right, t.block_left)
    )
    other = readable(other, 1, wanted, t.block_d)
    digits = ids // p.right_in if of_left else ids % p.right_in
    out = grad.new_zeros((own_in, own_out, p.rank), dtype=torch.float32)
    launch(
        gather_gradient_kernel,
        (ceil_div(len(ids), t.block_b) * ceil_div(own_out, block) * ceil_div(p.rank, t.block_d),),
        tile,
        grad,
        ids,
        torch.argsort(digits),
        other,
        out,
        len(ids),
        *grad.stride(),
        problem,
        strides_of(other),
        tile,
        of_left,
        precision(other.dtype),
    )
    return out
