"""Layers for light fine-tuning whose frozen centre takes 8 or 4 bits a number.

The centre is never whole in the dtype of x: a contraction is linear in it, so it is summed over
panels, slices of one of its bonds, each dequantised, used and dropped, in backward again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpo_kernels.cores.chain import check_finite
from mpo_kernels.layers.embedding import MPOEmbedding
from mpo_kernels.layers.linear import MPOLinear
from mpo_kernels.layers.module import MPOModule
from mpo_kernels.layers.unformed import UnformedLayer, as_it_lay
from mpo_kernels.ops.autograd import writable
from mpo_kernels.ops.functional import check_ids, check_input

# Numbers that share a scale, and numbers of a panel.
BLOCK = 64
PANEL = 2**18

# Quantiles of a normal distribution scaled to [−1, 1]: Dettmers et al., "QLoRA", 2023, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_rows(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of each row in blocks of 64, and what each block was divided by, its largest number.

    Args:
        matrix: ``[rows, columns]``, floating.
        bits: 8, of even steps; or 4, the nearest of `NF4`, two to a byte.

    Returns:
        Codes, int8 ``[rows, padded]`` or uint8 ``[rows, padded / 2]``, and fp32
        ``[rows, padded / 64]``.
    """
    rows, columns = matrix.shape
    blocks = nn.functional.pad(matrix.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scales = blocks.abs().amax(2)
    unit = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    if bits == 8:
        return (127 * unit).round().to(torch.int8).view(rows, -1), scales
    middles = torch.tensor(
        [(a + b) / 2 for a, b in pairwise(NF4)], dtype=torch.float32, device=unit.device
    )
    codes = torch.bucketize(unit.contiguous(), middles).to(torch.uint8).view(rows, -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


def nf4_on(device: torch.device) -> Tensor:
    """`NF4` in fp32 ``[16]``, copied from the host."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def dequantize_rows(
    codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """``[rows, columns]`` of the codes and scales of :func:`quantize_rows`.

    ``table`` is :func:`nf4_on` their device, where it was made already.
    """
    rows = len(codes)
    if codes.dtype == torch.int8:
        unit = codes.float() / 127
    else:
        table = nf4_on(codes.device) if table is None else table
        unit = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), 2)
    blocks = unit.view(rows, -1, BLOCK) * scales[..., None]
    return blocks.view(rows, -1)[:, :columns].to(dtype)


class _Panels(torch.autograd.Function):
    """The operator ``kind`` of x (or ids), summed over panels of the centre."""

    @staticmethod
    def forward(ctx: Any, layer: BlockwiseLayer, x: Tensor, *auxiliary: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *auxiliary)
        y: Tensor | None = None
        for _, cores in layer.panels(auxiliary):
            part = layer.operator(x, cores)
            y = part if y is None else y.add_(part)
        assert y is not None
        return writable(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        layer, (x, *auxiliary) = ctx.layer, ctx.saved_tensors
        _, need_x, *needs = ctx.needs_input_grad
        dx: Tensor | None = None
        sums = [
            torch.zeros_like(core) if need else None
            for core, need in zip(auxiliary, needs, strict=True)
        ]
        all_needs = [*needs[: layer.central], False, *needs[layer.central :]]
        for part, cores in layer.panels(auxiliary):
            formed = iter(layer.backward_operator(grad, x, cores, need_x, all_needs))
            if need_x:
                dx = next(formed) if dx is None else dx.add_(next(formed))
            for k, total in enumerate(sums):
                if total is not None:
                    of_panel = total[layer.slices(k, part)]
                    of_panel.add_(next(formed))
        return None, dx, *sums


class BlockwiseLayer(UnformedLayer, ABC):
    """An MPO layer whose centre is frozen in 8 or 4 bits; the other cores and the bias train.

    Attributes:
        auxiliary: ParameterList of the other cores, in order.
        codes, scales: of the centre; see :func:`quantize_rows`. A row is a slice of the bond
            towards its neighbour on the left (on the right where it is the first core).

    Args:
        layer: at least two cores; its parameters are taken over, not copied.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, one core, or NaN or Inf in the centre.
    """

    def __init__(self, layer: MPOModule, bits: int) -> None:
        super().__init__()
        if type(bits) is not int or bits not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
        if len(layer.cores) < 2:
            raise ValueError("expected a layer of two cores or more, got one")
        self.bits, self.central, self.shape = bits, layer.central, layer.shape
        check_finite([layer.cores[self.central]])
        self.auxiliary = nn.ParameterList(
            core for k, core in enumerate(layer.cores) if k != self.central
        )
        centre = layer.cores[self.central].detach()
        codes, scales = quantize_rows(self._as_rows(centre), bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.codes: Tensor
        self.scales: Tensor
        # Asked here: what a shape computes when first asked, compiled code cannot.
        self._size, self._numbers = tuple(centre.shape), self.shape.num_parameters
        # Made once: a CUDA graph takes no copies from the host.
        table = nf4_on(codes.device) if bits == 4 else None
        self.register_buffer("table", table, persistent=False)
        self.table: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        bits = self.scales.view(torch.int32)  # which no cast of a module touches
        super()._apply(lambda tensor: as_it_lay(fn(tensor), tensor), recurse)
        self.scales = fn(bits).view(torch.float32)
        if self.table is not None:
            self.table = nf4_on(self.codes.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A model is saved with plain layers, and a Trainer that resumes loads such a state.
        names = [f"{prefix}cores.{k}" for k in range(self.shape.num_cores)]
        if all(name in state_dict for name in names):
            cores = [state_dict.pop(name) for name in names]
            centre = cores.pop(self.central)
            if centre.shape == self._size:
                codes, scales = quantize_rows(self._as_rows(centre), self.bits)
                state_dict |= {f"{prefix}codes": codes, f"{prefix}scales": scales}
            state_dict |= {f"{prefix}auxiliary.{k}": core for k, core in enumerate(cores)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _as_rows(self, centre: Tensor) -> Tensor:
        if self.central == 0:
            centre = centre.movedim(3, 0)
        return centre.reshape(len(centre), -1)

    def _from_rows(self, rows: Tensor) -> Tensor:
        d, i, j, r = self._size
        if self.central == 0:
            return rows.view(-1, d, i, j).movedim(0, 3)
        return rows.view(-1, i, j, r)

    def slices(self, k: int, part: slice) -> tuple[slice, ...]:
        """Of auxiliary core k, what stands beside a panel."""
        whole = slice(None)
        if self.central == 0:
            return (part,) if k == 0 else (whole,)
        return (whole, whole, whole, part) if k == self.central - 1 else (whole,)

    def centre(self, part: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """The centre that the codes stand for, or a panel of it."""
        width = math.prod(self._size) // len(self.codes)
        codes, scales = self.codes[part], self.scales[part]
        return self._from_rows(dequantize_rows(codes, scales, width, dtype, self.table))

    def panels(self, auxiliary: tuple[Tensor, ...]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Slices of a bond, and the cores of each."""
        rows = len(self.codes)
        width = max(1, self._numbers // rows)
        step = max(1, min(rows, PANEL // width))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            cores = [core[self.slices(k, part)] for k, core in enumerate(auxiliary)]
            cores.insert(self.central, self.centre(part, auxiliary[0].dtype))
            yield part, cores

    @abstractmethod
    def operator(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """Of x (or ids) with the cores of a panel."""

    @abstractmethod
    def backward_operator(
        self, grad: Tensor, x: Tensor, cores: list[Tensor], need_x: bool, needs: list[bool]
    ) -> list[Tensor]:
        """The gradients asked for, x's first."""

    @torch.no_grad()
    def _give_back(self, layer: MPOModule) -> None:
        """The parameters, and a centre with the values of the codes, to a layer of this shape."""
        cores = list(self.auxiliary)
        dtype = cores[0].dtype
        centre = nn.Parameter(self.centre(dtype=dtype).contiguous(), requires_grad=False)
        cores.insert(self.central, centre)
        layer.cores = nn.ParameterList(cores)
        layer.train(self.training)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, central={self.central}, bits={self.bits}"


class BlockwiseLinear(BlockwiseLayer):
    """:class:`MPOLinear` with a quantised centre: ``[..., in_features] -> [..., out_features]``."""

    def __init__(self, layer: MPOLinear, bits: int) -> None:
        super().__init__(layer, bits)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    def _unformed(self) -> tuple[tuple[int, int], Sequence[Tensor]]:
        return (self.out_features, self.in_features), list(self.auxiliary)

    def operator(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        return torch.ops.mpo_kernels.linear(x, cores, None, self.out_features)

    def backward_operator(
        self, grad: Tensor, x: Tensor, cores: list[Tensor], need_x: bool, needs: list[bool]
    ) -> list[Tensor]:
        return torch.ops.mpo_kernels.linear_backward(grad, x, cores, need_x, needs)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.is_nested:
            return self._of(x, 1)
        check_input(x, self.in_features)
        auxiliary, kind = list(self.auxiliary), x.device.type
        casts = torch.amp.is_autocast_available(kind)
        if casts and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            # As autocast would above autograd, so that backward sees what forward saw.
            x, *auxiliary = (t.to(torch.get_autocast_dtype(kind)) for t in (x, *auxiliary))
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            y = _Panels.apply(self, x, *auxiliary)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self) -> MPOLinear:
        """A plain layer with the same parameters, and a centre with the values of the codes."""
        layer = MPOLinear(self.in_features, self.out_features, self.shape, False, "meta")
        self._give_back(layer)
        layer.bias = self.bias
        return layer


class BlockwiseEmbedding(BlockwiseLayer):
    """:class:`MPOEmbedding` with a quantised centre: ids ``[...] -> [..., embedding_dim]``."""

    def __init__(self, layer: MPOEmbedding, bits: int) -> None:
        super().__init__(layer, bits)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    def _unformed(self) -> tuple[tuple[int, int], Sequence[Tensor]]:
        return (self.num_embeddings, self.embedding_dim), list(self.auxiliary)

    def operator(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        return torch.ops.mpo_kernels.embedding(x, cores, self.num_embeddings, self.embedding_dim)

    def backward_operator(
        self, grad: Tensor, x: Tensor, cores: list[Tensor], need_x: bool, needs: list[bool]
    ) -> list[Tensor]:
        return torch.ops.mpo_kernels.embedding_backward(grad, x, cores, needs)

    def forward(self, ids: Tensor) -> Tensor:
        if not isinstance(ids, Tensor) or ids.is_nested:
            return self._of(ids, 0)
        check_ids(ids)
        rows = _Panels.apply(self, ids, *self.auxiliary)
        if self.padding_idx is not None and rows.requires_grad:
            rows = torch.where((ids == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    def dequantized(self) -> MPOEmbedding:
        """A plain layer with the same parameters, and a centre with the values of the codes."""
        sizes = self.num_embeddings, self.embedding_dim
        layer = MPOEmbedding(*sizes, self.shape, self.padding_idx, device="meta")
        self._give_back(layer)
        return layer
