"""What every kernel's launch shares: operands, precision, errors, and the sum over splits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpo_kernels.backends.triton.tiles import Strides, ceil_div


def precision(dtype: torch.dtype) -> str:
    """``"tf32"`` for fp32 operands where torch's own products may use it, else ``"ieee"``."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def readable(part: Tensor, *block: int) -> Tensor:
    """``part [in, out, D]``, copied only where tiles of ``block`` would read it in short runs."""
    runs = [
        min(size, wanted)
        for size, wanted, stride in zip(part.shape, block, part.stride(), strict=True)
        if stride == 1
    ]
    return part if max(runs, default=0) * part.element_size() >= 16 else part.contiguous()


def strides_of(a: Tensor, b: Tensor | None = None) -> Strides:
    """Strides of one or two parts ``[in, out, D]``."""
    return Strides(*a.stride(), *(b.stride() if b is not None else (0, 0, 0)))


def launch(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any) -> None:
    """Run ``kernel`` on the device of its first argument.

    Raises:
        RuntimeError: the launch failed; the text names the kernel, its grid and its tile.
    """
    device = args[0].device
    try:
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            kernel[grid](*args, num_warps=tile.num_warps, num_stages=tile.num_stages)
        else:
            with torch.cuda.device(device):
                kernel[grid](*args, num_warps=tile.num_warps, num_stages=tile.num_stages)
    except Exception as error:
        inputs = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
        name = getattr(kernel, "__name__", kernel)
        raise RuntimeError(f"{name} failed on grid {grid}, inputs {inputs}: {error}") from error


class SumTile(NamedTuple):
    """Elements of a program."""

    block: int = 1024
    num_warps: int = 4
    num_stages: int = 1


@triton.jit(do_not_specialize=["size", "splits", "width"])
def sum_kernel(p_splits, p_bias, p_out, size, splits, width, T: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * T.block + tl.arange(0, T.block)
    mask = o < size
    total = tl.full((T.block,), 0.0, tl.float32)
    for _ in range(0, splits):
        total += tl.load(p_splits + o, mask=mask, other=0.0)
        p_splits += size
    if p_bias is not None:
        total += tl.load(p_bias + o % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=mask)


def sum_splits(splits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``out = splits.sum(0) + bias``, ``splits [n, *out.shape]`` in fp32, in a fixed order."""
    tile = SumTile()
    launch(
        sum_kernel,
        (ceil_div(out.numel(), tile.block),),
        tile,
        splits,
        bias,
        out,
        out.numel(),
        splits.shape[0],
        out.shape[-1],
        tile,
    )
    return out
