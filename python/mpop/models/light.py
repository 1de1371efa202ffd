"""Light fine-tuning (the paper's LFA): train everything but the central tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from mpo_kernels import InterpolativeLinear
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpo_kernels.layers.quantized import QuantizedLayer
from mpop.models.matrices import (
    MPO,
    check_own_cores,
    compressed_matrices,
    module_at,
    mpo_modules,
    parameters_of,
    tensors_of,
)
from mpop.models.plain import check_unwrapped

# Of each matrix, what is trained unless a configuration says otherwise
# (docs/explanations/method.md, How light).
SHARE = 0.1


class ParameterCount(NamedTuple):
    """The paper's #Pr and #To; a parameter that several modules share counts once."""

    trainable: int
    total: int


class ByteCount(NamedTuple):
    """Of the compressed matrices, biases left out, and of all tensors of the model."""

    matrices: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters, as trainable where they require a gradient; quantised ones too."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    for layer in model.modules():
        if isinstance(layer, BlockwiseLayer):
            total += math.prod(layer.shape.core_shapes[layer.central])
        elif isinstance(layer, QuantizedLayer):
            held = layer.codes if layer.bias is None else [*layer.codes, layer.bias]
            total += sum(tensor.numel() for tensor in held)
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), total)


def count_bytes(model: nn.Module) -> ByteCount:
    """Count the bytes of a model as it is saved: quantised centres as the cores they stand for."""
    state = model.state_dict(keep_vars=True).values()
    others = {id(tensor): tensor.nbytes for tensor in state if isinstance(tensor, Tensor)}
    matrices = 0
    for names in compressed_matrices(model):
        module = module_at(model, names[0])
        held = tensors_of(module)
        for tensor in held:
            others.pop(id(tensor), None)
        if isinstance(module, QuantizedLayer | InterpolativeLinear):
            matrices += sum(tensor.nbytes for tensor in held)
        else:
            matrices += parameters_of(module)[0] * held[0].itemsize
    return ByteCount(matrices, matrices + sum(others.values()))


def freeze_central(model: nn.Module) -> ParameterCount:
    """Freeze the central tensor of every MPO module; all else stays as trainable as it was.

    Returns:
        The parameters now trained and all of them.

    Raises:
        ValueError: a model without MPO modules.
    """
    for module in _modules_of(model):
        module.freeze_central()
    return count_parameters(model)


def balance(model: nn.Module) -> None:
    """Prepare every MPO module for light fine-tuning; what the model computes stays the same.

    A step on an entry of an auxiliary tensor then changes its weight by as much as on any other, in
    every matrix; see `mpo_kernels.cores.gauge.balanced`. To be called before there is an optimizer.
    Those in interpolative form stay as they are, since their cores have no other scales, and so do
    experts that share a core.

    Raises:
        ValueError: a model without MPO modules, matrices that share a single core, such as a
            centre, a dtype without room for the scaled cores, or adapters, which are of the cores
            as they were.
    """
    check_unwrapped(model)
    _modules_of(model)
    check_own_cores(model)
    for name, module in mpo_modules(model):
        if isinstance(module, InterpolativeLinear) or getattr(module, "shared", None) is not None:
            continue
        try:
            module.balance()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def unfreeze(model: nn.Module) -> ParameterCount:
    """Make the central tensor of every MPO module trainable again; see `freeze_central`."""
    for module in _modules_of(model):
        module.unfreeze()
    return count_parameters(model)


def _modules_of(model: nn.Module) -> list[MPO]:
    modules = [module for _, module in mpo_modules(model)]
    if not modules:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    return modules


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module is afterwards in the mode that it was in, training or not."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
