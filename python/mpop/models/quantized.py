"""Cores as they are served, laid out or in bytes, and frozen centres in few bits for training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from mpo_kernels import MPOEmbedding, MPOExperts, MPOLinear, MPOShape
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLayer, BlockwiseLinear
from mpo_kernels.layers.module import check_rows, merged_for
from mpo_kernels.layers.quantized import QuantizedInterpolativeLinear, QuantizedLayer
from mpop.models.config import LINEARS, STORES, matches
from mpop.models.matrices import (
    check_centres,
    check_not_interpolative,
    compressed_matrices,
    expert_names,
    module_at,
    mpo_matrices,
    spec_of,
    tensors_of,
)
from mpop.models.plain import check_own_values, check_unwrapped
from mpop.models.subclasses import adopt
from mpop.models.swapping import put, swap, update_ties


class Memory(NamedTuple):
    """Bytes of what was quantised, before and after."""

    before: int
    after: int


def quantize(
    model: nn.Module, dtype: torch.dtype = torch.int8, include: Iterable[str] | None = None
) -> Memory:
    """Hold the MPO linears in one byte a number, for serving: nothing of them trains any more.

    Each slice of a bond, or in interpolative form each row, has an fp32 scale; see
    `mpo_kernels.MPOLinear.quantized`. Word embeddings, and an output head with the cores of one,
    and experts (a UserWarning says so) stay as they are. Saved and loaded, bytes stay bytes.

    Args:
        model: compressed, in place.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        include: patterns of module names, as those of `CompressionConfig`; by default all linears.

    Returns:
        The bytes of these matrices before and after.

    Raises:
        ValueError: another dtype, no MPO linear that is included, a pattern that fits none, one
            that is quantised already or has one core or NaN or Inf, or adapters. The model is as
            it was.
    """
    if dtype not in STORES.values():
        expected = " or ".join(map(str, STORES.values()))
        raise ValueError(f"dtype: expected {expected}, got {dtype!r}")
    if isinstance(include, str):
        raise TypeError(f"include: expected a sequence of patterns, got {include!r}")
    check_unwrapped(model)
    check_centres(model)
    compressed = compressed_matrices(model)
    if not compressed:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    linears = [n for n in compressed if spec_of(module_at(model, n[0])).kind in LINEARS]
    patterns = ["*"] if include is None else list(include)
    for pattern in patterns:
        if not any(matches(pattern, names) for names in linears):
            if include is None:
                raise ValueError("expected MPO linears to quantize, got none")
            raise ValueError(
                f"include: expected MPO linears, got {pattern!r}, which fits none of {len(linears)}"
            )
    _warn_of_experts(model)
    made: dict[nn.Module, QuantizedLayer] = {}
    chosen = [n for n in linears if any(matches(pattern, n) for pattern in patterns)]
    for names in chosen:
        for module in (module_at(model, name) for name in names):
            if isinstance(module, QuantizedLayer):
                raise ValueError(
                    f"{names[0]}: expected an MPO linear, got one in {module.dtype} already: leave "
                    "it out by include=..."
                )
            try:
                made[module] = module.quantized(dtype)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}: leave it out by include=...") from error
    memory = Memory(_bytes_of(made), _bytes_of(made.values()))
    for names in chosen:
        for name in names:
            plain = module_at(model, name)
            note(plain, made[plain])
            put(model, name, made[plain])
    return memory


def _warn_of_experts(model: nn.Module) -> list[str]:
    """Say which matrices stay as they are."""
    experts = expert_names(model)
    if experts:
        warnings.warn(
            f"only layers are quantised: the cores of {len(experts)} stacks of experts, such as "
            f"{experts[0]}, stay as they are",
            stacklevel=3,
        )
    return experts


def _bytes_of(layers: Iterable[Any]) -> int:
    return sum(tensor.nbytes for layer in layers for tensor in tensors_of(layer))


def optimize_for_inference(model: PreTrainedModel, rows: int = 1) -> None:
    """Hold the cores as ``rows`` rows are computed with fastest, for serving alone.

    Every MPO linear is merged and laid out for the device that it is on, or in bytes laid out; see
    `mpo_kernels.MPOLinear.merged`. One in interpolative form becomes plain low rank where that is
    faster, r² numbers larger; in bytes it stays as it is. An output head that shares the cores of
    an embedding is so too, and goes on sharing them; an embedding without one stays as it is, and
    so do experts. What the model computes is the same but for rounding; its cores are new
    parameters that do not train.

    Args:
        model: compressed, in evaluation mode, in place.
        rows: tokens that are computed at once, of a model that generates those of one step.

    Raises:
        ValueError: a model in training mode, without MPO modules or with quantised centres or
            adapters, or no row. The model is as it was.
    """
    check_unwrapped(model)
    check_centres(model)
    check_rows(rows)
    if model.training:
        raise ValueError(
            "expected a model in evaluation mode, got one in training, which would train other "
            "cores: train first, then call model.eval()"
        )
    matrices = compressed_matrices(model)
    if not matrices:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    for names in matrices:
        owner, *others = (module_at(model, name) for name in names)
        new: Any
        if isinstance(owner, QuantizedInterpolativeLinear | MPOExperts):
            continue  # as they are read
        if not isinstance(owner, MPOEmbedding):
            new = owner.merged(rows)
        elif head := next((each for each in others if isinstance(each, MPOLinear)), None):
            new = _as_the_head_reads_them(owner, head, rows)
        else:
            continue
        new.requires_grad_(False)
        if hasattr(owner, "rel_error"):
            new.rel_error = owner.rel_error
        swap(model, names, new)
    update_ties(model)


def _as_the_head_reads_them(table: MPOEmbedding, head: MPOLinear, rows: int) -> MPOEmbedding:
    """An embedding with the cores that its head is computed with fastest."""
    size = table.num_embeddings, table.embedding_dim
    cores = merged_for(head.oriented_cores(), rows, head.in_features, head.out_features)
    cores = [core.transpose(1, 2) for core in cores]
    shape = MPOShape.of_cores([core.shape for core in cores], *size)
    new = MPOEmbedding(*size, shape, device="meta")
    new.cores = nn.ParameterList(map(nn.Parameter, cores))
    return new


def quantize_centres(model: nn.Module, bits: int = 4) -> Memory:
    """Hold the centre of each MPO in ``bits`` bits a number, frozen; the rest trains as before.

    Codes have a scale for 64 numbers each: 8 bits of even steps, or 4 of QLoRA's NF4. A matrix
    that an output head shares stays as it is, and so do experts, as a UserWarning says. Saved, they
    are plain MPO modules, as :func:`dequantize_centres` makes them.

    Args:
        model: compressed, in place.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, a model without MPO modules, matrices in interpolative form, or NaN
            or Inf in a centre.
    """
    check_own_values(model)
    check_not_interpolative(model, "take the model as it was before mpop.interpolate")
    matrices = [names for names in mpo_matrices(model) if len(names) == 1]
    if not matrices:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    experts = set(_warn_of_experts(model))
    made: dict[str, BlockwiseLayer] = {}
    before = after = 0
    for (name,) in matrices:
        module = module_at(model, name)
        if len(module.cores) < 2 or name in experts:
            continue
        kind = BlockwiseEmbedding if isinstance(module, MPOEmbedding) else BlockwiseLinear
        made[name] = kind(module, bits)
        before += module.cores[module.central].nbytes
        after += made[name].codes.nbytes + made[name].scales.nbytes
    for name, layer in made.items():
        plain = module_at(model, name)
        note(plain, layer)
        put(model, name, layer)
    return Memory(before, after)


def dequantize_centres(model: nn.Module) -> None:
    """Plain MPO modules again, whose frozen centres have the values of the codes."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BlockwiseLinear | BlockwiseEmbedding):
            plain = layer.dequantized()
            note(layer, plain)
            put(model, name, plain)


def note(old: nn.Module, new: nn.Module) -> None:
    """What `swap` and `replace` noted for the checkpoint and its card."""
    adopt(new, old)
    for name in ("kind", "rel_error"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
