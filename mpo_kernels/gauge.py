"""How two chains of cores for one matrix see each other: maps between their bonds.

With L_k the cores left of bond k contracted, and R_k those right of it, W = L_k R_k. A chain that
was re-canonicalised or cut has L'_k = L_k P_k and R'_k = P_k⁺ R_k; what was known of a gradient of
the old cores follows by the chain rule, g'_k = P_{k−1}ᵀ g_k P_k⁺ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Directions of a bond that carry less than 1e-5 of the largest are not inverted.
_RTOL = 1e-10


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
