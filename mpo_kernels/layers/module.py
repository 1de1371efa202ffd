"""What layers held as cores share: parameters, plans, merged parts, rounding, loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpo_kernels import backends
from mpo_kernels.cores.decompose import Decomposition, round_cores
from mpo_kernels.cores.gauge import balanced
from mpo_kernels.cores.quantize import LARGEST
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.unformed import UnformedLayer, as_it_lay
from mpo_kernels.planning.plan import Gradients, Plan


def plan_for(
    cores: Sequence[Tensor],
    rows: int,
    features: tuple[int, int],
    gradients: Gradients | None = None,
    like: Tensor | None = None,
) -> Plan:
    """The plan of the back end that computes now, for the device and dtype of ``like``.

    Args:
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``.
        rows: product of x's leading dimensions, at least 1.
        features: true in and out.
        gradients: what a backward pass must form; None for the forward pass.
        like: by default the first core, and where that is a byte an element bf16.
    """
    check_rows(rows)
    like = _like(cores) if like is None else like
    backend = backends.selected(like)
    return backend.plan_for(rows, like.dtype, like.device, cores, gradients, features)


def check_rows(rows: int) -> None:
    """Refuse what is no number of rows that there can be."""
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise TypeError(f"expected a number of rows, got {type(rows).__name__}")
    if rows < 1:
        raise ValueError(f"expected at least one row, got {rows}")


def merged_for(
    cores: Sequence[Tensor],
    rows: int,
    in_features: int,
    out_features: int,
    store: torch.dtype | None = None,
) -> list[Tensor]:
    """The cores as parts that ``rows`` rows are computed with fastest, laid out as they are read.

    Copies, for :func:`mpo_kernels.mpo_linear` with cores that do not change any more. Bytes, which
    come and go as int8 and are read as ``store``, are not merged.
    """
    check_rows(rows)
    if store is not None:
        cores = [core.view(store) for core in cores]
    with torch.no_grad():
        parts = backends.selected(_like(cores)).served(cores, rows, (in_features, out_features))
    return parts if store is None else [part.view(torch.int8) for part in parts]


def _like(cores: Sequence[Tensor]) -> Tensor:
    """Of the device and dtype that is computed in: bytes are multiplied by x in 16 bits."""
    first = cores[0]
    return first.new_empty(0, dtype=torch.bfloat16) if first.dtype in LARGEST else first


class MPOModule(UnformedLayer):
    """What layers held as cores share: parameters, freezing, rounding, loading at other ranks.

    Attributes:
        cores: ParameterList; core k is ``[D_k, i_k, j_k, D_{k+1}]``.
    """

    cores: nn.ParameterList

    def __init__(
        self, shape: MPOShape, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        if not isinstance(shape, MPOShape):
            raise TypeError(f"expected an MPOShape, got {type(shape).__name__}")
        self._factors = shape.with_ranks(None)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(core, device=device, dtype=dtype))
            for core in shape.core_shapes
        )

    @property
    def shape(self) -> MPOShape:
        """Factors, and the bonds that the cores have now."""
        return self._factors.with_ranks([core.shape[-1] for core in list(self.cores)[:-1]])

    @property
    def central(self) -> int:
        """Index of the central tensor."""
        return self._factors.central

    def _reset_cores(self, variance: float) -> None:
        """Normal cores whose product has entries of this variance."""
        shape = self.shape
        each = (variance / math.prod(shape.ranks)) ** (0.5 / shape.num_cores)
        for core in self.cores:
            if not core.is_meta:  # which would take a millisecond to change nothing
                nn.init.normal_(core, std=each)

    def freeze_central(self) -> None:
        """Train only the auxiliary cores (and the bias): no gradient of the centre is computed."""
        for k, core in enumerate(self.cores):
            core.requires_grad_(k != self.central)

    def unfreeze(self) -> None:
        """Train every core."""
        for core in self.cores:
            core.requires_grad_(True)

    def balance(self) -> None:
        """Bring the cores, in place, into the form that light fine-tuning learns best in.

        The matrix stays the same; see :func:`mpo_kernels.cores.gauge.balanced`. To be called before
        there is an optimizer, and not for layers that share a core with others.
        """
        self._replace_cores(balanced(list(self.cores), self.central))

    def _replace_cores(self, cores: Sequence[Tensor]) -> None:
        """The parameters stay the same objects."""
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter.data, parameter.grad = core.contiguous(), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: as_it_lay(fn(tensor), tensor), recurse)

    def round(
        self,
        *,
        max_rank: int | None = None,
        rel_error: float | None = None,
        ranks: Iterable[int] | None = None,
        second_moment: Tensor | None = None,
        gradient_moment: Tensor | None = None,
    ) -> Decomposition:
        """Cut the bonds in place, from canonical form; see :func:`mpo_kernels.round_cores`.

        The parameters stay the same objects, so an optimizer goes on training them; what it
        remembers of their old size must be dropped (``optimizer.state.pop(parameter)``).
        """
        rounded = round_cores(
            list(self.cores),
            max_rank=max_rank,
            rel_error=rel_error,
            ranks=ranks,
            in_features=self.shape.in_features,
            out_features=self.shape.out_features,
            second_moment=second_moment,
            gradient_moment=gradient_moment,
        )
        self._replace_cores(rounded.cores)
        return rounded

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [f"{prefix}cores.{k}" for k in range(len(self.cores))]
        found = {name: state_dict[name].contiguous() for name in names if name in state_dict}
        state_dict.update(found)  # a copy of the caller's; with `assign` they become the cores
        loaded = [tuple(core.shape) for core in found.values()]
        if len(loaded) == len(names) and loaded != [tuple(core.shape) for core in self.cores]:
            try:
                self._check_belongs(loaded)
            except ValueError as error:
                # The cores would be half loaded: refuse them all.
                error_msgs.append(f"{prefix}cores: {error}")
            else:
                for parameter, size in zip(self.cores, loaded, strict=True):
                    parameter.data, parameter.grad = parameter.data.new_empty(size), None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_belongs(self, core_shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise a ValueError unless these are the shapes of cores with this layer's factors."""
        bonds = [size[-1] for size in core_shapes[:-1] if size]
        if list(self._factors.with_ranks(bonds).core_shapes) != list(core_shapes):
            raise ValueError(
                f"expected cores with factors {self._factors.in_factors} and "
                f"{self._factors.out_factors}, got shapes {list(core_shapes)}"
            )
