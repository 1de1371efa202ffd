"""The ways to compute one layer: ours, what users have today, and what else they could write.

Each way is an ``nn.Module`` built from the same cores and bias, called on ``x [rows, in]``. Core k
is ``[D_k, i_k, j_k, D_{k+1}]``; cores are the only 4-dimensional parameters, in order.
"""

from __future__ import annotations

import string
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpo_kernels import MPOLinear, MPOShape, Plan, backends, use_backend
from mpo_kernels.backends.cuda import thin
from mpo_kernels.planning.figures import default_figures

Path = list[tuple[int, ...]] | str


def dense_weight(cores: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """W ``[out, in]``, differentiable: the cores multiplied from the left, permuted once."""
    n = len(cores)
    weight = cores[0].squeeze(0)
    for core in cores[1:]:
        weight = torch.tensordot(weight, core, dims=1)  # [i_1, j_1, …, i_k, j_k, D_k]
    weight = weight.squeeze(-1).permute(*range(1, 2 * n, 2), *range(0, 2 * n, 2))
    weight = weight.reshape(-1, torch.Size(shape.in_factors).numel())
    return weight[: shape.out_features, : shape.in_features]


def equation(num_cores: int) -> str:
    """``x [z, i_1 … i_n]`` and cores to ``[z, j_1 … j_n]``; the outer bonds of 1 are dropped."""
    names = iter(string.ascii_letters)
    z, ins, outs, bonds = (
        "".join(next(names) for _ in range(n)) for n in (1, num_cores, num_cores, num_cores - 1)
    )
    cores = [
        bonds[max(k - 1, 0) : k] + ins[k] + outs[k] + bonds[k : k + 1] for k in range(num_cores)
    ]
    return ",".join([z + ins, *cores]) + "->" + z + outs


def einsum_cores(cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores as :func:`equation` wants them, without the outer bonds."""
    return [cores[0].squeeze(0), *cores[1:-1], cores[-1].squeeze(-1)]


class _Layer(nn.Module):
    """Holds the cores and pads x and crops y where the factors' products are larger.

    ``contract``: ``x [rows, i_1 … i_n] -> [rows, j_1 … j_n]``, or any view of that size.
    """

    contract: Callable[[Tensor], Tensor]

    def __init__(self, cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> None:
        super().__init__()
        self.shape = shape
        self.cores = nn.ParameterList(nn.Parameter(core) for core in cores)
        self.bias = nn.Parameter(bias)
        self.padding = torch.Size(shape.in_factors).numel() - shape.in_features

    def forward(self, x: Tensor) -> Tensor:
        if self.padding:
            x = F.pad(x, (0, self.padding))
        y = self.contract(x.view(-1, *self.shape.in_factors)).reshape(x.shape[0], -1)
        return y[:, : self.shape.out_features] + self.bias


class TensordotChain(_Layer):
    """One ``tensordot`` a core."""

    def contract(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        for core in self.cores:
            x = torch.tensordot(x, core, dims=([1, -1], [1, 0]))
        return x


class Reconstruct(_Layer):
    """W from the cores at every call, then one GEMM: what the paper's own code does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dense_weight(self.cores, self.shape), self.bias)


class OptEinsum(_Layer):
    """The optimal pairwise path for this number of rows, found once."""

    def __init__(self, cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> None:
        super().__init__(cores, bias, shape)
        self.expressions: dict[torch.Size, Callable[..., Tensor]] = {}

    def contract(self, x: Tensor) -> Tensor:
        cores = einsum_cores(self.cores)
        if x.shape not in self.expressions:
            import opt_einsum

            shapes = [x.shape, *(core.shape for core in cores)]
            self.expressions[x.shape] = opt_einsum.contract_expression(
                equation(len(cores)), *shapes, optimize="optimal"
            )
        return self.expressions[x.shape](x, *cores)


class Einsum(_Layer):
    """One ``torch.einsum``, to be compiled."""

    def __init__(self, cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> None:
        super().__init__(cores, bias, shape)
        self.equation = equation(len(cores))

    def contract(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, *einsum_cores(self.cores))


class Tltorch(_Layer):
    """TensorLy-Torch's factorised layer, padded where it cannot pad."""

    def __init__(self, cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> None:
        from tltorch import FactorizedLinear
        from tltorch.factorized_tensors.tensorized_matrices import BlockTT

        super().__init__((), bias, shape)
        factors = [nn.Parameter(core.transpose(1, 2).contiguous()) for core in cores]
        sizes = (shape.out_factors, shape.in_factors)
        self.layer = FactorizedLinear(
            shape.in_factors,
            shape.out_factors,
            bias=False,
            factorization=BlockTT(factors, sizes, (1, *shape.ranks, 1)),
            implementation="factorized",
        )

    def contract(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def _ours(cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> MPOLinear:
    layer = MPOLinear(shape.in_features, shape.out_features, shape, device="meta")
    layer.cores = nn.ParameterList(nn.Parameter(core) for core in cores)
    layer.bias = nn.Parameter(bias)
    return layer


def _laid_out(cores: Sequence[Tensor], shape: MPOShape) -> list[Tensor]:
    """The cores as thin products read them, in the order that is faster for one row."""
    figures = default_figures("cuda", torch.bfloat16, 1)
    features = (shape.in_features, shape.out_features)
    chain = thin.laid_out_chain(shape.core_shapes, 1, features, 2, 132, figures)
    return [thin.laid_out(core, chain is None or chain.from_left) for core in cores]


class OfBackend(nn.Module):
    """Ours by one back end; by the cuda one always with its own kernel."""

    def __init__(self, name: str, cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> None:
        super().__init__()
        if name == "cuda":
            cores = _laid_out(cores, shape)
        self.layer, self.algorithm = _ours(cores, bias, shape), "decode" * (name == "cuda")
        with use_backend(name):
            self.backend = backends.selected(bias)
        self.plans: dict[int, Plan] = {}

    def forward(self, x: Tensor) -> Tensor:
        layer, rows = self.layer, x.shape[0]
        cores, sizes = list(layer.cores), (layer.in_features, layer.out_features)
        if rows not in self.plans:
            plan = self.backend.plan_for(rows, x.dtype, x.device, cores, None, sizes)
            own = (p for p in plan.candidates if p.algorithm == (self.algorithm or p.algorithm))
            self.plans[rows] = next(own, plan)
        return self.backend.linear(x, cores, layer.bias, sizes[1], self.plans[rows])


def _in_bytes(
    dtype: torch.dtype, cores: Sequence[Tensor], bias: Tensor, shape: MPOShape
) -> nn.Module:
    return _ours(_laid_out(cores, shape), bias, shape).quantized(dtype)


def _dense(cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> nn.Module:
    layer = nn.Linear(shape.in_features, shape.out_features, device="meta")
    layer.weight = nn.Parameter(dense_weight(cores, shape).contiguous())
    layer.bias = nn.Parameter(bias)
    return layer


def _low_rank(cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> nn.Module:
    rank = max(1, round(shape.num_parameters / (shape.in_features + shape.out_features)))
    like: dict[str, Any] = {"device": bias.device, "dtype": bias.dtype}
    return nn.Sequential(
        nn.Linear(shape.in_features, rank, bias=False, **like),
        nn.Linear(rank, shape.out_features, **like),
    )


def _compiled(cores: Sequence[Tensor], bias: Tensor, shape: MPOShape) -> nn.Module:
    # Graphs of other cases count towards dynamo's limit, past which it silently runs eagerly.
    torch._dynamo.reset()
    return torch.compile(Einsum(cores, bias, shape), dynamic=False)


def _left_to_right(num_cores: int) -> Path:
    # x with the first core, that with the next, …: a result joins the end of the list.
    return [(0, 1), *((0, last) for last in range(num_cores - 1, 0, -1))]


def _weight_first(num_cores: int) -> Path:
    return [(1, 2), *((1, last) for last in range(num_cores - 1, 1, -1)), (0, 1)]


@dataclass(frozen=True)
class Way:
    """How one way is built, and what is known of it beforehand.

    Attributes:
        name: as reports and ``--ways`` call it.
        build: the module of (cores, bias, shape).
        path: of its pairwise products over (x, cores), for an estimate of its needs; ``None``
            where it needs no more than a few times x, y and W.
        is_mpo: works from the cores, so that their centre can be frozen.
        same_matrix: computes the cores' matrix; else it is compared by time only.
        core_dims: where it holds the dimensions of a core.
        tolerance: relative error that it may have, where that is more than the dtype's.
    """

    name: str
    build: Callable[[Sequence[Tensor], Tensor, MPOShape], nn.Module]
    path: Callable[[int], Path] | None = None
    is_mpo: bool = True
    same_matrix: bool = True
    core_dims: tuple[int, ...] = (0, 1, 2, 3)
    tolerance: float = 0.0


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("ours", _ours),
        Way("dense", _dense, is_mpo=False),
        Way("tensordot", TensordotChain, _left_to_right),
        Way("reconstruct", Reconstruct, _weight_first),
        Way("opt_einsum", OptEinsum, lambda num_cores: "optimal"),
        Way("compiled", _compiled, lambda num_cores: "auto"),
        Way("tltorch", Tltorch, lambda num_cores: "auto", core_dims=(0, 2, 1, 3)),
        Way("lowrank", _low_rank, is_mpo=False, same_matrix=False),
    )
}

# Ours by one back end, whatever the planner would take, and for serving: for decoding alone.
SERVING: dict[str, Way] = {
    way.name: way
    for way in (
        *(Way(name, partial(OfBackend, name)) for name in ("torch", "triton", "cuda")),
        *(
            Way(str(dtype).removeprefix("torch."), partial(_in_bytes, dtype), tolerance=error)
            for dtype, error in ((torch.int8, 5e-2), (torch.float8_e4m3fn, 1e-1))
        ),
    )
}
ALL_WAYS = ChainMap(SERVING, WAYS)

# What ours is held against: the ways that compute the same layer from the same cores.
OTHER_MPO_WAYS = tuple(name for name, way in WAYS.items() if way.is_mpo and name != "ours")


@dataclass(frozen=True)
class Needs:
    """What a call is expected to take: multiply-adds, and bytes beside x and the parameters."""

    macs: int
    bytes: int


@cache
def estimate(way: Way, shape: MPOShape, rows: int, itemsize: int, training: bool) -> Needs:
    """From the pairwise path: the two largest intermediates, or all of them and their gradients.

    Without opt_einsum, which finds the path, every way counts as dense.
    """
    dense = shape.in_features * shape.out_features
    times = 3 if training else 1
    if way.path is None or not find_spec("opt_einsum"):
        features = shape.in_features + shape.out_features
        return Needs(times * rows * dense, 2 * itemsize * (rows * features + dense))
    import opt_einsum

    cores = [list(size) for size in shape.core_shapes]
    cores[0], cores[-1] = cores[0][1:], cores[-1][:-1]
    _, path = opt_einsum.contract_path(
        equation(shape.num_cores),
        (rows, *shape.in_factors),
        *cores,
        shapes=True,
        optimize=way.path(shape.num_cores),
    )
    held = 2 * (sum(path.size_list) if training else max(path.size_list))
    return Needs(times * int(path.opt_cost) // 2, held * itemsize)
