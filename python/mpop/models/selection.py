"""Which matrices of a transformers model a configuration selects, and what is planned for each."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from mpo_kernels import Decomposition, MPOShape
from mpo_kernels.cores.decompose import rounded_up
from mpo_kernels.cores.stack import decompose_stack
from mpop.models.config import CompressionConfig, MatrixConfig, matches
from mpop.models.matrices import Names, dense_matrices, is_embedding, module_at, weight_of
from mpop.models.plain import check_plain, check_unwrapped
from mpop.models.subclasses import DenseExperts

# Heads of models that are their own base, as a T5ForConditionalGeneration is.
_HEADS = ("lm_head", "classifier", "score", "qa_outputs")


class MatrixPlan(NamedTuple):
    """What is to be done with one matrix."""

    names: Names
    config: MatrixConfig
    shape: MPOShape

    @property
    def least(self) -> float:
        """The compression with every bond 1."""
        return self.shape.with_ranks(1).compression

    @property
    def is_exact(self) -> bool:
        """Whether nothing of the matrix is lost."""
        is_whole = self.shape.ranks == self.shape.full_ranks
        return is_whole and self.config.compression is None and not self.config.rel_error

    def decompose(self, weight: Tensor, **moments: Tensor | None) -> Decomposition:
        """Cores for the weight ``[out, in]``, or those of experts, as planned.

        Args:
            moments: see `mpo_kernels.cores.stack.decompose_stack`.
        """
        return decompose_stack(
            weight,
            self.shape,
            rel_error=self.config.rel_error,
            compression=self.config.compression,
            **moments,
        )


def warn_uncalibrated() -> None:
    """Say what a cut that sees no data costs."""
    warnings.warn(
        "a cut without calibration keeps what the weights say, not what the model uses: a language "
        "model is ruined by it long before half is gone; give text to calibrate with "
        "(mpop compress --calibrate FILE, or mpop.text_batches for mpop.compress)",
        stacklevel=3,
    )


def select(model: PreTrainedModel, config: CompressionConfig) -> list[Names]:
    """The matrices that `config` selects.

    Raises:
        ValueError: a pattern that fits no matrix, a size that `tensor_parallel` does not divide,
            nothing to compress, no experts to share a core, adapters, or a matrix that something
            was put on, such as pruning.
    """
    check_unwrapped(model)
    candidates = dense_matrices(model)
    chosen = _included(model, candidates, config.include)
    if not config.embeddings:
        chosen = [names for names in chosen if not is_embedding(module_at(model, names[0]))]
    for pattern in config.exclude:
        check_matches("exclude", pattern, candidates)
        chosen = [names for names in chosen if not matches(pattern, names)]
    for pattern in config.overrides:
        check_matches("overrides", pattern, chosen)
    if not chosen:
        raise ValueError(f"nothing to compress in this {type(model).__name__}")
    if config.shared_core and not any(
        isinstance(module_at(model, names[0]), DenseExperts) for names in chosen
    ):
        raise ValueError(f"shared_core: expected experts, {type(model).__name__} has none to cut")
    check_plain(model, chosen)
    for names in chosen:
        out_features, in_features = weight_of(module_at(model, names[0])).shape[-2:]
        devices = devices_of(model, names, config)
        if in_features % devices or out_features % devices:
            raise ValueError(
                f"{names[0]}: expected sizes that tensor_parallel = {devices} divides, "
                f"got {in_features} × {out_features}: exclude it"
            )
    return chosen


def plan(model: PreTrainedModel, config: CompressionConfig) -> list[MatrixPlan]:
    """The matrices that `config` selects, each with its factors and ranks; all of it checked.

    Raises:
        ValueError: what `select` says, factors or ranks that do not fit a matrix's size, or a
            compression out of reach.
    """
    plans = [
        _plan_matrix(model, names, config.for_matrix(names), devices_of(model, names, config))
        for names in select(model, config)
    ]
    # The hardest first: what is told is then enough for all that have the same budget.
    hardest = max(plans, key=lambda plan: plan.least)
    for each in (hardest, *plans):
        if each.config.compression is not None and each.config.compression < each.least:
            raise ValueError(
                f"{each.names[0]}: expected a compression of at least {rounded_up(each.least)}, "
                f"got {each.config.compression}"
            )
    return plans


def _included(
    model: PreTrainedModel, candidates: list[Names], include: tuple[str, ...] | None
) -> list[Names]:
    if include is None:
        base = model.base_model
        inside = set(base.modules())
        if base is model:
            inside -= {module for name, module in model.named_children() if name in _HEADS}
        return [names for names in candidates if _holder(model, names[0]) in inside]
    for pattern in include:
        check_matches("include", pattern, candidates)
    return [names for names in candidates if any(matches(p, names) for p in include)]


def _holder(model: PreTrainedModel, name: str) -> nn.Module:
    module = module_at(model, name)
    return module.owner if isinstance(module, DenseExperts) else module


def check_matches(where: str, pattern: str, candidates: list[Names]) -> None:
    """Raise a ValueError unless the pattern fits one of the matrices."""
    if not any(matches(pattern, names) for names in candidates):
        example = f", such as {candidates[0][0]!r}" if candidates else ""
        raise ValueError(
            f"{where}: expected a pattern that fits the whole name of a matrix{example}, "
            f"got {pattern!r}, which fits none of {len(candidates)}"
        )


def devices_of(model: PreTrainedModel, names: Names, config: CompressionConfig) -> int:
    """How many devices share the matrix; each holds a whole embedding."""
    return 1 if is_embedding(module_at(model, names[0])) else config.tensor_parallel


def _plan_matrix(
    model: PreTrainedModel, names: Names, config: MatrixConfig, devices: int
) -> MatrixPlan:
    module = module_at(model, names[0])
    out_features, in_features = weight_of(module).shape[-2:]
    try:
        shape = config.shape(in_features, out_features, devices, is_embedding(module))
    except ValueError as error:
        raise ValueError(f"{names[0]}: {error}") from error
    return MatrixPlan(names, config, shape)
