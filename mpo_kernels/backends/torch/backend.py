"""The torch back end: both contractions in library GEMMs, on any device and in any dtype.

It is the base of the others, which override what they compute faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_kernels.backends.torch import chain, gather, panels
from mpo_kernels.backends.torch.merging import merge
from mpo_kernels.cores.quantize import LARGEST, dequantize
from mpo_kernels.planning.candidates import plan_library, widened
from mpo_kernels.planning.figures import device_figures
from mpo_kernels.planning.plan import Call, Gradients, Plan, features_of, shapes_of

ALGORITHMS = {"chain": chain, "panels": panels}


class TorchBackend:
    """What computes the operators, from ``x [rows, in]`` and cores, never the dense weight.

    Backward recomputes what it needs from x and the cores. A plan says how; where none is given the
    fastest is taken.
    """

    def plan_for(
        self,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        cores: Sequence[Tensor],
        gradients: Gradients | None = None,
        features: tuple[int, int] | None = None,
    ) -> Plan:
        """The plan for ``x [rows, in]``, forward or (with ``gradients``) backward.

        ``features`` are the true in and out of the layer, by default those of the factors. Cores of
        one byte an element are multiplied by x of this dtype, forward only.
        """
        shapes = shapes_of(cores)
        call = Call(shapes, features or features_of(shapes), rows, dtype, gradients)
        plan = self.quantized_plan if cores[0].dtype in LARGEST else self.plan
        return plan(call, device, cores)

    def plan(self, call: Call, device: torch.device, cores: Sequence[Tensor]) -> Plan:
        """The plan for a call on a device; how the cores lie matters to kernels alone."""
        return plan_library(call, device_figures(device, call.dtype))

    def quantized_plan(self, call: Call, device: torch.device, cores: Sequence[Tensor]) -> Plan:
        """:meth:`plan` of :meth:`quantized_linear`."""
        figures = device_figures(device, call.dtype)
        return widened(self.plan(call, device, ()), call.shapes, figures)

    def served(self, cores: Sequence[Tensor], rows: int, features: tuple[int, int]) -> list[Tensor]:
        """Copies of the parts that ``rows`` rows are computed with, as they are read fastest.

        Cores in bytes are not merged: their scales are of the bonds between.
        """
        if cores[0].dtype in LARGEST:
            return [core.clone(memory_format=torch.contiguous_format) for core in cores]
        split = self.plan_for(rows, cores[0].dtype, cores[0].device, cores, None, features).split
        return [part.clone(memory_format=torch.contiguous_format) for part in merge(cores, split)]

    def linear(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        bias: Tensor | None,
        out_features: int,
        plan: Plan | None = None,
    ) -> Tensor:
        """``y [rows, out_features]`` of ``x [rows, in]``, all of one dtype."""
        rows, features = x.shape[0], (x.shape[1], out_features)
        if rows == 0:
            return x.new_empty(0, out_features)
        plan = plan or self.plan_for(rows, x.dtype, x.device, cores, None, features)
        return self.contract(plan, x, cores, bias, out_features)

    def contract(
        self, plan: Plan, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, out_features: int
    ) -> Tensor:
        """:meth:`linear` of at least one row as planned."""
        y = x.new_empty(x.shape[0], out_features)
        ALGORITHMS[plan.algorithm].forward(x, cores, bias, y, plan)
        return y

    def quantized_linear(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        scales: Sequence[Tensor],
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        """:meth:`linear` with cores of one byte an element; see ``cores/quantize.py``.

        They are widened first, where no kernel reads the bytes.
        """
        return self.linear(x, dequantize(cores, scales, x.dtype), bias, out_features)

    def linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        cores: Sequence[Tensor],
        gradients: Gradients,
        plan: Plan | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """``dx [rows, in]`` and each core's gradient, ``None`` (not computed) where not asked."""
        rows, features = x.shape[0], (x.shape[1], grad.shape[1])
        if rows == 0:
            empty = [
                torch.zeros_like(core) if need else None
                for core, need in zip(cores, gradients.cores, strict=True)
            ]
            return (x.new_empty(x.shape) if gradients.x else None), empty
        plan = plan or self.plan_for(rows, x.dtype, x.device, cores, gradients, features)
        return self.contract_backward(plan, grad, x, cores, gradients)

    def contract_backward(
        self, plan: Plan, grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """:meth:`linear_backward` of at least one row as planned."""
        return ALGORITHMS[plan.algorithm].backward(grad, x, cores, gradients, plan)

    def embedding(self, ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
        """Rows ``[len(ids), embedding_dim]`` of the table, each distinct one formed once."""
        return gather.forward(ids, cores, embedding_dim)

    def embedding_backward(
        self, grad: Tensor, ids: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the cores from ``grad [len(ids), embedding_dim]``."""
        return gather.backward(grad, ids, cores, needs)
