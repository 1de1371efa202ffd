"""What a layer of some shape costs: parameters, memory, or predicted seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpo_kernels.cores.family import OBJECTIVES, Objective
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.module import plan_for
from mpo_kernels.planning.figures import device_figures
from mpo_kernels.planning.work import Work, exposed, time_of


class LayerCost:
    """What a layer costs: its parameters, its bytes at ``rows`` rows, or its predicted seconds.

    Args:
        objective: ``"parameters"``; ``"memory"``, of the weights and the widest state between two
            of them; ``"latency"``, by the planner of the back end that would compute.
        rows: of x, for memory and latency.
        dtype, device: what the layer is served in and on, likewise.
        interpolative: plain low rank as :class:`mpo_kernels.InterpolativeLinear` holds it.

    Raises:
        ValueError: another objective, or no row.
    """

    def __init__(
        self,
        objective: Objective = "parameters",
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        interpolative: bool = False,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {OBJECTIVES}, got {objective!r}")
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        self.objective, self.rows, self.dtype = objective, rows, dtype
        self.device = torch.device("cpu") if device is None else device
        self.interpolative = interpolative

    def of(self, shape: MPOShape) -> float:
        """Of a layer with these cores."""
        parameters = shape.num_parameters - (shape.ranks[0] ** 2 if self.interpolative else 0)
        if self.objective == "parameters":
            return parameters
        if self.objective == "memory":
            return self.dtype.itemsize * (parameters + self.rows * _widest_state(shape))
        if self.interpolative:
            ins, outs, rank = shape.in_features, shape.out_features, shape.ranks[0]
            products = [Work(rank, self.rows, ins), Work(outs - rank, self.rows, rank)]
            # Put one beside the other, then in the order of the outputs.
            copies = Work(bytes=4 * self.rows * outs * self.dtype.itemsize, count=2)
            return self._seconds(products, parameters, ins + outs, [copies])
        cores = [torch.empty(size, dtype=self.dtype, device="meta") for size in shape.core_shapes]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        plan = plan_for(cores, self.rows, (shape.in_features, shape.out_features), like=like)
        return plan.predicted_us * 1e-6

    def of_dense(self, in_features: int, out_features: int) -> float:
        """Of the dense layer."""
        parameters = in_features * out_features
        if self.objective == "parameters":
            return parameters
        if self.objective == "memory":
            return self.dtype.itemsize * parameters
        product = Work(out_features, self.rows, in_features)
        return self._seconds([product], parameters, in_features + out_features)

    def _seconds(
        self, products: Sequence[Work], parameters: int, features: int, copies: Sequence[Work] = ()
    ) -> float:
        """Of products that move the parameters and a row's features, and of what is copied."""
        figures = device_figures(self.device, self.dtype)
        moved = self.dtype.itemsize * (parameters + self.rows * features)
        return time_of([*products, *copies], figures, exposed(moved, products, figures))


def _widest_state(shape: MPOShape) -> int:
    """Numbers a row of the widest state between two cores, from the end where that is less."""

    def widest(shape: MPOShape) -> int:
        width, most = shape.in_features, 0
        for _, i, j, bond in shape.core_shapes[:-1]:
            width = width // i * j
            most = max(most, width * bond)
        return most

    mirrored = MPOShape(shape.in_factors[::-1], shape.out_factors[::-1], shape.ranks[::-1])
    return min(widest(shape), widest(mirrored))
