"""Cores fitted to what a layer's output loses, where `decompose` alone minds its weight.

Over inputs x with second moment S = E[x xᵀ], the output loses E‖(W − Ŵ)x‖² = ‖(W − Ŵ)S^½‖²_F.
Plain low rank has a closed form under it (Wang et al., "SVD-LLM", 2024, in other words); every
other chain is fitted by alternating least squares, one core at a time by conjugate gradients, so
that no normal matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_kernels.cores.chain import merge_cores, move_centre, orthogonalise
from mpo_kernels.cores.shape import MPOShape

# Directions that no input took count as much as this fraction of a mean one.
RIDGE = 0.01
# Of one core's least squares, in the first sweep and in the others, which go on from there.
_FIRST_ITERATIONS, _ITERATIONS = 4, 16


def check_second_moment(second_moment: Tensor, in_features: int) -> None:
    """Raise unless it is ``[in, in]``, or ``[in]`` where it is diagonal, finite and not zero."""
    sizes = ((in_features, in_features), (in_features,))
    if not isinstance(second_moment, Tensor) or not second_moment.is_floating_point():
        got = second_moment.dtype if isinstance(second_moment, Tensor) else type(second_moment)
        raise TypeError(f"expected a floating-point second moment, got {got}")
    if tuple(second_moment.shape) not in sizes:
        raise ValueError(
            f"expected a second moment {list(sizes[0])}, or {list(sizes[1])} of a diagonal one, "
            f"got {list(second_moment.shape)}"
        )
    diagonal = _diagonal(second_moment)
    if not torch.isfinite(second_moment).all() or (diagonal < 0).any() or not diagonal.any():
        raise ValueError("expected a finite second moment of inputs that are not all zero")
    if second_moment.dim() == 2:
        skew = (second_moment - second_moment.t()).abs().max()
        if skew > 0.01 * diagonal.max():
            raise ValueError("expected a symmetric second moment")
        # What rounding takes below zero is less than what is added to it.
        if torch.linalg.cholesky_ex(regularised(second_moment.detach().double()))[1]:
            raise ValueError("expected a positive semidefinite second moment, got another")


def _diagonal(second_moment: Tensor) -> Tensor:
    return second_moment if second_moment.dim() == 1 else second_moment.diagonal()


def scaled(second_moment: Tensor) -> Tensor:
    """With mean diagonal 1, whatever the range of its dtype."""
    diagonal = _diagonal(second_moment).double()
    largest = diagonal.max()
    mean = (diagonal / largest).mean()
    return ((second_moment.double() / largest) / mean).to(second_moment.dtype)


def regularised(second_moment: Tensor) -> Tensor:
    """The same with mean diagonal 1, and a little of the identity where it is singular."""
    moment = scaled(second_moment)
    _diagonal(moment).add_(RIDGE)
    return moment


def padded_moment(second_moment: Tensor, size: int) -> Tensor:
    """Regularised, with zeros for the inputs from ``in_features`` to ``size``, the padding."""
    more = size - len(second_moment)
    return torch.nn.functional.pad(regularised(second_moment), (0, more) * second_moment.dim())


def weigh(second_moment: Tensor, matrix: Tensor) -> Tensor:
    """``S · matrix``, for a matrix ``[in, …]``."""
    if second_moment.dim() == 1:
        return second_moment[:, None] * matrix
    return second_moment @ matrix


def output_error(weight: Tensor, approximation: Tensor, second_moment: Tensor) -> float:
    """‖(W − Ŵ)S^½‖_F / ‖W S^½‖_F of weights ``[out, in]``; 0 where the output is zero."""
    lost, whole = output_squares(weight, approximation, second_moment)
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def output_squares(
    weight: Tensor, approximation: Tensor, second_moment: Tensor
) -> tuple[float, float]:
    """‖(W − Ŵ)S^½‖²_F and ‖W S^½‖²_F."""
    difference = (weight - approximation).t()
    lost = (difference * weigh(second_moment, difference)).sum(dtype=torch.float64)
    whole = (weight.t() * weigh(second_moment, weight.t())).sum(dtype=torch.float64)
    return max(float(lost), 0.0), float(whole)


@torch.no_grad()
def weighted_spectrum(weight: Tensor, second_moment: Tensor | None) -> Tensor:
    """Singular values of ``W S^½`` (of W without S), descending, float64.

    The tail of them, √(Σ_{k>r} λ_k²), is what the output loses at rank r.

    Args:
        weight: ``[out, in]``.
        second_moment: ``[in, in]`` or ``[in]``; see :func:`mpo_kernels.decompose`.
    """
    matrix = weight.detach().t().double()
    if second_moment is None:
        # The smaller Gram matrix of the two.
        gram = matrix.t() @ matrix if matrix.shape[1] <= len(matrix) else matrix @ matrix.t()
        return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    moment = regularised(second_moment.double())
    if matrix.shape[1] <= len(matrix):
        gram = matrix.t() @ weigh(moment, matrix)
    else:
        gram = _gram_of_inputs(matrix, moment)[0]
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def _gram_of_inputs(matrix: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """``Lᵀ A Aᵀ L`` and ``Aᵀ L`` with ``L Lᵀ = S``: for fewer inputs than outputs.

    Its eigenvalues are those of ``Aᵀ S A`` that are not zero, whose eigenvectors are ``Aᵀ L`` times
    its own.
    """
    if second_moment.dim() == 1:
        seen = matrix.t() * second_moment.sqrt()
    else:
        values, vectors = torch.linalg.eigh(second_moment)
        seen = matrix.t() @ (vectors * values.clamp(min=0).sqrt())
    return seen.t() @ seen, seen


def fit(
    cores: Sequence[Tensor],
    matrix: Tensor,
    second_moment: Tensor,
    *,
    max_sweeps: int = 20,
    tolerance: float = 0.01,
) -> list[Tensor]:
    """The cores of these sizes whose product is closest to ``matrix`` under S.

    Args:
        cores: where to start, core k ``[D_k, i_k, j_k, D_{k+1}]``; the error never rises.
        matrix: ``[∏ i, ∏ j]``, the transposed weight with its padding.
        second_moment: S ``[∏ i, ∏ i]``, or ``[∏ i]`` of a diagonal one, of its dtype.
        max_sweeps: times that each core is fitted at most.
        tolerance: it ends where a sweep takes less than this fraction off the error.
    """
    shape = MPOShape([c.shape[1] for c in cores], [c.shape[2] for c in cores])
    if len(cores) == 2 and 1 in shape.in_factors:
        return _projected(matrix, second_moment, shape, cores[0].shape[3])
    return _alternated(list(cores), matrix, second_moment, max_sweeps, tolerance)


def _projected(matrix: Tensor, second_moment: Tensor, shape: MPOShape, rank: int) -> list[Tensor]:
    """Two cores, of which one carries the whole input: exact, and S is never inverted.

    With the output's digits of the other core as rows, A Aᵀ under S has the directions to keep.
    """
    (i0, i1), (j0, j1) = shape.in_factors, shape.out_factors
    if i0 == j1 == 1 and rank < len(matrix) < j0:
        gram, seen = _gram_of_inputs(matrix.double(), second_moment.double())
        kept = torch.linalg.qr(seen @ torch.linalg.eigh(gram)[1][:, -rank:].flip(1))[0]
        return _kept_outputs(matrix.view(-1, j0, j1), kept)
    weighted = weigh(second_moment, matrix).view(-1, j0, j1)
    matrix = matrix.view(-1, j0, j1)
    if i0 == 1:
        gram = torch.einsum("iaj,ibj->ab", matrix.double(), weighted.double())
        return _kept_outputs(matrix, torch.linalg.eigh(gram)[1][:, -rank:].flip(1))
    gram = torch.einsum("ija,ijb->ab", matrix.double(), weighted.double())
    kept = torch.linalg.eigh(gram)[1][:, -rank:].flip(1).to(matrix.dtype)
    assert i1 == 1
    return [torch.einsum("ija,ar->ijr", matrix, kept)[None], kept.t()[:, None, :, None]]


def _kept_outputs(matrix: Tensor, kept: Tensor) -> list[Tensor]:
    """Directions ``kept [j_1, rank]`` of the outputs, and the rest of ``matrix [i, j_1, j_2]``."""
    kept = kept.to(matrix.dtype)
    return [kept[None, None], torch.einsum("iaj,ar->rij", matrix, kept)[..., None]]


def _alternated(
    cores: list[Tensor], matrix: Tensor, second_moment: Tensor, max_sweeps: int, tolerance: float
) -> list[Tensor]:
    cores, last = orthogonalise(cores, 0), len(cores) - 1
    residual = matrix - merge_cores(cores)[0, :, :, 0]
    state = residual, weigh(second_moment, residual)
    error = before = float("inf")
    for sweep in range(max_sweeps):
        steps = _ITERATIONS if sweep else _FIRST_ITERATIONS
        for k in range(last):
            _fit_core(cores, k, state, second_moment, steps)
            move_centre(cores, k, k + 1)
        for k in range(last, 0, -1):
            error = _fit_core(cores, k, state, second_moment, steps)
            move_centre(cores, k, k - 1)
        if not error < (1 - tolerance) * before:
            break
        before = error
    return cores


def _fit_core(
    cores: list[Tensor], k: int, state: tuple[Tensor, Tensor], second_moment: Tensor, steps: int
) -> float:
    """Least squares for core k with the others as they are; returns the error under S.

    ``state``, updated in place: what the cores leave of the matrix, and S times that.
    """
    residual, weighted = state
    one = residual.new_ones(1, 1, 1, 1)
    left = merge_cores(cores[:k] or [one])[0]  # [i before, j before, D_k]
    right = merge_cores(cores[k + 1 :] or [one])[..., 0]  # [D_{k+1}, i after, j after]
    (i0, j0, _), (_, i2, j2), (_, i1, j1, _) = left.shape, right.shape, cores[k].shape

    def expand(core: Tensor) -> Tensor:
        merged = merge_cores([left[None], core, right[..., None]])
        return merged[0, :, :, 0]

    def project(dense: Tensor) -> Tensor:
        """The adjoint of `expand`."""
        digits = dense.view(i0, i1, i2, j0, j1, j2)
        if left.shape[2] <= right.shape[0]:
            digits = torch.einsum("xizyjw,xya->aizjw", digits, left)
            return torch.einsum("aizjw,bzw->aijb", digits, right)
        digits = torch.einsum("xizyjw,bzw->xiyjb", digits, right)
        return torch.einsum("xiyjb,xya->aijb", digits, left)

    gradient = project(weighted)
    direction, square = gradient.clone(), gradient.square().sum()
    least = 1e-8 * square
    for _ in range(steps):
        moved = expand(direction)
        seen = weigh(second_moment, moved)
        curved = project(seen)
        curvature = (direction * curved).sum()
        if not (square > least and curvature > 0):
            break
        length = square / curvature
        cores[k] = cores[k] + direction * length
        residual.sub_(moved * length)
        weighted.sub_(seen * length)
        gradient.sub_(curved * length)
        previous, square = square, gradient.square().sum()
        direction = gradient + direction * (square / previous)
    return _norm(residual, weighted)


def _norm(residual: Tensor, weighted: Tensor) -> float:
    return float((residual * weighted).sum(dtype=torch.float64).clamp(min=0).sqrt())
