"""The operators ``mpo_kernels::linear`` and ``::embedding``: schemas, fakes, input checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from mpo_kernels import backends
from mpo_kernels.cores import check_cores
from mpo_kernels.plan import Gradients

# No default arguments: dispatch strips them, and needs_input_grad comes up short.
LIBRARY = torch.library.Library("mpo_kernels", "DEF")
LIBRARY.define("linear(Tensor x, Tensor[] cores, Tensor? bias, SymInt out_features) -> Tensor")
LIBRARY.define(
    "linear_backward(Tensor grad, Tensor x, Tensor[] cores, bool need_x, bool[] need_cores)"
    " -> Tensor[]"
)
LIBRARY.define(
    "quantized_linear(Tensor x, Tensor[] cores, Tensor[] scales, Tensor? bias, SymInt out_features)"
    " -> Tensor"
)
LIBRARY.define("embedding(Tensor ids, Tensor[] cores, SymInt embedding_dim) -> Tensor")
LIBRARY.define(
    "embedding_backward(Tensor grad, Tensor ids, Tensor[] cores, bool[] need_cores) -> Tensor[]"
)


def _linear(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    dtype, device = x.dtype, x.device
    for tensor in cores if bias is None else (*cores, bias):
        if tensor.dtype != dtype or tensor.device != device:
            raise TypeError(
                f"expected cores and bias like x, {dtype} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return _computed(x, cores, bias, out_features)


def _computed(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    backend = backends.selected(x)
    if x.dim() == 2:
        return backend.linear(x, cores, bias, out_features)
    y = backend.linear(x.reshape(-1, x.shape[-1]), cores, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


def _quantized_linear(
    x: Tensor, cores: list[Tensor], scales: list[Tensor], bias: Tensor | None, out_features: int
) -> Tensor:
    for tensor in (*cores, *scales) if bias is None else (*cores, *scales, bias):
        if tensor.device != x.device:
            raise TypeError(f"expected all on {x.device} like x, got a tensor on {tensor.device}")
    check_cores(cores)
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (out_features,)):
        raise TypeError(
            f"expected a bias [{out_features}] of {x.dtype}, got {list(bias.shape)} of {bias.dtype}"
        )
    bonds = [core.shape[3] for core in cores[:-1]]
    if [list(s.shape) for s in scales] != [[bond] for bond in bonds] or any(
        s.dtype != torch.float32 or not s.is_contiguous() for s in scales
    ):
        raise TypeError(f"expected contiguous fp32 scales of lengths {bonds}")
    rows = x.reshape(-1, x.shape[-1])
    y = backends.selected(x).quantized_linear(rows, cores, scales, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


def _linear_backward(
    grad: Tensor, x: Tensor, cores: list[Tensor], need_x: bool, need_cores: list[bool]
) -> list[Tensor]:
    dx, core_grads = backends.selected(x).linear_backward(
        grad.reshape(-1, grad.shape[-1]),
        x.reshape(-1, x.shape[-1]),
        cores,
        Gradients(need_x, tuple(need_cores)),
    )
    wanted = [g for g in core_grads if g is not None]
    return wanted if dx is None else [dx.view(x.shape), *wanted]


def _embedding(ids: Tensor, cores: list[Tensor], embedding_dim: int) -> Tensor:
    for core in cores:
        if core.dtype != cores[0].dtype or core.device != ids.device:
            raise TypeError(
                f"expected cores of one dtype, {cores[0].dtype}, on {ids.device} like the ids, "
                f"got {core.dtype} on {core.device}"
            )
    rows = backends.selected(cores[0]).embedding(ids.reshape(-1), cores, embedding_dim)
    return rows.view(*ids.shape, embedding_dim)


def _embedding_backward(
    grad: Tensor, ids: Tensor, cores: list[Tensor], need_cores: list[bool]
) -> list[Tensor]:
    grads = backends.selected(cores[0]).embedding_backward(
        grad.reshape(-1, grad.shape[-1]), ids.reshape(-1), cores, tuple(need_cores)
    )
    return [g for g in grads if g is not None]


def _empty_like_wanted(tensors: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, wanted, strict=True) if need]


for name, implementation, fake in (
    ("linear", _linear, lambda x, cores, bias, out: x.new_empty(*x.shape[:-1], out)),
    (
        "quantized_linear",
        _quantized_linear,
        lambda x, cores, scales, bias, out: x.new_empty(*x.shape[:-1], out),
    ),
    (
        "linear_backward",
        _linear_backward,
        lambda grad, x, cores, need_x, need_cores: _empty_like_wanted(
            [x, *cores], [need_x, *need_cores]
        ),
    ),
    ("embedding", _embedding, lambda ids, cores, dim: cores[0].new_empty(*ids.shape, dim)),
    (
        "embedding_backward",
        _embedding_backward,
        lambda grad, ids, cores, need_cores: _empty_like_wanted(cores, need_cores),
    ),
):
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mpo_kernels::{name}", fake, lib=LIBRARY)


def _autocast_to(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, list):
        return [_autocast_to(dtype, v) for v in value]
    castable = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if castable and value.dtype != torch.float64 else value


def _register_autocast(name: str, device: str, key: str, casts: bool) -> None:
    """Compute in the autocast dtype of the moment, with autocast off inside the operator."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    operator = getattr(torch.ops.mpo_kernels, name).default

    def call(*args: Any) -> Any:
        if casts:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(_autocast_to(dtype, value) for value in args)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*args)

    LIBRARY.impl(name, call, key)


