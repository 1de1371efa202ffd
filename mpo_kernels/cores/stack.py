"""A matrix, or several of one size such as those of experts, as chains of one shape.

Of several, weights are ``[E, out, in]``, second moments ``[E, in, in]`` and cores
``[E, D_k, i_k, j_k, D_{k+1}]``, without E a core that they have in common; what these functions do
to a single matrix is what those of the same names without ``stack`` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpo_kernels.cores.decompose import Decomposition, decompose, ranks_within, reconstruct
from mpo_kernels.cores.family import Cost, bound_within, choose
from mpo_kernels.cores.fitting import output_square, regularised, weigh, weighted_spectrum
from mpo_kernels.cores.shape import MPOShape

# Of the side of a common core where the other side is narrower.
_WIDEST = 8192


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
    counts = [core.shape[0] for core in cores if core.dim() > 4]
    if not counts:
        return reconstruct(cores, **size)
    count = counts[0]
    each = zip(*(core.expand(count, *core.shape[-4:]) for core in cores), strict=True)
    return torch.stack([reconstruct(one, **size) for one in each])


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
    shared_core: bool = False,
) -> Decomposition:
    """The member that loses least within the budget; of several weights, plain low rank.

    Args:
        shared_core: several weights have the core in common that loses less so; the budget is then
            one of parameters. Else see :func:`mpo_kernels.cores.family.choose`.
    """
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
    if shared_core:
        return _choose_shared(weights, budget, second_moments, judges)
    count, out_features, in_features = weights.shape
    shape = MPOShape.low_rank(in_features, out_features, min(in_features, out_features))
    bound = bound_within(shape, budget / count, cost) or {}
    return decompose_stack(weights, shape, **bound, second_moments=second_moments, judges=judges)


class SharedCore:
    """Low rank of several weights, one of whose two cores is the same for all.

    A common core of outputs keeps directions of them under each weight's own inputs: what it loses
    is the tail of a spectrum. One of inputs keeps directions under the mean of their moments, and
    the others are then fitted to their own.

    Args:
        weights: ``[E, out, in]``.
        second_moments: of the inputs of each, ``[E, in, in]`` or ``[E, in]``, in one scale.
        index: of the common core: 0, of outputs, or 1, of inputs.

    Attributes:
        lost: squares at each rank from 0 to the full one, float64; in the units of
            :func:`stack_spectrum`.
        parameters: of each rank.
    """

    def __init__(self, weights: Tensor, second_moments: Tensor | None, index: int) -> None:
        self._weights, self._moments, self._index = weights.detach(), second_moments, index
        count, out_features, in_features = weights.shape
        common, own = (in_features, out_features) if index else (out_features, in_features)
        self.parameters = common + count * own
        gram = torch.zeros(common, common, dtype=torch.float64, device=weights.device)
        for k, weight in enumerate(self._weights):
            rows = weight.double().t() if index else weight.double()
            gram += rows @ (rows.t() if index else self._weighed(k, rows.t()))
        self._lower: Tensor | None = None
        if index and second_moments is not None:
            mean = _whole(second_moments.double().mean(0))
            self._lower = torch.linalg.cholesky(mean) if mean.dim() == 2 else mean.sqrt().diag()
            gram = self._lower.t() @ gram @ self._lower
        values, vectors = torch.linalg.eigh(gram)
        self._vectors = vectors.flip(1)
        tails = torch.cat((values.new_zeros(1), values.clamp(min=0).cumsum(0))).flip(0)
        self.lost = tails[: min(out_features, in_features) + 1]

    def _weighed(self, k: int, matrix: Tensor) -> Tensor:
        """``S · matrix`` with the moment of one's inputs."""
        return matrix if self._moments is None else weigh(_whole(self._moments[k]), matrix)

    def within(self, budget: float) -> int:
        """The largest rank of so many parameters, 0 where there is none."""
        return min(int(budget // self.parameters), len(self.lost) - 1)

    def cores(self, rank: int) -> list[Tensor]:
        """``[1, 1, out, rank]`` and ``[rank, in, 1, 1]``, the one that is not common of each."""
        kept, dtype = self._vectors[:, :rank], self._weights.dtype
        if self._lower is not None:
            kept = torch.linalg.solve_triangular(self._lower.t(), kept, upper=True)
        own = []
        for k, weight in enumerate(self._weights):
            if self._index:
                seen = self._weighed(k, kept)
                own.append(torch.linalg.solve(kept.t() @ seen, (weight.double() @ seen).t()).t())
            else:
                own.append(kept.t() @ weight.double())
        each, common = torch.stack(own).to(dtype), kept.to(dtype)
        if self._index:
            return [each[:, None, None].contiguous(), common.t()[..., None, None].contiguous()]
        return [common[None, None].contiguous(), each[..., None, None].contiguous()]


def _whole(moment: Tensor) -> Tensor:
    """Regularised, in its own scale."""
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    return regularised(moment.double()) * diagonal.double().mean()


def sharings(weights: Tensor, second_moments: Tensor | None) -> list[SharedCore]:
    """The cores that weights ``[E, out, in]`` can have in common: of the narrower side, and of the
    other where it is not so wide that its eigendecomposition takes an hour.
    """
    sides = weights.shape[1:]
    within = max(_WIDEST, min(sides))
    return [SharedCore(weights, second_moments, k) for k in (0, 1) if sides[k] <= within]


def _choose_shared(
    weights: Tensor, budget: float, second_moments: Tensor | None, judges: Tensor | None
) -> Decomposition:
    work = weights.to(torch.promote_types(weights.dtype, torch.float32))
    norm = float(torch.linalg.vector_norm(work))
    judges = second_moments if judges is None else judges
    out_features, in_features = weights.shape[1:]
    found: list[tuple[float, Decomposition]] = []
    for common in sharings(weights, second_moments):
        if rank := common.within(budget):
            cores, shape = common.cores(rank), MPOShape.low_rank(in_features, out_features, rank)
            cut = reconstruct_stack([core.to(work) for core in cores], shape)
            error = float(torch.linalg.vector_norm(work - cut)) / norm if norm else 0.0
            spectrum = common.lost.diff().neg().clamp(min=0).sqrt()
            made = Decomposition(cores, shape, error, [spectrum])
            made = made if judges is None else _judged(made, weights, judges)
            found.append((error if made.output_error is None else made.output_error, made))
    if not found:
        raise ValueError(f"expected a budget that one rank meets, got {budget:g}")
    return min(found, key=lambda each: each[0])[1]


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
