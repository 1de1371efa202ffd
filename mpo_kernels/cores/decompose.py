"""Dense matrix <-> cores: TT-SVD, canonical form, rounding, spectra and entropies.

Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33 (2011): algorithms 1 and 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from mpo_kernels.cores.chain import check_cores, check_finite, distance, merge_cores, orthogonalise
from mpo_kernels.cores.fitting import (
    GRADIENT_RIDGE,
    Projection,
    check_second_moment,
    fit,
    output_error,
    padded_moment,
    scaled,
)
from mpo_kernels.cores.shape import MPOShape


@dataclass(frozen=True)
class Decomposition:
    """Cores in canonical form about ``shape.central``, and what the truncation cost.

    Attributes:
        cores: core k is ``[D_k, i_k, j_k, D_{k+1}]``, contiguous, in the dtype of the input; left
            of the centre each is left-orthogonal, right of it right-orthogonal.
        shape: factors and the bonds that were kept.
        rel_error: ‖W − MPO‖_F / ‖W‖_F of the cores as they are, in their dtype; 0 for a zero
            matrix.
        spectra: singular values of each bond before it was cut, descending, float64; under the
            second moment where that alone gave the cut.
        output_error: ‖(W − MPO)S^½‖_F / ‖W S^½‖_F where a second moment S was given, and with one G
            of gradients ‖G^½(W − MPO)S^½‖_F / ‖G^½ W S^½‖_F.
    """

    cores: list[Tensor]
    shape: MPOShape
    rel_error: float
    spectra: list[Tensor]
    output_error: float | None = None

    @property
    def stacked(self) -> int:
        """How many matrices the cores are of; see :mod:`mpo_kernels.cores.stack`."""
        return max(math.prod(core.shape[:-4]) for core in self.cores)

    @property
    def shared(self) -> int | None:
        """Which core all of these matrices have in common; None where each has its own."""
        stacks = [core.dim() > 4 for core in self.cores]
        return stacks.index(False) if any(stacks) and not all(stacks) else None

    @property
    def entropies(self) -> list[float]:
        """Entanglement entropy of each bond, −Σ v ln v with v = λ² / Σ λ², in nats."""
        entropies = []
        for spectrum in self.spectra:
            v = spectrum.square()
            v = v[v > 0] / v.sum()
            entropies.append(float(-(v * v.log()).sum()) if len(v) else 0.0)
        return entropies


@torch.no_grad()
def reconstruct(
    cores: Sequence[Tensor], *, in_features: int | None = None, out_features: int | None = None
) -> Tensor:
    """The dense weight ``[out_features, in_features]`` of ``cores``, without their padding.

    Args:
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``, ``D_0 = D_n = 1``.
        in_features: true input size; default ∏ i_k.
        out_features: true output size; default ∏ j_k.
    """
    check_cores(cores)
    dtype = cores[0].dtype
    # Rounded once, not at every core.
    wide = [core.to(torch.promote_types(dtype, torch.float32)) for core in cores]
    weight = merge_cores(wide)[0, :, :, 0].t()
    out_size, in_size = weight.shape
    if (in_features or 1) > in_size or (out_features or 1) > out_size:
        raise ValueError(
            f"expected at most {in_size} in_features and {out_size} out_features, the products of "
            f"the factors, got {in_features} and {out_features}"
        )
    return weight[:out_features, :in_features].to(dtype).contiguous()


@torch.no_grad()
def decompose(
    weight: Tensor,
    shape: MPOShape,
    *,
    max_rank: int | None = None,
    rel_error: float | None = None,
    compression: float | None = None,
    second_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    judge: Tensor | None = None,
    max_sweeps: int = 20,
) -> Decomposition:
    """Decompose a dense weight by sequential TT-SVD, at most ``shape.ranks``.

    With a second moment of the layer's inputs the cores are then fitted to what its output loses;
    the bonds are chosen without it. Plain low rank, or any two cores of which one has the whole
    input, is exact then; other chains are fitted by alternating least squares (`fitting.py`).

    Args:
        weight: ``[out_features, in_features]``, any floating dtype; computed in fp32, or fp64 for
            a float64 weight.
        shape: factors, and bonds as caps.
        max_rank: a further cap on every bond.
        rel_error: bound on ‖W − MPO‖_F / ‖W‖_F, split evenly over the bonds (each may discard
            rel_error · ‖W‖ / √(n − 1)). It holds for the cores in their dtype; a UserWarning says
            where that is too coarse for it. With a second moment the bonds are those that it
            gives, and a fit under that moment may exceed it.
        compression: parameters to keep, as a fraction of the dense ones, at most 1; the singular
            values that cost least error a parameter go first.
        second_moment: E[x xᵀ] ``[in_features, in_features]`` in any scale, or ``[in_features]``
            where it is diagonal, as an embedding's counts are. Directions without input are held
            by a little of the identity.
        gradient_moment: E[g gᵀ] ``[out_features, out_features]`` in any scale, of a loss's
            gradients at the layer's output, which then count as well: what the loss rises by is
            fitted, to second order.
        judge: the second moment of other inputs, which ``output_error`` is then of.
        max_sweeps: of alternating least squares; it ends where one takes less than a hundredth
            off the error.

    Raises:
        TypeError: a weight or second moment that is not a floating-point tensor.
        ValueError: a weight of another size, with NaN or Inf; bounds outside their range, or more
            than one of ``rel_error`` and ``compression``; a compression no bond of 1 reaches; a
            second moment of another size, with NaN or Inf, or zero, or one of gradients without
            one of inputs.
    """
    check_weight(weight, shape)
    _check_bounds(max_rank, rel_error, compression)
    check_moments(shape, gradient_moment, second_moment, judge)
    return decomposed(
        *(weight, shape, max_rank, rel_error, compression),
        *(second_moment, gradient_moment, judge, max_sweeps),
    )


@torch.no_grad()
def decomposed(
    weight: Tensor,
    shape: MPOShape,
    max_rank: int | None,
    rel_error: float | None,
    compression: float | None,
    second_moment: Tensor | None,
    gradient_moment: Tensor | None,
    judge: Tensor | None,
    max_sweeps: int,
) -> Decomposition:
    """:func:`decompose` of what has been checked, as one matrix is for all that it may become."""
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    padded = work.new_zeros(math.prod(shape.in_factors), math.prod(shape.out_factors))
    padded[: shape.in_features, : shape.out_features] = work.t()
    n = shape.num_cores
    # [i_1 … i_n, j_1 … j_n] -> [i_1, j_1, …, i_n, j_n]
    interleaved = [axis for k in range(n) for axis in (k, n + k)]
    remainder = padded.view(*shape.in_factors, *shape.out_factors).permute(interleaved)

    caps = shape.ranks if max_rank is None else shape.with_ranks(max_rank).ranks
    caps = tuple(min(a, b) for a, b in zip(caps, shape.ranks, strict=True))

    def of(cores: list[Tensor], spectra: list[Tensor]) -> Decomposition:
        cores = _stored(cores, shape, weight.dtype)
        inputs = second_moment if judge is None else judge
        errors = _errors(cores, padded, shape, inputs, gradient_moment)
        return _decomposition(cores, shape, spectra, *errors)

    has_form = Projection.holds(shape, gradient_moment is not None)
    if second_moment is not None and rel_error is None and has_form:
        found = Projection(padded, second_moment.to(padded), gradient_moment, shape)
        spectra, ranks = [found.spectrum], caps
        if compression is not None:
            ranks = ranks_within(spectra, shape, compression, caps)
        return of(found.cores(ranks[0]), spectra)

    def cut(bound: float | None) -> Decomposition:
        threshold = _bond_threshold(bound, work, n)
        cores, spectra, carried, rank = [], [], remainder, 1
        for k in range(n - 1):
            i, j = shape.in_factors[k], shape.out_factors[k]
            left, values, right = _svd(carried.reshape(rank * i * j, -1))
            kept = min(caps[k], _tail_rank(values, threshold))
            cores.append(left[:, :kept].reshape(rank, i, j, kept))
            carried, rank = values[:kept, None] * right[:kept], kept
            spectra.append(values.double())
        cores.append(carried.reshape(rank, shape.in_factors[-1], shape.out_factors[-1], 1))
        if compression is not None:
            kept_ranks = ranks_within(spectra, shape, compression, caps)
            cores = _truncate(orthogonalise(cores, 0), kept_ranks, None)[0]
        if second_moment is not None:
            cores = _fitted(cores, padded, second_moment, gradient_moment, shape, max_sweeps)
        return of(cores, spectra)

    is_capped = any(cap < full for cap, full in zip(caps, shape.full_ranks, strict=True))
    return cut(rel_error) if is_capped or second_moment is not None else _within(rel_error, cut)


@torch.no_grad()
def round_cores(
    cores: Sequence[Tensor],
    *,
    max_rank: int | None = None,
    rel_error: float | None = None,
    ranks: Iterable[int] | None = None,
    in_features: int | None = None,
    out_features: int | None = None,
    second_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    max_sweeps: int = 20,
) -> Decomposition:
    """Cut the bonds of any cores, trained ones included: re-canonicalise, then truncate by SVD.

    The result is canonical about the central tensor; with no bound given, only bonds above the
    full rank shrink. Its error is that of sequential rounding, √(Σ discarded λ²) at most. With a
    second moment of the layer's inputs the cores are then fitted to what its output loses.

    Args:
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``; not changed.
        max_rank: a cap on every bond.
        rel_error: bound on the relative error, split evenly over the bonds.
        ranks: exactly these n − 1 bonds, none larger than now.
        in_features: true input size where the factors are padded.
        out_features: true output size, likewise.
        second_moment, gradient_moment, max_sweeps: see :func:`decompose`.

    Raises:
        ValueError: bounds or ranks that do not fit, NaN or Inf in a core, or a second moment as
            :func:`decompose` refuses it.
    """
    check_cores(cores)
    check_finite(cores)
    _check_bounds(max_rank, rel_error, None)
    shape = MPOShape(
        [core.shape[1] for core in cores],
        [core.shape[2] for core in cores],
        max_rank,
        in_features=in_features,
        out_features=out_features,
    )
    check_moments(shape, gradient_moment, second_moment)
    bonds = [core.shape[3] for core in cores[:-1]]
    if ranks is not None:
        wanted = shape.with_ranks(tuple(ranks)).ranks
        if any(rank > bond for rank, bond in zip(wanted, bonds, strict=True)):
            raise ValueError(f"expected ranks of at most the present {tuple(bonds)}, got {wanted}")
        bonds = list(wanted)
    caps = tuple(min(a, b) for a, b in zip(bonds, shape.ranks, strict=True))
    dtype = cores[0].dtype
    work = [core.detach().to(torch.promote_types(dtype, torch.float32)) for core in cores]
    canonical = orthogonalise(work, 0)

    def cut(bound: float | None) -> Decomposition:
        threshold = _bond_threshold(bound, canonical[0], len(cores))
        rounded, spectra = _truncate(canonical, caps, threshold)
        if second_moment is not None:
            matrix = merge_cores(work)[0, :, :, 0]
            rounded = _fitted(rounded, matrix, second_moment, gradient_moment, shape, max_sweeps)
            rounded = _stored(rounded, shape, dtype)
            errors = _errors(rounded, matrix, shape, second_moment, gradient_moment)
            return _decomposition(rounded, shape, spectra, *errors)
        discarded = sum(
            float(spectrum[core.shape[3] :].square().sum())
            for spectrum, core in zip(spectra, rounded, strict=False)
        )
        norm = float(torch.linalg.norm(canonical[0]))
        error = math.sqrt(discarded) / norm if norm > 0 else 0.0
        rounded = _stored(rounded, shape, dtype)
        if dtype != work[0].dtype:
            error = distance(work, rounded)
        return _decomposition(rounded, shape, spectra, error)

    is_bounded = max_rank is None and ranks is None and second_moment is None
    return _within(rel_error, cut) if is_bounded else cut(rel_error)


def _fitted(
    cores: list[Tensor],
    matrix: Tensor,
    second_moment: Tensor,
    gradient_moment: Tensor | None,
    shape: MPOShape,
    max_sweeps: int,
) -> list[Tensor]:
    """Cores of these bonds, closest to ``matrix [∏ i, ∏ j]`` under the second moments."""
    moment = scaled(second_moment.detach()).to(matrix)
    if Projection.holds(shape, gradient_moment is not None):
        return Projection(matrix, moment, gradient_moment, shape).cores(cores[0].shape[3])
    moment, gradients = padded_moment(moment, len(matrix)), None
    if gradient_moment is not None:
        gradients = scaled(gradient_moment.detach()).to(matrix)
        gradients = padded_moment(gradients, matrix.shape[1], GRADIENT_RIDGE)
    cores = fit(cores, matrix, moment, gradients, max_sweeps=max_sweeps)
    ranks = [core.shape[3] for core in cores[:-1]]
    return _truncate(orthogonalise(cores, 0), ranks, None)[0]


def _errors(
    cores: list[Tensor],
    matrix: Tensor,
    shape: MPOShape,
    second_moment: Tensor | None,
    gradient_moment: Tensor | None,
) -> tuple[float, float | None]:
    """Relative errors of cores for ``matrix [∏ i, ∏ j]``: its own, and its output's."""
    merged = merge_cores([core.to(matrix.dtype) for core in cores])[0, :, :, 0]
    norm = float(torch.linalg.norm(matrix))
    error = float(torch.linalg.norm(merged - matrix)) / norm if norm > 0 else 0.0
    if second_moment is None:
        return error, None
    true, fitted = (m[: shape.in_features, : shape.out_features].t() for m in (matrix, merged))
    inputs = scaled(second_moment.detach()).to(matrix)
    gradients = None if gradient_moment is None else scaled(gradient_moment.detach()).to(matrix)
    return error, output_error(true, fitted, inputs, gradients)


