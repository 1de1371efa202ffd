"""What compressing did to a model: a row a matrix, and the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mpo_kernels import Decomposition, MPOShape
from mpo_kernels.layers.cost import LayerCost
from mpop.models.left import LeftDense, describe_left
from mpop.models.matrices import Names, sizes


@dataclass(frozen=True)
class CompressionRow:
    """What became of one matrix; biases are not counted.

    Attributes:
        name: of the module that holds it, the first where several share it.
        shape: factors and ranks; of experts, of each.
        rel_error: relative Frobenius error; of experts, of all together.
        entropy: of the bonds next to the central core, the larger one, in nats; 0 of one core.
        output_error: relative error of the layer's output on calibration data that the cores were
            not fitted to; None without calibration.
        experts: how many have such a matrix, 1 where it is a layer's own.
        form: `"interpolative"` where low rank is held so; None for plain cores.
        shared: index of the core that all experts have in common; None where each has its own.
    """

    name: str
    shape: MPOShape
    rel_error: float
    entropy: float
    output_error: float | None = None
    experts: int = 1
    form: str | None = None
    shared: int | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.shape.ranks

    @property
    def parameters_before(self) -> int:
        return self.experts * self.shape.dense_parameters

    @property
    def parameters_after(self) -> int:
        cost = LayerCost(interpolative=self.form is not None)
        again = 0 if self.shared is None else math.prod(self.shape.core_shapes[self.shared])
        return self.experts * int(cost.of(self.shape)) - (self.experts - 1) * again


@dataclass(frozen=True)
class CompressionReport:
    """One row a matrix, and the whole model before and after.

    Attributes:
        bytes_before: of all tensors, as the model is saved.
        left: what stays dense, and why; most first.
    """

    rows: tuple[CompressionRow, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    left: tuple[LeftDense, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "rows": [
                {
                    "name": row.name,
                    "shape": row.shape.to_dict(),
                    "experts": row.experts,
                    "ranks": list(row.ranks),
                    "form": row.form,
                    "shared": row.shared,
                    "parameters_before": row.parameters_before,
                    "parameters_after": row.parameters_after,
                    "rel_error": row.rel_error,
                    "entropy": row.entropy,
                    "output_error": row.output_error,
                }
                for row in self.rows
            ],
            "left_dense": [part._asdict() for part in self.left],
        }

    def __str__(self) -> str:
        counts = ("matrix", "in × out", "ranks", "before", "after", "ratio")
        columns = (*counts, "entropy", "error", "output")
        lines = [
            (
                row.name,
                sizes(row.shape, row.experts),
                " ".join(map(str, row.ranks)),
                *_counts(row.parameters_before, row.parameters_after),
                f"{row.entropy:.2f}",
                f"{row.rel_error:.2g}",
                "–" if row.output_error is None else f"{row.output_error:.2g}",
            )
            for row in self.rows
        ]
        before = sum(row.parameters_before for row in self.rows)
        after = sum(row.parameters_after for row in self.rows)
        whole = {
            f"{sum(row.experts for row in self.rows)} matrices": (before, after),
            "whole model": (self.parameters_before, self.parameters_after),
            "its bytes": (self.bytes_before, self.bytes_after),
        }
        totals = [(name, "", "", *_counts(*both), "", "", "") for name, both in whole.items()]
        left = describe_left(self.left, self.parameters_before)
        return "\n".join([table(columns, lines, totals), *left])


def _counts(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.3f}"


def table(
    columns: tuple[str, ...], lines: Iterable[tuple[str, ...]], totals: Iterable[tuple[str, ...]]
) -> str:
    """Text in aligned columns, the first to the left and numbers to the right."""
    lines, totals = list(lines), list(totals)
    widths = [max(map(len, cells)) for cells in zip(columns, *lines, *totals, strict=True)]

    def text(cells: tuple[str, ...]) -> str:
        first, *rest = (
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *rest)).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(
        [text(columns), rule, *map(text, lines), *([rule] if totals else []), *map(text, totals)]
    )


def row_of(names: Names, decomposition: Decomposition, form: str | None = None) -> CompressionRow:
    """What became of the matrix that these modules hold."""
    return CompressionRow(
        names[0],
        decomposition.shape,
        decomposition.rel_error,
        central_entropy(decomposition),
        decomposition.output_error,
        decomposition.stacked,
        form,
        decomposition.shared,
    )


def central_entropy(decomposition: Decomposition) -> float:
    """The larger entropy of the bonds on the two sides of the central core, in nats; 0 of none."""
    centre = decomposition.shape.central
    return max(decomposition.entropies[max(centre - 1, 0) : centre + 1], default=0.0)
