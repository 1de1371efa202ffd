"""Looking at a model's matrices: factors, ranks, and how much each bond carries."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mpo_kernels import Decomposition, InterpolativeLinear, MPOExperts, MPOShape, round_cores
from mpo_kernels.cores.stack import decompose_stack
from mpop.compression.report import table
from mpop.models.config import CompressionConfig
from mpop.models.matrices import module_at, mpo_modules, parameters_of, weight_of
from mpop.models.selection import plan


@dataclass(frozen=True)
class InspectRow:
    """One matrix as an MPO.

    Attributes:
        name: of the module that holds it.
        shape: factors and ranks; for a dense matrix, those it would have at full rank.
        parameters: what the model holds for the matrix now, without a bias.
        is_dense: whether the model holds it as a dense matrix.
        entropies: of each bond, in nats; at most ln(rank).
        spectra: singular values of each bond, descending, float64; of experts, their root mean
            squares.
        experts: how many have such a matrix, 1 where it is a layer's own.
    """

    name: str
    shape: MPOShape
    parameters: int
    is_dense: bool
    entropies: tuple[float, ...]
    spectra: tuple[Tensor, ...]
    experts: int = 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary, without the spectra."""
        return {
            "name": self.name,
            "shape": self.shape.to_dict(),
            "experts": self.experts,
            "is_dense": self.is_dense,
            "parameters": self.parameters,
            "entropies": list(self.entropies),
        }


def inspect_model(
    model: PreTrainedModel, config: CompressionConfig | None = None
) -> list[InspectRow]:
    """One row a matrix of a dense or a compressed model, which is not changed.

    Args:
        model: compressed, or dense; a dense one is decomposed matrix by matrix.
        config: for a dense model, which matrices and into which factors; default as `compress`.

    Raises:
        ValueError: what `plan` says of a dense model.
    """
    return list(_rows(model, config or CompressionConfig()))


def _rows(model: PreTrainedModel, config: CompressionConfig) -> Iterator[InspectRow]:
    modules = list(mpo_modules(model))
    for name, module in modules:
        sizes = {name: getattr(module.shape, name) for name in ("in_features", "out_features")}
        plain = module.to_mpo() if isinstance(module, InterpolativeLinear) else module
        held, _ = parameters_of(module)
        try:
            if isinstance(module, MPOExperts):
                yield _row(name, held, False, decompose_stack(module.to_weight(), module.shape))
            else:
                yield _row(name, held, False, round_cores(list(plain.cores), **sizes))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not modules:
        for matrix in plan(model, config):
            weight = weight_of(module_at(model, matrix.names[0])).detach()
            yield _row(matrix.names[0], weight.numel(), True, matrix.decompose(weight))


def _row(name: str, parameters: int, is_dense: bool, decomposition: Decomposition) -> InspectRow:
    return InspectRow(
        name,
        decomposition.shape,
        parameters,
        is_dense,
        tuple(decomposition.entropies),
        tuple(spectrum.cpu() for spectrum in decomposition.spectra),
        decomposition.stacked,
    )


def format_rows(rows: Iterable[InspectRow]) -> str:
    """The rows as a table that a person can read."""
    rows = list(rows)
    columns = ("matrix", "in factors", "out factors", "ranks", "parameters", "entropy per bond")
    lines = [
        (
            row.name if row.experts == 1 else f"{row.name} × {row.experts}",
            "·".join(map(str, row.shape.in_factors)),
            "·".join(map(str, row.shape.out_factors)),
            "dense" if row.is_dense else " ".join(map(str, row.shape.ranks)),
            f"{row.parameters:,}",
            " ".join(f"{entropy:.2f}" for entropy in row.entropies),
        )
        for row in rows
    ]
    count, total = sum(row.experts for row in rows), sum(row.parameters for row in rows)
    return table(columns, lines, [(f"{count} matrices", "", "", "", f"{total:,}", "")])


def plot_spectra(
    model: PreTrainedModel, path: str | os.PathLike[str], config: CompressionConfig | None = None
) -> None:
    """Draw the singular values of the central bonds and the entropy of every bond.

    One line a matrix, one colour a role (query, feed-forward, …) throughout the layers.

    Args:
        model, config: as for `inspect_model`.
        path: of the figure; its suffix (.png, .pdf, .svg) gives the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: what `inspect_model` says, or a suffix that matplotlib does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = inspect_model(model, config)
    roles = list(dict.fromkeys(_role(row.name) for row in rows))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's state alone
    spectra, entropies = figure.subplots(1, 2)
    for row in rows:
        style = {"color": f"C{roles.index(_role(row.name)) % 10}", "alpha": 0.7, "linewidth": 1.2}
        centre = max(row.shape.central - 1, 0)
        values = row.spectra[centre]
        if values[0] > 0:
            rank = [k / len(values) for k in range(1, len(values) + 1)]
            spectra.plot(rank, values / values[0], **style)
        bonds = range(1, len(row.entropies) + 1)
        entropies.plot(bonds, row.entropies, marker="o", markersize=3, **style)
    spectra.set(
        yscale="log",
        xlabel="index / number of singular values",
        ylabel="singular value / largest",
        title="Spectrum of the central bond",
    )
    most_bonds = max(len(row.entropies) for row in rows)
    entropies.set(
        xticks=range(1, most_bonds + 1), xlabel="bond", ylabel="nats", title="Entanglement entropy"
    )
    for axes in (spectra, entropies):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for k, role in enumerate(roles):
        entropies.plot([], [], color=f"C{k % 10}", label=role)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(os.fspath(path), dpi=150)


def _role(name: str) -> str:
    """The name without what comes before the layer's number: `attention.self.query`."""
    parts = name.split(".")
    numbers = [k for k, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts[-2:])
