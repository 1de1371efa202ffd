"""Matrices of one size, such as those of experts, as chains of one shape stacked over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpo_kernels.cores.decompose import Decomposition, _ranks_within, decompose, reconstruct
from mpo_kernels.cores.fitting import output_squares
from mpo_kernels.cores.shape import MPOShape


@torch.no_grad()
def decompose_stack(
    weights: Tensor,
    shape: MPOShape,
    *,
    rel_error: float | None = None,
    compression: float | None = None,
    second_moments: Iterable[Tensor] | None = None,
) -> Decomposition:
    """Decompose each of the weights; all with the same bonds, so that their cores can be stacked.

    Args:
        weights: ``[E, out_features, in_features]``.
        shape: of each; factors, and bonds as caps.
        rel_error: bound on each one's relative error; a bond is the largest that one of them needs.
        compression: parameters to keep; bonds are chosen by the mean of the squared spectra.
        second_moments: E of ``[in_features, in_features]``; see :func:`mpo_kernels.decompose`.

    Returns:
        Core k ``[E, D_k, i_k, j_k, D_{k+1}]``; the relative error of all of them together, and the
        root mean squares of their spectra.

    Raises:
        TypeError, ValueError: what :func:`mpo_kernels.decompose` says, and which of them it is.
    """
    moments = [None] * len(weights) if second_moments is None else second_moments

    def each(
        shape: MPOShape, moments: Iterable[Tensor | None], bound: float | None = None
    ) -> list[Decomposition]:
        found = []
        for k, (weight, moment) in enumerate(zip(weights, moments, strict=True)):
            try:
                found.append(decompose(weight, shape, rel_error=bound, second_moment=moment))
            except ValueError as error:
                raise ValueError(f"{k}: {error}") from error
        return found

    nothing = [None] * len(weights)
    if compression is not None:
        spectra = [torch.zeros(full, dtype=torch.float64, device="cpu") for full in shape.ranks]
        if shape.num_cores > 2:  # of two cores the budget alone decides
            spectra = _pooled(each(shape, nothing))
        shape = shape.with_ranks(_ranks_within(spectra, shape, compression, shape.ranks))
    elif rel_error is not None:
        found = each(shape, nothing, rel_error)
        bonds = zip(*(one.shape.ranks for one in found), strict=True)
        shape = shape.with_ranks([max(bond) for bond in bonds])
    found = each(shape, moments)
    norms = torch.linalg.vector_norm(weights.double(), dim=(1, 2)).tolist()
    lost = math.hypot(*(one.rel_error * norm for one, norm in zip(found, norms, strict=True)))
    whole = math.hypot(*norms)
    cores = [torch.stack(stacked) for stacked in zip(*(one.cores for one in found), strict=True)]
    error = lost / whole if whole else 0.0
    return Decomposition(cores, found[0].shape, error, _pooled(found))


@torch.no_grad()
def judged_stack(
    found: Decomposition, weights: Tensor, second_moments: Iterable[Tensor]
) -> Decomposition:
    """The same, with the ``output_error`` of all experts together, for moments in one scale."""
    lost = whole = 0.0
    size = {"in_features": found.shape.in_features, "out_features": found.shape.out_features}
    work = torch.promote_types(weights.dtype, torch.float32)
    each = zip(zip(*found.cores, strict=True), weights, second_moments, strict=True)
    for cores, weight, moment in each:
        product = reconstruct([core.to(work) for core in cores], **size)
        squares = output_squares(weight.to(work), product, moment.to(weight.device, work))
        lost, whole = lost + squares[0], whole + squares[1]
    return replace(found, output_error=math.sqrt(lost / whole) if whole else 0.0)


def _pooled(found: Sequence[Decomposition]) -> list[Tensor]:
    bonds = zip(*(one.spectra for one in found), strict=True)
    return [torch.stack(spectra).square().mean(0).sqrt() for spectra in bonds]