for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for name in ("linear", "linear_backward", "embedding", "embedding_backward"):
        _register_autocast(name, device, key, casts=name == "linear")


def checked_features(name: str, features: int | None, product: int) -> int:
    """``features``, by default the product of the factors, which it must not pass."""
    if features is None:
        return product
    if not 1 <= features <= product:
        raise ValueError(
            f"expected 1 <= {name} <= {product}, the product of the factors, got {features}"
        )
    return features


def check_input(x: Tensor, in_features: int) -> None:
    """Raise unless ``x`` is a floating-point tensor ``[..., in_features]``."""
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point x, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"expected x [..., {in_features}], got {list(x.shape)}")


def _unobserved(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> bool:
    """Whether nothing would see the operator: no gradient, autocast, tracer, mode or subclass.

    Nor anything that the dispatcher resolves (a view negated on reading, zeros without memory) or
    the operator refuses (another dtype or device).
    """
    if (
        is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or _profiler_enabled()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    trains, dtype, device = is_grad_enabled(), x.dtype, x.device
    for t in (x, *cores) if bias is None else (x, *cores, bias):
        if (
            (type(t) is not Tensor and type(t) is not Parameter)
            or (trains and t.requires_grad)
            or t.is_neg()
            or t._is_zerotensor()
            or t.dtype != dtype
            or t.device != device
        ):
            return False
    return True


def linear(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """The operator after its checks of shape; at once where only its result can be seen.

    Dispatching to Python and back costs as much as a small layer.
    """
    if _unobserved(x, cores, bias):
        return _computed(x, cores, bias, out_features)
    return torch.ops.mpo_kernels.linear(x, cores, bias, out_features)


def mpo_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """``x · W + bias`` for the ``W [in, out]`` that ``cores`` stand for, which is never formed.

    Args:
        x: ``[..., in_features]``, any floating dtype, any strides.
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``, of x's dtype and device.
        bias: ``[out_features]``.
        in_features: true input size where the factors are padded; default ∏ i_k.
        out_features: true output size, likewise; default the bias's, or ∏ j_k.

    Returns:
        ``[..., out_features]``, contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    check_cores(cores)
    outs = math.prod([core.shape[2] for core in cores])
    if out_features is None and bias is not None and bias.dim() == 1:
        out_features = bias.shape[0]
    out_features = checked_features("out_features", out_features, outs)
    ins = math.prod([core.shape[1] for core in cores])
    check_input(x, checked_features("in_features", in_features, ins))
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"expected a bias [{out_features}], got {list(bias.shape)}")
    return linear(x, list(cores), bias, out_features)


def mpo_embedding(
    ids: Tensor,
    cores: Sequence[Tensor],
    padding_idx: int | None = None,
    *,
    num_embeddings: int | None = None,
    embedding_dim: int | None = None,
) -> Tensor:
    """Rows ``ids`` of the table ``W [num_embeddings, embedding_dim]`` that ``cores`` stand for.

    Only the rows asked for are formed, each distinct one once.

    Args:
        ids: ``[...]``, int32 or int64, in [0, num_embeddings).
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``, i over the table's rows, j over its columns.
        padding_idx: an id whose occurrences pass no gradient on.
        num_embeddings: true number of rows where the factors are padded; default ∏ i_k.
        embedding_dim: true row length, likewise; default ∏ j_k.

    Returns:
        ``[..., embedding_dim]`` in the cores' dtype.

    Raises:
        TypeError, ValueError: what was expected and what came. IndexError: an id out of range
            (on a CPU; checked there only, since elsewhere it would wait for the device).
    """
    check_cores(cores)
    ins = math.prod([core.shape[1] for core in cores])
    outs = math.prod([core.shape[2] for core in cores])
    num_embeddings = checked_features("num_embeddings", num_embeddings, ins)
    embedding_dim = checked_features("embedding_dim", embedding_dim, outs)
    return embedding(ids, cores, padding_idx, num_embeddings, embedding_dim)


def embedding(
    ids: Tensor,
    cores: Sequence[Tensor],
    padding_idx: int | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    """:func:`mpo_embedding` after its checks of shape: ids, padding, then the operator."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected int32 or int64 ids, got {ids.dtype}")
    if ids.device.type == "cpu" and not is_compiling() and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_embeddings:
            raise IndexError(f"expected ids in [0, {num_embeddings}), got {low} … {high}")
    rows = torch.ops.mpo_kernels.embedding(ids, cores, embedding_dim)
    if padding_idx is not None and rows.requires_grad:
        rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows
