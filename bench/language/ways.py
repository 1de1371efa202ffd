"""Ways to cut a decoder's linears to a share of their parameters, and to round them to few bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mpo_kernels import Decomposition, MPOLinear, MPOShape, decompose, reconstruct
from mpo_kernels.layers.cost import LayerCost
from mpop.compression.allocation import allocate, curve
from mpop.compression.calibration import Moments
from mpop.compression.sequential import Batch, in_sequence
from mpop.models.matrices import Names

Weights = Mapping[Names, Tensor]
AllMoments = Mapping[Names, Moments]
# Of alternating least squares, where there is no closed form.
_SWEEPS = 3


class Way(NamedTuple):
    """What a cut minds, who gets how much, and in what form it is held.

    Attributes:
        meaning: for the table.
        inputs: the second moments of inputs count.
        gradients: and those of gradients.
        shared: one budget over all matrices, by the second moments of gradients.
        interpolative: low rank as rows and what makes the others of them.
        num_cores: balanced factors of so many cores; None for plain low rank.
        in_bytes: the rows in int8, as `mpop.quantize` holds them.
        sequential: each matrix for what it is fed once those before it are cut.
    """

    meaning: str
    inputs: bool = True
    gradients: bool = False
    shared: bool = False
    interpolative: bool = False
    num_cores: int | None = None
    in_bytes: bool = False
    sequential: bool = False


WAYS = {
    "svd": Way("truncated SVD of each weight, one share for all", inputs=False),
    "aware": Way("the same under the inputs' second moments, as SVD-LLM does"),
    "ranks": Way("ranks shared by what the model loses with each matrix", shared=True),
    "both": Way("cut under the gradients' second moments too", gradients=True, shared=True),
    "form": Way(
        "held as rows and what makes the others of them",
        gradients=True,
        shared=True,
        interpolative=True,
    ),
}
WAYS["ours"] = WAYS["form"]._replace(
    meaning="each matrix for what it is fed by then: `--factors interpolative`", sequential=True
)
WAYS["ours-int8"] = WAYS["ours"]._replace(
    meaning="`ours` in int8: `--store int8`; matrices that stay dense are in 16 bits", in_bytes=True
)
WAYS |= {
    f"chain-{n}": Way(
        f"`both` in {n} balanced cores for each matrix, its share of the budget the same",
        gradients=True,
        shared=True,
        num_cores=n,
    )
    for n in (2, 3, 5)
}


class Cut(NamedTuple):
    """A matrix after it.

    Attributes:
        weight: ``[out, in]``.
        parameters, bytes: that it takes.
    """

    names: Names
    weight: Tensor
    parameters: float
    bytes: float


def cut(
    model: Any,
    batches: Sequence[Batch],
    weights: Weights,
    moments: AllMoments,
    way: Way,
    ratio: float,
) -> Iterator[Cut]:
    """Each matrix, cut so that all have the share `ratio` of their parameters.

    Args:
        model: that the weights are of, as it was after each of them.
        batches: what the moments are of.
    """
    budgets = _budgets(weights, moments, way, ratio)

    def fit(names: Names, weight: Tensor, known: Moments | None) -> Decomposition | None:
        assert known is not None
        if budgets[names] >= weight.numel():
            return None
        return decompose(
            weight,
            _shape(weight, way, budgets[names]),
            compression=None if way.num_cores is None else budgets[names] / weight.numel(),
            second_moment=known.fit + known.judge if way.inputs else None,
            gradient_moment=known.gradients if way.gradients else None,
            max_sweeps=_SWEEPS,
        )

    groups = [(list(weights), moments)]
    for names, found in in_sequence(model, batches if way.sequential else None, groups, fit):
        yield _cut_of(names, weights[names], found, way)


def _cut_of(names: Names, weight: Tensor, found: Decomposition | None, way: Way) -> Cut:
    if found is None:
        return Cut(names, weight, weight.numel(), 2 * weight.numel())
    sizes = {"in_features": weight.shape[1], "out_features": len(weight)}
    parameters = LayerCost(interpolative=way.interpolative).of(found.shape)
    if not way.in_bytes:
        places = 8 * len(weight) if way.interpolative else 0  # of its rows
        return Cut(names, reconstruct(found.cores, **sizes), parameters, 2 * parameters + places)
    layer = MPOLinear(**sizes, shape=found.shape, bias=False)
    layer.load_state_dict({f"cores.{k}": core for k, core in enumerate(found.cores)})
    held = layer.interpolative().quantized()
    num_bytes = sum(tensor.nbytes for tensor in held.state_dict().values())
    return Cut(names, held.to_linear().weight.detach(), parameters, num_bytes)


def _shape(weight: Tensor, way: Way, budget: float) -> MPOShape:
    out_features, in_features = weight.shape
    if way.num_cores is not None:
        return MPOShape.balanced(in_features, out_features, way.num_cores)
    cost = LayerCost(interpolative=way.interpolative)
    ranks = range(min(in_features, out_features), 0, -1)
    shapes = (MPOShape.low_rank(in_features, out_features, rank) for rank in ranks)
    return next(shape for shape in shapes if cost.of(shape) <= budget)


def _budgets(weights: Weights, moments: AllMoments, way: Way, ratio: float) -> dict[Names, float]:
    if not way.shared:
        return {names: ratio * weight.numel() for names, weight in weights.items()}
    cost = LayerCost(interpolative=way.interpolative)
    curves = {
        names: curve(weight, moments[names] if way.gradients else _plain(moments[names]), cost)
        for names, weight in weights.items()
    }
    whole = sum(weight.numel() for weight in weights.values())
    points = allocate(list(curves.values()), ratio * whole)
    return {names: point.cost for names, point in zip(curves, points, strict=True)}


def _plain(moments: Moments) -> Moments:
    """With the gradients' mean square alone, all outputs alike."""
    return moments._replace(gradients=None)


def rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, float]:
    """To the nearest of 2^bits even steps, and the bytes that takes.

    Args:
        weight: ``[out, in]``; each row, or each group of so many of its inputs, has a scale in 16
            bits, and of a group an offset as well.
    """
    out_features, in_features = weight.shape
    group = group and math.gcd(group, in_features)
    steps = 2**bits - 1
    if group is None:
        scale = weight.abs().amax(1, keepdim=True) / (steps // 2)
        return (weight / scale).round() * scale, weight.numel() * bits / 8 + 2 * out_features
    each = weight.view(out_features, in_features // group, group)
    least, most = each.amin(2, keepdim=True), each.amax(2, keepdim=True)
    scale = ((most - least) / steps).clamp(min=1e-12)
    new = ((each - least) / scale).round() * scale + least
    return new.view_as(weight), weight.numel() * bits / 8 + 4 * weight.numel() / group


ROUNDINGS: dict[str, Callable[[Tensor], tuple[Tensor, float]]] = {
    "int8": lambda weight: rounded(weight, 8, None),
    "int4": lambda weight: rounded(weight, 4, 64),
}
