"""The operators' schemas, what computes them, their fakes, and what autocast does to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpo_kernels import backends
from mpo_kernels.cores.chain import check_cores
from mpo_kernels.planning.plan import Gradients

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
LIBRARY.define(
    "embedding(Tensor ids, Tensor[] cores, SymInt num_embeddings, SymInt embedding_dim) -> Tensor"
)
LIBRARY.define(
    "embedding_backward(Tensor grad, Tensor ids, Tensor[] cores, bool[] need_cores) -> Tensor[]"
)


def _check_operands(x: Tensor, cores: list[Tensor], bias: Tensor | None) -> None:
    dtype, device = x.dtype, x.device
    for tensor in cores if bias is None else (*cores, bias):
        if tensor.dtype != dtype or tensor.device != device:
            raise TypeError(
                f"expected cores and bias like x, {dtype} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _linear(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    _check_operands(x, cores, bias)
    return computed(x, cores, bias, out_features)


def computed(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """The operator ``linear`` after its checks of dtype and device."""
    backend = backends.selected(x)
    if x.dim() == 2:
        return backend.linear(x, cores, bias, out_features)
    y = backend.linear(x.reshape(-1, x.shape[-1]), cores, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


def _check_devices(x: Tensor, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device != x.device:
            raise TypeError(f"expected all on {x.device} like x, got a tensor on {tensor.device}")


def _quantized_linear(
    x: Tensor, cores: list[Tensor], scales: list[Tensor], bias: Tensor | None, out_features: int
) -> Tensor:
    _check_devices(x, [*cores, *scales] if bias is None else [*cores, *scales, bias])
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


def _check_table(ids: Tensor, cores: list[Tensor]) -> None:
    for core in cores:
        if core.dtype != cores[0].dtype or core.device != ids.device:
            raise TypeError(
                f"expected cores of one dtype, {cores[0].dtype}, on {ids.device} like the ids, "
                f"got {core.dtype} on {core.device}"
            )


def _check_ids(ids: Tensor, num_embeddings: int) -> None:
    if not ids.numel():
        return
    if ids.is_cuda:  # as torch's own embedding, which does not wait for the device either
        inside = (ids >= 0) & (ids < num_embeddings)
        torch._assert_async(inside.all(), f"expected ids in [0, {num_embeddings})")
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num_embeddings:
        raise IndexError(f"expected ids in [0, {num_embeddings}), got {low} … {high}")


def _embedding(ids: Tensor, cores: list[Tensor], num_embeddings: int, embedding_dim: int) -> Tensor:
    _check_table(ids, cores)
    _check_ids(ids, num_embeddings)
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


# Beside a tensor on meta an operator is not computed but described: the check is the same there.
def _fake_linear(x: Tensor, cores: list[Tensor], bias: Tensor | None, out: int) -> Tensor:
    _check_operands(x, cores, bias)
    return x.new_empty(*x.shape[:-1], out)


def _fake_quantized_linear(
    x: Tensor, cores: list[Tensor], scales: list[Tensor], bias: Tensor | None, out: int
) -> Tensor:
    _check_devices(x, [*cores, *scales] if bias is None else [*cores, *scales, bias])
    return x.new_empty(*x.shape[:-1], out)


def _fake_linear_backward(
    grad: Tensor, x: Tensor, cores: list[Tensor], need_x: bool, need_cores: list[bool]
) -> list[Tensor]:
    return _empty_like_wanted([x, *cores], [need_x, *need_cores])


def _fake_embedding(ids: Tensor, cores: list[Tensor], rows: int, dim: int) -> Tensor:
    _check_table(ids, cores)
    return cores[0].new_empty(*ids.shape, dim)


def _fake_embedding_backward(
    grad: Tensor, ids: Tensor, cores: list[Tensor], need_cores: list[bool]
) -> list[Tensor]:
    return _empty_like_wanted(cores, need_cores)


for name, implementation, fake in (
    ("linear", _linear, _fake_linear),
    ("quantized_linear", _quantized_linear, _fake_quantized_linear),
    ("linear_backward", _linear_backward, _fake_linear_backward),
    ("embedding", _embedding, _fake_embedding),
    ("embedding_backward", _embedding_backward, _fake_embedding_backward),
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
