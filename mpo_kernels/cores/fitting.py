"""Cores fitted to what a layer's output loses, where `decompose` alone minds its weight.

Over inputs x with second moment S = E[x xᵀ], the output loses E‖(W − Ŵ)x‖² = ‖(W − Ŵ)S^½‖²_F. Where
the second moment G = E[g gᵀ] of a loss's gradients at the output is known too, that loss rises by
about half of ‖G^½(W − Ŵ)S^½‖²_F (the curvature of Martens and Grosse, "K-FAC", 2015). Plain low
rank has a closed form under both (Wang et al., "SVD-LLM", 2024, in other words); every other chain
is fitted by alternating least squares, one core at a time by conjugate gradients, so that no normal
matrix is formed.
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
# The same of directions that no gradient took: gradients of other texts take others.
GRADIENT_RIDGE = 0.1
# Of one core's least squares, in the first sweep and in the others, which go on from there.
_FIRST_ITERATIONS, _ITERATIONS = 4, 16


def check_second_moment(second_moment: Tensor, size: int, of: str = "inputs") -> None:
    """Raise unless it is ``[size, size]``, or ``[size]`` where it is diagonal, finite, not zero."""
    sizes = ((size, size), (size,))
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
        raise ValueError(f"expected a finite second moment of {of} that are not all zero")
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


def regularised(second_moment: Tensor, ridge: float = RIDGE) -> Tensor:
    """The same with mean diagonal 1, and a little of the identity where it is singular."""
    moment = scaled(second_moment)
    _diagonal(moment).add_(ridge)
    return moment


def padded_moment(second_moment: Tensor, size: int, ridge: float = RIDGE) -> Tensor:
    """Regularised, with zeros for the features from ``len(second_moment)`` to ``size``."""
    more = size - len(second_moment)
    moment = regularised(second_moment, ridge)
    return torch.nn.functional.pad(moment, (0, more) * second_moment.dim())


def weigh(second_moment: Tensor, matrix: Tensor, gradient_moment: Tensor | None = None) -> Tensor:
    """``S · matrix · G``, for a matrix ``[in, out]``; without G any ``[in, …]``."""
    by_inputs = (
        second_moment @ matrix if second_moment.dim() == 2 else second_moment[:, None] * matrix
    )
    return by_inputs if gradient_moment is None else by_inputs @ gradient_moment


def output_error(
    weight: Tensor,
    approximation: Tensor,
    second_moment: Tensor,
    gradient_moment: Tensor | None = None,
) -> float:
    """‖G^½(W − Ŵ)S^½‖_F / ‖G^½ W S^½‖_F of weights ``[out, in]``; 0 where the output is zero."""
    whole = output_square(weight, second_moment, gradient_moment)
    lost = output_square(weight - approximation, second_moment, gradient_moment)
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def output_square(
    weight: Tensor, second_moment: Tensor, gradient_moment: Tensor | None = None
) -> float:
    """‖G^½ W S^½‖²_F of a weight ``[out, in]``."""
    weighted = weigh(second_moment, weight.t(), gradient_moment)
    return max(float((weight.t() * weighted).sum(dtype=torch.float64)), 0.0)


@torch.no_grad()
def weighted_spectrum(
    weight: Tensor, second_moment: Tensor | None, gradient_moment: Tensor | None = None
) -> Tensor:
    """Singular values of ``G^½ W S^½`` (without one, of W without it), descending, float64.

    The tail of them, √(Σ_{k>r} λ_k²), is what the output loses at rank r.

    Args:
        weight: ``[out, in]``.
        second_moment, gradient_moment: see :func:`mpo_kernels.decompose`; both are taken with mean
            diagonal 1.
    """
    matrix = weight.detach().t().double()
    if gradient_moment is not None:
        gradients = regularised(gradient_moment.double(), GRADIENT_RIDGE)
        matrix = matrix @ torch.linalg.cholesky(gradients)
    if second_moment is None:
        # The smaller Gram matrix of the two.
        gram = matrix.t() @ matrix if matrix.shape[1] <= len(matrix) else matrix @ matrix.t()
    else:
        moment = regularised(second_moment.double())
        if matrix.shape[1] <= len(matrix):
            gram = matrix.t() @ weigh(moment, matrix)
        else:
            gram = _gram_of_inputs(matrix, moment)[0]
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _gram_of_inputs(matrix: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """``Lᵀ A Aᵀ L`` and ``Aᵀ L`` with ``L Lᵀ = S``: for fewer inputs than outputs.

    Its eigenvalues are those of ``Aᵀ S A`` that are not zero, whose eigenvectors are ``Aᵀ L`` times
    its own.
    """
    if second_moment.dim() == 1:
        seen = matrix.t() * second_moment.sqrt()
    else:
        seen = matrix.t() @ torch.linalg.cholesky(second_moment)
    return seen.t() @ seen, seen


class Projection:
    """Two cores, of which one carries the whole input: exact at every rank, S is never inverted.

    With the output's digits of the other core as rows, A Aᵀ under S has the directions to keep: one
    eigendecomposition says all of it. Under gradients, for plain low rank, A is G^½ W and what is
    kept of it is brought back by G^-½.

    Args:
        matrix: ``[∏ i, ∏ j]``, the transposed weight with its padding.
        second_moment: S ``[in, in]`` or ``[in]``, of the inputs without their padding.
        gradient_moment: G ``[out, out]``, likewise.
        shape: for which :meth:`holds`.

    Attributes:
        spectrum: of the bond under S and G, descending, float64.
    """

    def __init__(
        self, matrix: Tensor, second_moment: Tensor, gradient_moment: Tensor | None, shape: MPOShape
    ) -> None:
        self._axis = shape.in_factors.index(1)
        size, other = shape.out_factors[self._axis], shape.out_factors[1 - self._axis]
        moment = regularised(second_moment.detach())
        self._lower: Tensor | None = None
        if gradient_moment is not None:
            gradients = padded_moment(gradient_moment.detach().double(), size, GRADIENT_RIDGE)
            gradients.diagonal()[len(gradient_moment) :] = 1.0  # of outputs that are zero
            self._lower = torch.linalg.cholesky(gradients)
            matrix = (matrix.double() @ self._lower).to(matrix.dtype)
        self._digits = matrix.view(-1, *shape.out_factors)
        inputs = matrix[: len(moment)]
        self._seen: Tensor | None = None
        if other == 1 and len(inputs) < size:
            gram, self._seen = _gram_of_inputs(inputs.double(), moment.double())
        else:
            weighted = weigh(moment.to(matrix), inputs)
            gram = self._rows(inputs) @ self._rows(weighted).t()
        values, vectors = torch.linalg.eigh(gram)
        self.spectrum, self._vectors = values.clamp(min=0).sqrt().flip(0), vectors.flip(1)

    def _rows(self, matrix: Tensor) -> Tensor:
        """A row for each digit of the outputs whose directions are kept."""
        digits = matrix.view(-1, *self._digits.shape[1:])
        return digits.movedim(1 + self._axis, 0).flatten(1).double()

    @staticmethod
    def holds(shape: MPOShape, with_gradients: bool = False) -> bool:
        """Whether one of two cores carries the whole input, and the other the whole output."""
        if shape.num_cores != 2 or 1 not in shape.in_factors:
            return False
        return not with_gradients or shape.out_factors[1 - shape.in_factors.index(1)] == 1

    def cores(self, rank: int) -> list[Tensor]:
        """The two, of which the one without inputs keeps directions of outputs."""
        kept = self._vectors[:, :rank]
        if self._seen is not None:
            kept = torch.linalg.qr(self._seen @ kept)[0]
        back = kept
        if self._lower is not None:
            back = torch.linalg.solve_triangular(self._lower.t(), kept, upper=True)
        kept, back = kept.to(self._digits.dtype), back.to(self._digits.dtype)
        if self._axis == 0:
            return [back[None, None], torch.einsum("iab,ar->rib", self._digits, kept)[..., None]]
        return [torch.einsum("iab,br->iar", self._digits, kept)[None], back.t()[:, None, :, None]]


def fit(
    cores: Sequence[Tensor],
    matrix: Tensor,
    second_moment: Tensor,
    gradient_moment: Tensor | None = None,
    *,
    max_sweeps: int = 20,
    tolerance: float = 0.01,
) -> list[Tensor]:
    """The cores of these sizes whose product is closest to ``matrix`` under S, by alternation.

    Args:
        cores: where to start, core k ``[D_k, i_k, j_k, D_{k+1}]``; the error never rises.
        matrix: ``[∏ i, ∏ j]``, the transposed weight with its padding.
        second_moment: S ``[∏ i, ∏ i]``, or ``[∏ i]`` of a diagonal one, of its dtype.
        gradient_moment: G ``[∏ j, ∏ j]``, likewise.
        max_sweeps: times that each core is fitted at most.
        tolerance: it ends where a sweep takes less than this fraction off the error.
    """
    cores, last = orthogonalise(list(cores), 0), len(cores) - 1
    residual = matrix - merge_cores(cores)[0, :, :, 0]
    metric = second_moment, gradient_moment
    state = residual, weigh(second_moment, residual, gradient_moment)
    error = before = float("inf")
    for sweep in range(max_sweeps):
        steps = _ITERATIONS if sweep else _FIRST_ITERATIONS
        for k in range(last):
            _fit_core(cores, k, state, metric, steps)
            move_centre(cores, k, k + 1)
        for k in range(last, 0, -1):
            error = _fit_core(cores, k, state, metric, steps)
            move_centre(cores, k, k - 1)
        if not error < (1 - tolerance) * before:
            break
        before = error
    return cores


def _fit_core(
    cores: list[Tensor],
    k: int,
    state: tuple[Tensor, Tensor],
    metric: tuple[Tensor, Tensor | None],
    steps: int,
) -> float:
    """Least squares for core k with the others as they are; returns the error under S and G.

    ``state``, updated in place: what the cores leave of the matrix, and the same weighed.
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
        seen = weigh(metric[0], moved, metric[1])
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
