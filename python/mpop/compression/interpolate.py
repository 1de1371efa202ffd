"""Low rank in the fewest numbers: the matrices of a compressed model in interpolative form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from mpo_kernels import InterpolativeLinear, MPOLinear
from mpop.models.config import LINEARS, CompressionConfig, has_rows, matches
from mpop.models.matrices import module_at, mpo_matrices, parameters_of, spec_of
from mpop.models.plain import check_unwrapped
from mpop.models.quantized import note
from mpop.models.selection import check_matches
from mpop.models.swapping import put


class Interpolated(NamedTuple):
    """Parameters of the matrices that were changed, before and after."""

    before: int
    after: int


def interpolate(model: nn.Module, include: Iterable[str] | None = None) -> Interpolated:
    """Hold linears of low rank r as r of their rows, r² numbers fewer each, in place.

    The matrices stay the same but for rounding in their dtype; see
    `mpo_kernels.MPOLinear.interpolative`. Such cores train, are saved and loaded, served and
    merged; they are not squeezed and their centres not quantised: do that first.

    Args:
        model: compressed.
        include: patterns of module names, as those of `CompressionConfig`; by default all linears
            of plain low rank.

    Returns:
        The parameters of these matrices before and after.

    Raises:
        TypeError, ValueError: no linear of plain low rank, a pattern that fits none, quantised
            matrices or centres, NaN or Inf in a core, or adapters. The model is as it was.
    """
    patterns: Any = include
    patterns = CompressionConfig(include=patterns).include
    check_unwrapped(model)
    matrices = mpo_matrices(model)
    if not matrices:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    specs = {names: spec_of(module_at(model, names[0])) for names in matrices}
    chosen = [
        names
        for names, spec in specs.items()
        if spec.kind in LINEARS and spec.form is None and has_rows(spec.shape)
    ]
    if not chosen:
        raise ValueError(
            f"expected linears of plain low rank, got none in {len(matrices)} matrices"
        )
    if patterns is not None:
        for pattern in patterns:
            check_matches("include", pattern, chosen)
        chosen = [names for names in chosen if any(matches(each, names) for each in patterns)]
    made: dict[MPOLinear, InterpolativeLinear] = {}
    for name in (name for names in chosen for name in names):
        plain = module_at(model, name)
        try:
            made[plain] = made.get(plain) or _interpolative(plain)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    before = sum(parameters_of(plain)[0] for plain in made)
    after = sum(parameters_of(layer)[0] for layer in made.values())
    for name in (name for names in chosen for name in names):
        put(model, name, made[module_at(model, name)])
    return Interpolated(before, after)


def _interpolative(plain: MPOLinear) -> InterpolativeLinear:
    """With the very bias of a layer, trained as that is."""
    layer = plain.interpolative()
    layer.bias = plain.bias
    layer.cores.requires_grad_(any(core.requires_grad for core in plain.cores))
    if spec_of(plain).frozen:
        layer.freeze_central()
    note(plain, layer)
    return layer
