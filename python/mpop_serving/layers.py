"""Layers whose matrices are held as cores, each process with its share of them.

vLLM and SGLang ask the same of a method: `create_weights` when a layer is built, a `weight_loader`
for each of its parameters, `process_weights_after_loading`, then `apply` and `embedding`. Their
packages add their base classes and how a layer knows its place among the processes.

A share is a range of the most significant digit of the outputs (column-parallel) or of the inputs
(row-parallel), so one core is cut and the others are whole in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpo_kernels import mpo_embedding, mpo_linear, reconstruct
from mpo_kernels.cores.quantize import dequantize_interpolative
from mpo_kernels.cores.shape import leading_digit
from mpo_kernels.layers.module import merged_for

if TYPE_CHECKING:
    from mpop.models.config import ModuleSpec

# What both call the matrices of a fused layer.
_INDICES = {None: 0, "q": 0, "k": 1, "v": 2}


class Place(NamedTuple):
    """Which of the processes that share a layer this one is, from 0."""

    rank: int
    size: int

    def share(self, name: str, total: int, size: int) -> range:
        """The ``size`` of ``total`` features that this process holds; several may hold the same."""
        shares, rest = divmod(total, size)
        if rest or self.size % shares:
            raise ValueError(
                f"{name}: expected {size} features in each of {self.size} processes by the model, "
                f"got {total} in the checkpoint"
            )
        start = self.rank // (self.size // shares) * size
        return range(start, start + size)


class _Dense:
    """One matrix ``[out, in]`` of a fused layer that is dense in the checkpoint."""

    tensors = ("weight",)

    def __init__(self, name: str, place: Place, in_size: int, out_size: int) -> None:
        self.name, self.place, self.in_size, self.out_size = name, place, in_size, out_size

    def cut(self, tensor: str, weight: Tensor) -> Tensor:
        """What this process holds of a tensor of the checkpoint."""
        rows = self.place.share(self.name, weight.shape[0], self.out_size)
        columns = self.place.share(self.name, weight.shape[1], self.in_size)
        return weight[rows.start : rows.stop, columns.start : columns.stop]

    def parts(self, held: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What computes in ``dtype``, from what was cut."""
        return list(held)

    def __call__(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        return F.linear(x, parts[0])


class _Cores:
    """One matrix of the checkpoint as cores, of which this process has ranges of features."""

    def __init__(
        self, name: str, spec: ModuleSpec, inputs: Sequence[range], outputs: Sequence[range]
    ) -> None:
        self.name, self.shape, self.expected = name, spec.shape, spec.tensors
        shape, self.tensors = spec.shape, tuple(spec.tensors)
        self.store = None if spec.store is None else getattr(torch, spec.store)
        self.in_features, self.out_features = sum(map(len, inputs)), sum(map(len, outputs))
        # The tensors of which a range is held, along which dimension, and what of it.
        self.cuts = [
            (1, *self._digits(shape.in_factors, shape.in_features, inputs)),
            (2, *self._digits(shape.out_factors, shape.out_features, outputs)),
        ]

    def _digits(
        self, factors: Sequence[int], features: int, ranges: Sequence[range]
    ) -> tuple[str, list[int]]:
        """The core that has the most significant digit, and its values within the ranges."""
        core = leading_digit(factors)
        step = math.prod(factors[core + 1 :])
        digits = list(range(factors[core]))
        if sum(map(len, ranges)) < features:
            bounds = {bound for each in ranges for bound in (each.start, each.stop)}
            if any(bound % step for bound in bounds):
                parts = features // math.gcd(features, *bounds)
                raise ValueError(
                    f"{self.name}: expected factors of {features} whose first {parts} divides, "
                    f"got {tuple(factors)}: compress with tensor_parallel={parts} (mpop compress "
                    f"--tensor-parallel {parts}) or serve on fewer devices"
                )
            digits = [d for r in ranges for d in range(r.start // step, r.stop // step)]
        return self.tensors[core], digits

    def cut(self, tensor: str, core: Tensor) -> Tensor:
        """What this process holds of a tensor of the checkpoint."""
        expected = self.expected[tensor]
        if tuple(core.shape) != expected:
            raise ValueError(
                f"{self.name}.{tensor}: expected {list(expected)} by the configuration, "
                f"got {list(core.shape)} in the file"
            )
        for dim, cut, digits in self.cuts:
            if tensor == cut and len(digits) < core.shape[dim]:
                core = core.index_select(
                    dim, torch.tensor(digits, dtype=torch.int64, device=core.device)
                )
        return core

    def parts(self, held: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What computes, from what was cut: merged for one row, which takes little memory.

        Bytes are not merged, but lie as one row is read fastest.
        """
        cores, scales = self.split(list(held))
        parts = merged_for(cores, 1, self.in_features, self.out_features, self.store)
        return [*parts, *scales]

    def __call__(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        cores, scales = self.split(parts)
        return self.contract(x, cores, scales, self.in_features, self.out_features)

    def split(self, parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The cores, perhaps merged, and the scales of bytes."""
        count = len(parts) if self.store is None else self.shape.num_cores
        return parts[:count], parts[count:]

    def contract(
        self,
        x: Tensor,
        cores: list[Tensor],
        scales: list[Tensor],
        in_features: int,
        out_features: int,
    ) -> Tensor:
        """``x [..., in_features] -> [..., out_features]`` of what was split, cut perhaps."""
        if self.store is None:
            return mpo_linear(x, cores, in_features=in_features, out_features=out_features)
        operator = torch.ops.mpo_kernels.quantized_linear
        return operator(x, [core.view(self.store) for core in cores], scales, None, out_features)


class _Rows(_Cores):
    """One matrix in interpolative form, which computes as plain low rank, or dense if that is less.

    No kernel of the servers' knows the form, nor its bytes, which are saved on disk alone.
    """

    def __init__(
        self, name: str, spec: ModuleSpec, inputs: Sequence[range], outputs: Sequence[range]
    ) -> None:
        super().__init__(name, spec, inputs, outputs)
        (_, _, columns), (_, _, rows) = self.cuts
        self.saved, self.store = self.store, None  # widened when it is loaded
        self.cuts = [(1, spec.core(1), columns), (0, "order", rows)]

    def parts(self, held: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        coefficients, pivots, *scales, order = held
        if self.saved is not None:
            codes = [core.view(self.saved) for core in (coefficients, pivots)]
            coefficients, pivots = dequantize_interpolative(codes, scales, dtype)
        one = torch.eye(len(pivots), dtype=pivots.dtype, device=pivots.device)
        left = torch.cat((one, coefficients))[order]
        cores = [left[None, None], pivots[:, :, None, None]]
        if left.numel() + pivots.numel() >= self.in_features * self.out_features:
            cores = [reconstruct(cores).t()[None, :, :, None]]
        return super().parts(cores, dtype)


def _matrix(
    name: str, spec: ModuleSpec, inputs: Sequence[range], outputs: Sequence[range]
) -> _Cores:
    return (_Cores if spec.form is None else _Rows)(name, spec, inputs, outputs)


def _held_in(tensor: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of this name in a model of ``dtype``: bytes stay bytes."""
    if tensor == "order":
        return torch.int64
    if "_core_" in tensor:
        return torch.int8
    return torch.float32 if tensor.startswith("scale_") else dtype


class _Method:
    """Loads a layer's matrices and holds what computes in ``layer.parts``."""

    place: Callable[[Any], Place]  # of this process among those that share a layer

    def _expect(self, layer: Any, matrices: Sequence[_Dense | _Cores], dtype: torch.dtype) -> None:
        """Give the layer the parameters that are looked for by name; they stay empty."""
        self.matrices, self.dtype = matrices, dtype
        self.held: list[dict[str, Tensor]] = [{} for _ in matrices]

        layer.cores = nn.ParameterList()
        for tensor in dict.fromkeys(tensor for matrix in matrices for tensor in matrix.tensors):
            empty = nn.Parameter(
                torch.empty(0, dtype=_held_in(tensor, dtype), device=torch.get_default_device()),
                requires_grad=False,
            )
            empty.weight_loader = partial(self._load, tensor)  # type: ignore[attr-defined]
            if tensor.startswith("cores."):
                layer.cores.append(empty)
            else:
                layer.register_parameter(tensor, empty)

    def _load(
        self, tensor: str, like: Tensor, loaded: Tensor, shard: str | int | None = None
    ) -> None:
        index = shard if isinstance(shard, int) else _INDICES[shard]
        matrix = self.matrices[index]
        if tensor not in matrix.tensors:
            raise ValueError(f"{matrix.name}.{tensor}: not expected by the configuration")
        self.held[index][tensor] = matrix.cut(tensor, loaded).to(
            like.device, like.dtype, copy=True, memory_format=torch.contiguous_format
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.parts = nn.ModuleList()
        for matrix, held in zip(self.matrices, self.held, strict=True):
            for tensor in matrix.tensors:
                if tensor not in held:
                    raise ValueError(f"{matrix.name}.{tensor}: missing from the checkpoint")
            parts = matrix.parts([held.pop(tensor) for tensor in matrix.tensors], self.dtype)
            layer.parts.append(nn.ParameterList(nn.Parameter(p, False) for p in parts))


class LinearMethod(_Method):
    """A linear layer, or several that are fused: each with factors of its own, or dense.

    Args:
        matrices: name and shape of each fused matrix in the checkpoint, None for a dense one. A
            single one may span all that are fused.
    """

    def __init__(self, matrices: Sequence[tuple[str, ModuleSpec | None]]) -> None:
        self.fused = matrices

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **unused: Any,
    ) -> None:
        """Check that the matrices can be cut; memory is taken when they are loaded.

        Raises:
            ValueError: sizes that are not the model's, or factors that do not divide.
        """
        sizes, in_size = output_partition_sizes, input_size_per_partition
        place = self.place(layer)
        if len(self.fused) not in (1, len(sizes)):
            names = [name for name, _ in self.fused]
            raise ValueError(f"{names}: expected {len(sizes)} matrices that the model fuses")
        spans = [sizes] if len(self.fused) == 1 else [[size] for size in sizes]
        matrices: list[_Dense | _Cores] = []
        for (name, spec), span in zip(self.fused, spans, strict=True):
            if spec is None:
                matrices.append(_Dense(name, place, in_size, sum(span)))
                continue
            ins, outs = spec.shape.in_features, spec.shape.out_features
            place.share(name, outs, sum(span))
            outputs, start = [], 0
            for size in span:
                whole = size * (outs // sum(span))
                share = place.share(name, whole, size)
                outputs.append(range(start + share.start, start + share.stop))
                start += whole
            inputs = [place.share(name, ins, in_size)]
            matrices.append(_matrix(name, spec, inputs, outputs))
        self._expect(layer, matrices, params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., in] -> [..., out]``, this process's share of both."""
        outputs = [
            matrix(x, list(parts)) for matrix, parts in zip(self.matrices, layer.parts, strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias


class VocabularyMethod(_Method):
    """A word embedding and the head tied to it, or a head of its own.

    Every process holds all cores, since the vocabulary is cut at no digit, and computes its
    range of the ids.
    """

    def __init__(self, name: str, spec: ModuleSpec) -> None:
        self.name, self.spec, self.shape = name, spec, spec.shape
        self.is_table = spec.kind == "embedding"

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **unused: Any,
    ) -> None:
        """Memory is taken when the cores are loaded.

        Raises:
            ValueError: sizes that are not the model's.
        """
        found = (self.shape.in_features, self.shape.out_features)
        size = (layer.org_vocab_size, layer.embedding_dim)
        expected = size if self.is_table else size[::-1]
        if found != expected:
            raise ValueError(f"{self.name}: expected {expected} by the model, got {found}")
        whole = [[range(features)] for features in found]
        self._expect(layer, [_matrix(self.name, self.spec, *whole)], params_dtype)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """``ids [...]``, counted from the first of this process, ``-> [..., dim]``."""
        rows, columns = self.shape.in_features, self.shape.out_features
        if self.place(layer).size > 1:
            # Ids of other processes come as 0, and the layer drops their rows.
            ids = (ids + layer.shard_indices.org_vocab_start_index).clamp(max=rows - 1)
        return mpo_embedding(ids, list(layer.parts[0]), num_embeddings=rows, embedding_dim=columns)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits ``[..., ids]`` of the ids of this process, padded as the layer pads them."""
        matrix: Any = self.matrices[0]
        cores, scales = matrix.split(list(layer.parts[0]))
        if self.is_table:
            cores = [core.transpose(1, 2) for core in cores]
        factors = [core.shape[2] for core in cores]
        size, lead = layer.num_embeddings_per_partition, leading_digit(factors)
        step = math.prod(factors[lead + 1 :])
        start = self.place(layer).rank * size
        first = min(start // step, factors[lead] - 1)
        cores[lead] = cores[lead][:, :, first : -(-(start + size) // step)]
        width = math.prod(core.shape[2] for core in cores)
        y = matrix.contract(x, cores, scales, layer.embedding_dim, width)[
            ..., start - first * step :
        ]
        y = F.pad(y[..., :size], (0, max(0, size - y.shape[-1])))
        return y if bias is None else y + bias