def _stored(cores: list[Tensor], shape: MPOShape, dtype: torch.dtype) -> list[Tensor]:
    """In canonical form, in the dtype that they are kept in."""
    return [core.to(dtype).contiguous() for core in orthogonalise(cores, shape.central)]


def _decomposition(
    cores: list[Tensor],
    shape: MPOShape,
    spectra: list[Tensor],
    error: float,
    lost: float | None = None,
) -> Decomposition:
    ranks = tuple(core.shape[3] for core in cores[:-1])
    return Decomposition(cores, shape.with_ranks(ranks), error, spectra, lost)


def _within(bound: float | None, cut: Callable[[float | None], Decomposition]) -> Decomposition:
    """What is cut to a bound, less what the cast to the cores' dtype takes of it."""
    found = cut(bound)
    if not bound or found.rel_error <= bound:
        return found
    # Of rounding to the nearest, for numbers spread evenly.
    least = torch.finfo(found.cores[0].dtype).eps * math.sqrt(len(found.cores)) / 4
    for cast in (least, 2 * least, 4 * least):
        if cast < bound:
            found = cut(math.sqrt(bound**2 - cast**2))
            if found.rel_error <= bound:
                return found
    warnings.warn(
        f"{found.cores[0].dtype} is too coarse for a relative error of {bound:g}: the cores are "
        "kept with a larger one",
        stacklevel=4,
    )
    return found


