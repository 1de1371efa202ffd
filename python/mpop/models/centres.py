"""Frozen central tensors in 8 or 4 bits while the rest is fine-tuned."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mpo_kernels import MPOEmbedding
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLayer, BlockwiseLinear
from mpop.models.matrices import module_at, mpo_matrices, put
from mpop.models.plain import check_own_values
from mpop.models.subclasses import adopt


class CentreMemory(NamedTuple):
    """Bytes of the central tensors that were quantised, before and after."""

    before: int
    after: int


def quantize_centres(model: nn.Module, bits: int = 4) -> CentreMemory:
    """Hold the centre of each MPO in ``bits`` bits a number, frozen; the rest trains as before.

    Codes have a scale for 64 numbers each: 8 bits of even steps, or 4 of QLoRA's NF4. A matrix
    that an output head shares stays as it is. Saved, they are plain MPO modules, as
    :func:`dequantize_centres` makes them.

    Args:
        model: compressed, in place.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, a model without MPO modules, or NaN or Inf in a centre.
    """
    check_own_values(model)
    matrices = [names for names in mpo_matrices(model) if len(names) == 1]
    if not matrices:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    made: dict[str, BlockwiseLayer] = {}
    before = after = 0
    for (name,) in matrices:
        module = module_at(model, name)
        if len(module.cores) < 2:
            continue
        kind = BlockwiseEmbedding if isinstance(module, MPOEmbedding) else BlockwiseLinear
        made[name] = kind(module, bits)
        before += module.cores[module.central].nbytes
        after += made[name].codes.nbytes + made[name].scales.nbytes
    for name, layer in made.items():
        plain = module_at(model, name)
        _note(plain, layer)
        put(model, name, layer)
    return CentreMemory(before, after)


def dequantize_centres(model: nn.Module) -> None:
    """Plain MPO modules again, whose frozen centres have the values of the codes."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BlockwiseLinear | BlockwiseEmbedding):
            plain = layer.dequantized()
            _note(layer, plain)
            put(model, name, plain)


def _note(old: nn.Module, new: nn.Module) -> None:
    """What `swap` and `replace` noted for the checkpoint and its card."""
    adopt(new, old)
    for name in ("kind", "rel_error"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
