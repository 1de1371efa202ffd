"""Shapes, generators and tolerances that the tests and the benchmark share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_kernels.cores.chain import merge_cores
from mpo_kernels.cores.shape import MPOShape

# Odd on purpose: primes, ones, padding on either side, bonds of one, one core, many cores.
ODD_SHAPES = (
    MPOShape((7,), (5,)),
    MPOShape((3, 5), (4, 2), 3),
    MPOShape((1, 13), (11, 1), 4),
    MPOShape((13, 1), (1, 11), 4),
    MPOShape((2, 3, 5), (3, 1, 4), (2, 7)),
    MPOShape((5, 2, 3), (2, 6, 3), in_features=29, out_features=31),
    MPOShape((3, 4, 4), (2, 5, 4), (4, 9), in_features=41, out_features=37),
    MPOShape((2, 2, 3, 2, 2), (2, 3, 2, 1, 2)),
    MPOShape((2, 1, 2, 3, 1, 2), (1, 3, 2, 1, 2, 1), 1),
)


def random_cores(
    shape: MPOShape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Normal cores whose product has entries of variance 1 / in_features."""
    variance = 1 / shape.in_features
    for rank in shape.ranks:
        variance /= rank
    scale = variance ** (0.5 / shape.num_cores)
    return [
        (torch.randn(size, dtype=torch.float64, device="cpu", generator=generator) * scale).to(
            device, dtype
        )
        for size in shape.core_shapes
    ]


def dense_linear(
    x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, shape: MPOShape
) -> Tensor:
    """The oracle: W formed by plain torch with autograd, then ``F.linear``."""
    weight = merge_cores(cores)[0, : shape.in_features, : shape.out_features, 0].t()
    return F.linear(x, weight, bias)


@torch.no_grad()
def relative_error(got: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """‖got − exact‖ / ‖scale‖ in fp64, by default of ``exact``; NaN where ``got`` has one.

    With the result for the inputs' absolute values as ``scale``, cancellation does not count.
    """
    exact = exact.double()
    norm = torch.linalg.norm(exact if scale is None else scale.double())
    return float(torch.linalg.norm(got.double() - exact) / norm.clamp_min(1e-300))


def tolerance(reference_error: float, dtype: torch.dtype, num_cores: int) -> float:
    """Twice the error of torch's own, or of one rounding (half a unit) a core and of the sum."""
    return 2 * max(reference_error, (num_cores + 1) * torch.finfo(dtype).eps / 2)


class HostTransfers(TorchDispatchMode):
    """Notes what moves values between a device and its host, which no CUDA graph holds.

    CPU tensors stand for a device's, whose values are read by an operator, by `tolist` or `numpy`
    in a way that only the meta device refuses.

    Attributes:
        names: of the operators, in order.
    """

    # What gives a number or a size that depends on values, or makes a tensor of the host's.
    OPERATORS = (
        *("_local_scalar_dense", "equal", "is_nonzero", "lift_fresh", "masked_select", "nonzero"),
        *("_unique", "_unique2", "unique_consecutive", "unique_dim"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        # A mask that selects is looked for where it holds.
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.OPERATORS or masks:
            self.names.append(name)
        return func(*args, **kwargs)
