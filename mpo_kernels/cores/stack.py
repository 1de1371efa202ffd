"""A matrix, or several of one size such as those of experts, as chains of one shape.

Of several, weights are ``[E, out, in]``, second moments ``[E, in, in]`` and cores
``[E, D_k, i_k, j_k, D_{k+1}]``; what these functions do to a single matrix is what those of the
same names without ``stack`` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpo_kernels.cores.decompose import Decomposition, decompose, ranks_within, reconstruct
from mpo_kernels.cores.family import Cost, bound_within, choose
from mpo_kernels.cores.fitting import output_square, weighted_spectrum
from mpo_kernels.cores.shape import MPOShape


@torch.no_grad()
def decompose_stack(
    weights: Tensor,
    shape: MPOShape,
    *,
    rel_error: float | None = None,
    compression: float | None = None,
    second_moments: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    judges: Tensor | None = None,
) -> Decomposition:
    """Decompose each of the weights, all with the same bonds, so that their cores can be stacked.

    Args:
        weights: ``[E, out_features, in_features]``, or a single one.
        shape: of each; factors, and bonds as caps.
        rel_error: bound on each one's relative error; a bond is the largest that one of them needs.
        compression: parameters to keep; bonds are chosen by the mean of the squared spectra.
        second_moments: of the inputs of each, in one scale; see :func:`mpo_kernels.decompose`.
        gradient_moment: of a loss's gradients at the output, of a single weight.
        judges: of other inputs of each, which ``output_error`` is then of.

    Returns:
        The errors of all of them together, and the root mean squares of their spectra.

    Raises:
        TypeError, ValueError: what :func:`mpo_kernels.decompose` says, and of which it is.
    """
    if weights.dim() == 2:
        bounds = {"rel_error": rel_error, "compression": compression}
        return decompose(
            weights,
            shape,
            **bounds,  # type: ignore[arg-type]
            second_moment=second_moments,
            gradient_moment=gradient_moment,
            judge=judges,
        )

    def each(
        shape: MPOShape, moments: Tensor | None = None, bound: float | None = None
    ) -> list[Decomposition]:
        found = []
        for k, weight in enumerate(weights):
            moment = None if moments is None else moments[k]
            try:
                found.append(decompose(weight, shape, rel_error=bound, second_moment=moment))
            except ValueError as error:
                raise ValueError(f"{k}: {error}") from error
        return found

    if compression is not None:
        spectra = [torch.zeros(full, dtype=torch.float64, device="cpu") for full in shape.ranks]
        if shape.num_cores > 2:  # of two cores the budget alone decides
            spectra = _pooled(each(shape))
        shape = shape.with_ranks(ranks_within(spectra, shape, compression, shape.ranks))
    elif rel_error is not None:
        bonds = zip(*(one.shape.ranks for one in each(shape, bound=rel_error)), strict=True)
        shape = shape.with_ranks([max(bond) for bond in bonds])
    found = each(shape, second_moments)
    norms = torch.linalg.vector_norm(weights.double(), dim=(1, 2)).tolist()
    lost = math.hypot(*(one.rel_error * norm for one, norm in zip(found, norms, strict=True)))
    whole = math.hypot(*norms)
    cores = [torch.stack(stacked) for stacked in zip(*(one.cores for one in found), strict=True)]
    error = lost / whole if whole else 0.0
    made = Decomposition(cores, found[0].shape, error, _pooled(found))
    judges = second_moments if judges is None else judges
    return made if judges is None else _judged(made, weights, judges)


def _pooled(found: Sequence[Decomposition]) -> list[Tensor]:
    bonds = zip(*(one.spectra for one in found), strict=True)
    return [torch.stack(spectra).square().mean(0).sqrt() for spectra in bonds]


def reconstruct_stack(cores: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """The dense weights, of the sizes that the shape has."""
    size = {"in_features": shape.in_features, "out_features": shape.out_features}
    if cores[0].dim() == 4:
        return reconstruct(cores, **size)
    return torch.stack([reconstruct(each, **size) for each in zip(*cores, strict=True)])


def _judged(found: Decomposition, weights: Tensor, judges: Tensor) -> Decomposition:
    """The same, with the ``output_error`` of all together."""
    work = torch.promote_types(weights.dtype, torch.float32)
    cut = reconstruct_stack([core.to(work) for core in found.cores], found.shape)
    lost = whole = 0.0
    for weight, product, moment in zip(weights.to(work), cut, judges, strict=True):
        moment = moment.to(weight)
        lost += output_square(weight - product, moment)
        whole += output_square(weight, moment)
    return replace(found, output_error=math.sqrt(lost / whole) if whole else 0.0)


def choose_stack(
    weights: Tensor,
    budget: float,
    cost: Cost,
    second_moments: Tensor | None = None,
    judges: Tensor | None = None,
    tensor_parallel: int = 1,
    gradient_moment: Tensor | None = None,
) -> Decomposition:
    """The member that loses least within the budget; of several weights, plain low rank."""
    if weights.dim() == 2:
        return choose(
            weights,
            budget,
            cost,
            second_moments,
            judges,
            tensor_parallel,
            gradient_moment=gradient_moment,
        )
    count, out_features, in_features = weights.shape
    shape = MPOShape.low_rank(in_features, out_features, min(in_features, out_features))
    bound = bound_within(shape, budget / count, cost) or {}
    return decompose_stack(weights, shape, **bound, second_moments=second_moments, judges=judges)


@torch.no_grad()
def stack_spectrum(
    weights: Tensor, second_moments: Tensor | None, gradient_moment: Tensor | None = None
) -> Tensor:
    """See :func:`mpo_kernels.cores.fitting.weighted_spectrum`; of several, the roots of summed
    squares, without gradients.
    """
    if weights.dim() == 2:
        return weighted_spectrum(weights, second_moments, gradient_moment)
    squares = torch.zeros(min(weights.shape[1:]), dtype=torch.float64, device=weights.device)
    for k, weight in enumerate(weights):
        moment = None if second_moments is None else second_moments[k]
        # The spectrum is of the moment with mean diagonal 1.
        scale = 1.0 if moment is None else moment.diagonal().double().mean()
        squares += scale * weighted_spectrum(weight, moment).square()
    return squares.sqrt()
