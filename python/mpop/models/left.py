"""What of a model stays dense, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from mpo_kernels import InterpolativeLinear
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpo_kernels.layers.module import MPOModule
from mpo_kernels.layers.quantized import QuantizedLayer
from mpop.models.matrices import OTHER_EMBEDDINGS, Names, module_at, sorted_matrices

NOT_SELECTED = "not selected"
_KEPT = "selected, and worth more dense than cut"
_SMALL = "biases, norms and the like"
_CONVOLUTIONS = "convolutions"


class LeftDense(NamedTuple):
    """Parameters that no MPO took the place of."""

    reason: str
    parameters: int

    @property
    def is_unasked(self) -> bool:
        """Whether matrices stay for a reason that lies in the model, not in the configuration."""
        asked = (NOT_SELECTED, _KEPT, OTHER_EMBEDDINGS, _SMALL, _CONVOLUTIONS)
        return self.reason not in asked


def left_dense(model: PreTrainedModel, kept: Iterable[Names] = ()) -> tuple[LeftDense, ...]:
    """The dense parameters of a model, compressed or not, by reason; most first.

    Args:
        kept: matrices that were selected, and that a budget leaves dense.
    """
    kept = set(kept)
    counts: Counter[str] = Counter()
    counted = {id(core) for module in model.modules() for core in _cores(module)}
    for names, reason in sorted_matrices(model).items():
        weight = module_at(model, names[0]).weight
        counted.add(id(weight))
        counts[_KEPT if names in kept else reason or NOT_SELECTED] += weight.numel()
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.bias is not None:
            counts[_SMALL] += module.bias.numel()  # a buffer, as all of it
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                counts[_reason(module, name, parameter)] += parameter.numel()
    return tuple(LeftDense(reason, count) for reason, count in counts.most_common())


def _cores(module: nn.Module) -> Iterable[nn.Parameter]:
    if isinstance(module, MPOModule | InterpolativeLinear):
        return module.cores
    return module.auxiliary if isinstance(module, BlockwiseLayer) else ()


def _reason(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() < 2 or name.endswith("bias"):  # of experts, a row each
        return _SMALL
    if isinstance(module, nn.modules.conv._ConvNd):
        return _CONVOLUTIONS
    is_stack = parameter.dim() > 2 and len(parameter) > 1
    kind = "matrices in one tensor, as experts have" if is_stack else "parameters"
    return f"{kind}, of {type(module).__name__}"


def describe_left(left: Iterable[LeftDense], whole: int) -> list[str]:
    """A line of what stays dense, and one for each reason of at least one per cent."""
    left = list(left)
    total = sum(part.parameters for part in left)
    lines = [f"left dense: {total:,} parameters, {total / whole:.1%} of the dense model"]
    shown = [part for part in left if part.parameters >= 0.01 * whole]
    lines += [f"  {part.parameters / whole:6.1%}  {part.reason}" for part in shown]
    if rest := total - sum(part.parameters for part in shown):
        lines.append(f"  {rest / whole:6.1%}  others")
    return lines
