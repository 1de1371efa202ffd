"""The numbers of one case, the fp64 dense answers to it, and one way's step over it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.layer.measure import Memory, peak_bytes, saved_bytes
from bench.layer.ways import Way, dense_weight
from mpo_kernels import MPOLinear, MPOShape

# Relative Frobenius error against fp64 above which a way is wrong.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rows that are checked; every row goes through the way.
_CHECKED_ROWS = 4


class Problem:
    """Cores, bias, ``x [rows, in]`` and ``dy [rows, out]``, the same at every run.

    Entries of W and of the bias are as ``nn.Linear`` starts them.
    """

    def __init__(
        self, shape: MPOShape, rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        layer = MPOLinear(shape.in_features, shape.out_features, shape)
        self.shape, self.rows, self.device, self.dtype = shape, rows, device, dtype
        self.cores = [core.detach().to(device, dtype) for core in layer.cores]
        self.bias = layer.bias.detach().to(device, dtype)
        self.x = torch.randn(rows, shape.in_features).to(device, dtype)
        self.dy = torch.randn(rows, shape.out_features).to(device, dtype)

    def twin(self) -> Problem:
        """The same with cores of its own, as another layer of a model has."""
        other = copy.copy(self)
        other.cores = [core.clone() for core in self.cores]
        return other

    @cached_property
    def _checked(self) -> Tensor:
        count = min(self.rows, _CHECKED_ROWS)
        return torch.linspace(0, self.rows - 1, count, device=self.device).long()

    @cached_property
    def sparse_dy(self) -> Tensor:
        """``dy`` in the checked rows and zero elsewhere: every gradient then needs only those."""
        dy = torch.zeros_like(self.dy)
        dy[self._checked] = self.dy[self._checked]
        return dy

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
        """y, dx of the checked rows; gradients of the cores, of W ``[out, in]``, of the bias."""
        exact = [t.double().requires_grad_() for t in (self.x[self._checked], self.bias)]
        cores = [core.double().requires_grad_() for core in self.cores]
        weight = dense_weight(cores, self.shape)
        y = F.linear(exact[0], weight, exact[1])
        dx, bias, weight, *of_cores = torch.autograd.grad(
            y, [*exact, weight, *cores], self.dy[self._checked].double()
        )
        return y.detach(), dx, of_cores, weight, bias

    def forward_error(self, y: Tensor) -> float:
        """Relative error of ``y [rows, out]`` in the checked rows."""
        return _relative_error(y[self._checked], self._reference[0])

    def backward_error(self, way: Way, module: nn.Module, grads: Sequence[Tensor]) -> float:
        """The largest relative error among the gradients that ``sparse_dy`` gives.

        Args:
            grads: of x and of the parameters of ``module`` that train, in their order.
        """
        _, dx, of_cores, of_weight, of_bias = self._reference
        errors = [_relative_error(grads[0][self._checked], dx)]
        cores, left = iter(of_cores), iter(grads[1:])
        for parameter in module.parameters():
            if parameter.dim() == 4:
                expected = next(cores).permute(way.core_dims)
            else:
                expected = of_weight if parameter.dim() == 2 else of_bias
            if parameter.requires_grad:
                errors.append(_relative_error(next(left), expected))
        return max(errors)


class Step:
    """One way's pass over a problem, ready to be called: ``step()`` is what is timed.

    Args:
        way: built here from the problem's cores and bias.
        problem: whose x, and dy, it is called with.
        name: ``"forward"`` (without gradients), ``"forward+backward"`` (x, every core and the bias
            get theirs) or ``"light"`` (the same with the central core frozen; a way without cores
            has none and trains whole).
    """

    def __init__(self, way: Way, problem: Problem, name: str) -> None:
        self.way, self.problem, self.training = way, problem, name != "forward"
        self.module = way.build(problem.cores, problem.bias, problem.shape)
        self.module.requires_grad_(self.training)
        if name == "light" and way.is_mpo:
            cores = [p for p in self.module.parameters() if p.dim() == 4]
            cores[problem.shape.central].requires_grad_(False)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.x = problem.x.detach().requires_grad_(self.training)

    def __call__(self) -> Any:
        y = self.forward()
        return self.backward(y, self.problem.dy) if self.training else y

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return self.module(self.x)

    def backward(self, y: Tensor, dy: Tensor) -> Sequence[Tensor]:
        """Gradients of x and of what trains; nothing is added to any ``.grad``."""
        return torch.autograd.grad(y, [self.x, *self.trained], dy)

    def checked(self) -> tuple[float | None, Memory]:
        """Run once: the largest relative error (``None`` for another matrix), and the memory."""
        dy = self.problem.sparse_dy if self.training else None
        with peak_bytes(self.problem.device) as peak:
            with saved_bytes(self.module.parameters()) as saved:
                result = self.forward()
            if dy is not None:
                result = self.backward(result, dy)
        memory = Memory(peak(), *saved())
        if not self.way.same_matrix:
            return None, memory
        if self.training:
            return self.problem.backward_error(self.way, self.module, result), memory
        return self.problem.forward_error(result), memory


def _relative_error(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    return float((value.double() - expected).norm() / expected.norm())
