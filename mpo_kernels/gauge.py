"""The freedom in a chain of cores: the basis of each bond, which the matrix does not depend on.

`whitened` chooses the one that light fine-tuning learns best in. `bond_maps` and `carried` take
what is known of a gradient from one basis to another: with L_k the cores left of bond k contracted,
and R_k those right of it, W = L_k R_k. A chain that was re-canonicalised or cut has L'_k = L_k P_k
and R'_k = P_k⁺ R_k, and the chain rule gives g'_k = P_{k−1}ᵀ g_k P_k⁺ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_kernels.cores import move_centre, orthogonalise

# Directions of a bond that carry less than 1e-5 of the largest are not inverted.
_RTOL = 1e-10
# A direction of the centre's bonds counts as this much of the strongest, where it carries less.
_LEAST = 1e-2


@torch.no_grad()
def whitened(cores: Sequence[Tensor], central: int) -> list[Tensor]:
    """The same matrix with a white central tensor: Vidal's canonical form about it.

    Along each of its two bonds, the centre and all beyond it have orthonormal slices: what a bond
    carries has moved into the core on the other side. A step of so much on any entry of those two
    cores changes W by as much, as it does in a dense layer, whatever the matrix and the entry.

    Args:
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``; not changed. Bonds above the full rank shrink.
        central: index of the central tensor.

    Source: G. Vidal, Phys. Rev. Lett. 91, 147902 (2003).
    """
    dtype = cores[0].dtype
    work = [core.detach().to(torch.promote_types(dtype, torch.float32)) for core in cores]
    for k in range(central):
        move_centre(work, k, k + 1)
    work = orthogonalise(work, central)
    centre = work[central]
    if central > 0:
        norms, basis = _directions(centre.flatten(1))
        work[central - 1] = (work[central - 1] @ basis) * norms
        work[central] = torch.tensordot(basis.t() / norms[:, None], work[central], dims=1)
    if central + 1 < len(work):
        norms, basis = _directions(centre.flatten(0, 2).t())
        work[central] = work[central] @ (basis / norms)
        work[central + 1] = torch.tensordot(norms[:, None] * basis.t(), work[central + 1], dims=1)
    return [core.to(dtype) for core in work]


def _directions(slices: Tensor) -> tuple[Tensor, Tensor]:
    """Of a bond with ``slices [D, …]``: principal directions, the columns ``[D, D]``, and norms."""
    squares, basis = torch.linalg.eigh(slices @ slices.t())
    norms = squares.clamp_min(0).sqrt()
    least = _LEAST * norms[-1]
    return norms.clamp_min(least if least > 0 else 1.0), basis


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