def check_weight(weight: Tensor, shape: MPOShape) -> None:
    """Raise unless it is a floating-point matrix of this shape, finite."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"expected a floating-point weight, got {got}")
    expected = (shape.out_features, shape.in_features)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"expected a weight [out_features, in_features] = {list(expected)}, "
            f"got {list(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("expected a finite weight, got NaN or Inf in it")


def check_moments(
    shape: MPOShape, gradient_moment: Tensor | None, *second_moments: Tensor | None
) -> None:
    """Raise unless they are second moments of the inputs and of the gradients at the output."""
    for moment in second_moments:
        if moment is not None:
            check_second_moment(moment, shape.in_features)
    if gradient_moment is not None:
        if second_moments[0] is None:
            raise ValueError("expected a second moment of inputs beside one of gradients, got none")
        check_second_moment(gradient_moment, shape.out_features, "gradients")
        if gradient_moment.dim() == 1:
            size = [shape.out_features] * 2
            raise ValueError(f"expected a second moment {size} of gradients, got its diagonal")


def _check_bounds(max_rank: int | None, rel_error: float | None, compression: float | None) -> None:
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 1):
        raise ValueError(f"expected max_rank to be an integer of at least 1, got {max_rank!r}")
    if rel_error is not None and not 0 <= rel_error < 1:
        raise ValueError(f"expected 0 <= rel_error < 1, got {rel_error!r}")
    if compression is not None and not 0 < compression <= 1:
        raise ValueError(f"expected 0 < compression <= 1, got {compression!r}")
    if rel_error is not None and compression is not None:
        raise ValueError("expected one of rel_error and compression, got both")


def rounded_up(value: float) -> str:
    """Four significant digits, as the least that is enough has to be told."""
    unit = Decimal(1).scaleb(Decimal(value).adjusted() - 3)
    return f"{float(Decimal(value).quantize(unit, ROUND_CEILING)):.4g}"


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # divide and conquer may fail to converge in fp32
        factors = torch.linalg.svd(matrix.double(), full_matrices=False)
        left, values, right = (factor.to(matrix.dtype) for factor in factors)
    return left, values, right


def _bond_threshold(rel_error: float | None, carrier: Tensor, num_cores: int) -> float | None:
    """What one bond may discard, as a norm; ``carrier`` has the norm of the whole matrix."""
    if rel_error is None:
        return None
    return rel_error * float(torch.linalg.norm(carrier)) / math.sqrt(max(num_cores - 1, 1))


def _tail_rank(values: Tensor, threshold: float | None) -> int:
    """The fewest singular values whose discarded rest has a norm within ``threshold``."""
    if threshold is None:
        return len(values)
    tails = values.double().square().flip(0).cumsum(0).sqrt()
    return max(1, len(values) - int((tails <= threshold).sum()))


def ranks_within(
    spectra: Sequence[Tensor], shape: MPOShape, compression: float, caps: Sequence[int]
) -> tuple[int, ...]:
    """Bonds within a budget: by λ² a parameter, the cheapest go first, the dearest come back."""
    budget = compression * shape.dense_parameters
    sizes = [i * j for i, j in zip(shape.in_factors, shape.out_factors, strict=True)]
    squares = [spectrum.square().tolist() for spectrum in spectra]
    most = [1, *(min(cap, len(s)) for cap, s in zip(caps, spectra, strict=True)), 1]
    bonds, inner = list(most), range(1, len(sizes))

    def parameters() -> int:
        return sum(bonds[k] * sizes[k] * bonds[k + 1] for k in range(len(sizes)))

    def price(k: int) -> int:
        """Parameters that one more value at bond k costs."""
        return bonds[k - 1] * sizes[k - 1] + sizes[k] * bonds[k + 1]

    while parameters() > budget:
        shrinkable = [k for k in inner if bonds[k] > 1]
        if not shrinkable:
            raise ValueError(
                "expected a compression of at least "
                f"{rounded_up(parameters() / shape.dense_parameters)}, "
                f"all bonds 1 with factors {shape.in_factors} and {shape.out_factors}, "
                f"got {compression}"
            )
        bonds[min(shrinkable, key=lambda k: squares[k - 1][bonds[k] - 1] / price(k))] -= 1
    # A bond is at most what the cores on either side of it can carry.
    for k in (*inner, *reversed(inner)):
        bonds[k] = min(bonds[k], bonds[k - 1] * sizes[k - 1], bonds[k + 1] * sizes[k])
    while True:
        left = budget - parameters()
        growable = [
            k
            for k in inner
            if price(k) <= left
            and bonds[k] < min(most[k], bonds[k - 1] * sizes[k - 1], bonds[k + 1] * sizes[k])
        ]
        if not growable:
            return tuple(bonds[1:-1])
        bonds[max(growable, key=lambda k: squares[k - 1][bonds[k]] / price(k))] += 1


def _truncate(
    cores: Sequence[Tensor], caps: Sequence[int], threshold: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the bonds left to right from cores whose centre is the first one."""
    cores, spectra = list(cores), []
    for k in range(len(cores) - 1):
        d, i, j, r = cores[k].shape
        left, values, right = _svd(cores[k].reshape(d * i * j, r))
        kept = min(caps[k], _tail_rank(values, threshold))
        cores[k] = left[:, :kept].reshape(d, i, j, kept)
        cores[k + 1] = torch.tensordot(values[:kept, None] * right[:kept], cores[k + 1], dims=1)
        spectra.append(values.double())
    return cores, spectra
