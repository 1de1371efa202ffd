"""The dense weight that a layer does not have: it can be asked about, and refuses all else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from mpo_kernels.ops.functional import of_nested

# What can be answered without values.
_QUESTIONS = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.element_size),
    *(torch.numel, torch.is_floating_point, torch.is_complex, Tensor.__hash__, Tensor.get_device),
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "grad"),
            *("itemsize", "nbytes", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_mps"),
            *("is_sparse", "is_quantized", "is_nested"),
        )
    ),
}
# Another tensor's, which are told a dtype and a device.
_LIKE = {Tensor.to, Tensor.type_as}


class UnformedWeight(Tensor):
    """Size, dtype, device and ``requires_grad`` of a weight without values.

    Code of models asks ``layer.weight.dtype``; what would read or write values raises a
    NotImplementedError that names the layer.
    """

    refusal = "the weight of a layer held as cores is never formed"

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"UnformedWeight({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        asks = func in _QUESTIONS or (func in _LIKE and not isinstance(args[0], cls))
        if not asks:
            raise NotImplementedError(cls._refusal_in((args, kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def _refusal_in(cls, arguments: Any) -> str:
        return cls.refusal


class _WithoutStorage(UnformedWeight):
    """As extensions written in C++ see it too; Dynamo cannot make one."""

    layer: UnformedLayer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(cls._refusal_in((args, kwargs)))

    @classmethod
    def _refusal_in(cls, arguments: Any) -> str:
        weights = (each for each in tree_leaves(arguments) if isinstance(each, UnformedWeight))
        weight: Any = next(weights)
        return weight.layer._refusal()


def as_it_lay(moved: Tensor, tensor: Tensor) -> Tensor:
    """``moved`` with the strides of ``tensor``: a memory format is for images, not for cores."""
    if moved.stride() == tensor.stride():
        return moved
    like = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=moved.dtype, device=moved.device
    )
    return like.copy_(moved)


class UnformedLayer(nn.Module):
    """A layer that stands for a dense weight and does not hold one.

    Attributes:
        label: its name in a model, for errors.
    """

    label = ""

    @abstractmethod
    def _unformed(self) -> tuple[tuple[int, ...], Sequence[Tensor]]:
        """Size of the dense weight, and the tensors that stand for it."""

    @property
    def weight(self) -> Tensor:
        """Size, dtype, device and ``requires_grad`` of the dense weight, which is never formed.

        Its values are those of ``to_linear().weight`` or ``to_embedding().weight``.

        Raises:
            NotImplementedError: whatever is computed with it, or written to it.
        """
        size, held = self._unformed()
        if is_dynamo_compiling():
            like = next((tensor for tensor in held if tensor.requires_grad), held[0])
            return like.reshape(-1)[0].expand(size).as_subclass(UnformedWeight)
        # Not by its constructor: models ask in their forward.
        weight = Tensor._make_wrapper_subclass(
            _WithoutStorage,
            size,
            dtype=held[0].dtype,
            device=held[0].device,
            requires_grad=any(tensor.requires_grad for tensor in held),
        )
        weight.layer = self
        return weight

    def _of(self, x: Any, trailing: int) -> Any:
        """The layer of what is no plain tensor; to torch.fx it is a leaf, as torch's own are."""
        if isinstance(x, Proxy):
            tracer: Any = x.tracer
            if tracer.root is self:
                raise TypeError("a layer is a leaf to torch.fx: trace a module that holds it")
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, got {type(x).__name__}")
        return of_nested(self.forward, x, trailing)

    def _refusal(self) -> str:
        size, _ = self._unformed()
        name = f"{self.label or 'this layer'}, {type(self).__name__} {list(size)}"
        return (
            f"{name}: held as cores, it has no weight to read or write: take that of its dense "
            "form (to_linear(), to_embedding()), or exclude it from compression"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise NotImplementedError(self._refusal())
        super().__setattr__(name, value)
