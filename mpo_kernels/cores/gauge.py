"""The freedom in a chain of cores: the basis of each bond, which the matrix does not depend on.

`balanced` chooses the one that light fine-tuning learns best in, `interpolated` one of which r² of
low rank's numbers are those of an identity. `bond_maps` and `carried` take
what is known of a gradient from one basis to another: with L_k the cores left of bond k contracted,
and R_k those right of it, W = L_k R_k. A chain that was re-canonicalised or cut has L'_k = L_k P_k
and R'_k = P_k⁺ R_k, and the chain rule gives g'_k = P_{k−1}ᵀ g_k P_k⁺ᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_kernels.cores.chain import move_centre, orthogonalise

# Directions of a bond that carry less than 1e-5 of the largest are not inverted.
_RTOL = 1e-10
# What a step of 1 on an auxiliary entry changes W by; with the 1 of a dense layer, centres would be
# divided by more than fp16 has room for.
_EFFECT = 8.0
# Of a core's norm, what rounding to bf16 stays below and overflow or underflow does not.
_LOST = 0.01


@torch.no_grad()
def balanced(cores: Sequence[Tensor], central: int) -> list[Tensor]:
    """The same matrix with auxiliary cores whose entries all weigh alike in it.

    In canonical form a step on an entry of core k changes W, in the Frobenius norm, by the root
    mean square of W's singular values at the core's bond towards the centre: by anything from 0.4
    to 50 among the matrices of one encoder. Here it is 8 on average for every auxiliary core of
    every matrix, so that one learning rate suits them all; the centre takes the scales back.

    Args:
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``; not changed. Bonds above the full rank shrink.
        central: index of the central tensor.

    Raises:
        ValueError: the dtype has no room for the scaled cores, as fp16 for a small matrix.
    """
    dtype = cores[0].dtype
    work = [core.detach().to(torch.promote_types(dtype, torch.float32)) for core in cores]
    for k in range(central):
        move_centre(work, k, k + 1)
    work = orthogonalise(work, central)
    norm = torch.linalg.norm(work[central])
    if norm > 0:
        for k in (k for k in range(len(work)) if k != central):
            bond = work[k].shape[3 if k < central else 0]
            scale = norm / (_EFFECT * math.sqrt(bond))
            work[k], work[central] = work[k] * scale, work[central] / scale
    scaled = [core.to(dtype) for core in work]
    for core, exact in zip(scaled, work, strict=True):
        expected, got = (float(torch.linalg.norm(part.double())) for part in (exact, core))
        if not abs(got - expected) <= _LOST * expected:
            raise ValueError(
                f"expected a dtype with room for balanced cores, got {dtype} for one of norm "
                f"{expected:.2g}: train in float32 or bfloat16"
            )
    return scaled


@torch.no_grad()
def interpolated(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Low rank W = A B as r of its rows, and the others by them: W = P [I; T] B' with B' = A' B.

    An interpolative decomposition: Cheng, Gimbutas, Martinsson and Rokhlin, "On the compression of
    low rank matrices", SIAM J. Sci. Comput. 26 (2005); of layers, Zhao, Zhang and Cannistraci,
    "Pivoting factorization", ICML 2025. The rows A' of A are the pivots of an LU decomposition
    P [L₁; L₂] U of an orthonormal basis of its columns, which there is even where A is short of
    its rank, and T = L₂ L₁⁻¹. As in LU its entries stay small in practice, if not in theory.

    Args:
        left: A ``[m, r]``, r ≤ m, finite; computed in fp64.
        right: B ``[r, n]``.

    Returns:
        T ``[m − r, r]`` and B' ``[r, n]`` in the dtype of A, and int64 ``[m]``: where in [I; T]
        each row of W stands.
    """
    rank, wide = left.shape[1], left.double()
    factors, swaps = torch.linalg.lu_factor(torch.linalg.qr(wide).Q)
    places = list(range(len(left)))
    for k, swap in enumerate(swaps.tolist()):
        places[k], places[swap - 1] = places[swap - 1], places[k]
    rows = torch.tensor(places, dtype=torch.int64, device=left.device)
    coefficients = torch.linalg.solve_triangular(
        factors[:rank], factors[rank:], upper=False, left=False, unitriangular=True
    )
    coefficients, pivots = (
        part.to(left.dtype).contiguous()
        for part in (coefficients, wide[rows[:rank]] @ right.double())
    )
    return coefficients, pivots, rows.argsort()


class BondMap(NamedTuple):
    """``P [old, new]`` and ``P⁺ [new, old]`` of one bond."""

    to_new: Tensor
    to_old: Tensor


@torch.no_grad()
def bond_maps(old: Sequence[Tensor], new: Sequence[Tensor], central: int) -> list[BondMap]:
    """One map for each of the n + 1 bonds, the trivial ones at the ends too; float64.

    Args:
        old, new: cores of (nearly) the same matrix, core k ``[D_k, i_k, j_k, D_{k+1}]``; ``new``
            is canonical about ``central``.
    """
    old, new = ([core.detach().double() for core in cores] for cores in (old, new))
    one = old[0].new_ones(1, 1)
    maps = [BondMap(one, one)] * (len(old) + 1)
    gram = cross = one
    for k in range(central):  # left of the centre: L'_k = L_k P_k by least squares
        gram = torch.einsum("ab,aijc,bijd->cd", gram, old[k], old[k])
        cross = torch.einsum("ab,aijc,bijd->cd", cross, old[k], new[k])
        to_new = torch.linalg.pinv(gram, rtol=_RTOL, hermitian=True) @ cross
        maps[k + 1] = BondMap(to_new, torch.linalg.pinv(to_new))
    gram = cross = one
    for k in range(len(old) - 1, central, -1):
        gram = torch.einsum("cd,aijc,bijd->ab", gram, old[k], old[k])
        cross = torch.einsum("cd,aijc,bijd->ab", cross, new[k], old[k])
        to_old = cross @ torch.linalg.pinv(gram, rtol=_RTOL, hermitian=True)
        maps[k] = BondMap(torch.linalg.pinv(to_old), to_old)
    return maps


def carried(gradient: Tensor, before: BondMap, after: BondMap, *, squared: bool = False) -> Tensor:
    """What is known of the gradient of an old core, for the new one between the same bonds.

    Args:
        gradient: ``[D_{k−1}, i_k, j_k, D_k]``, such as Adam's first moment.
        before, after: maps of the core's two bonds.
        squared: for a moment of squares, as of entries that know nothing of each other.
    """
    left, right = before.to_new, after.to_old
    if squared:
        left, right = left.square(), right.square()
    moved = torch.einsum("ac,aijb,db->cijd", left, gradient.double(), right)
    return moved.to(gradient.dtype)
