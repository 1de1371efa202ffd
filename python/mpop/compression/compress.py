"""Replacing the matrices of a transformers model by MPOs, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpo_kernels import Decomposition
from mpo_kernels.cores.decompose import rounded_up
from mpo_kernels.cores.stack import choose_stack
from mpo_kernels.layers.cost import LayerCost
from mpop.checkpoints.quantizer import MPOQuantizer, attach
from mpop.compression.allocation import Point, allocate, curve, dense_cost
from mpop.compression.calibration import MEMORY, Batches, Calibration, Moments
from mpop.compression.permute import sort_hidden_units
from mpop.compression.report import CompressionReport, row_of
from mpop.compression.sequential import in_sequence, weight_at
from mpop.compression.work import over_processes, progress
from mpop.models.config import INTERPOLATIVE, CompressionConfig, MPOConfig
from mpop.models.left import left_dense
from mpop.models.light import count_bytes, count_parameters
from mpop.models.matrices import Names, module_at, mpo_matrices
from mpop.models.plain import check_unwrapped
from mpop.models.selection import MatrixPlan, devices_of, plan, select, warn_uncalibrated
from mpop.models.subclasses import DenseExperts
from mpop.models.swapping import densify, replace


def compress(
    model: PreTrainedModel,
    config: CompressionConfig | None = None,
    calibration: Batches | None = None,
    *,
    calibration_memory: int = MEMORY,
) -> CompressionReport:
    """Replace the matrices of a transformers model by MPOs, in place.

    Linears and Conv1Ds of the base model and the word embeddings are replaced, an output head tied
    to them as well, and the tie is kept; position and type embeddings and heads are not. Without
    calibration one dense matrix at a time is decomposed and freed, all being checked before the
    first; with it, or under one budget, none is replaced before all are fitted.

    Where `torch.distributed` is initialised, each process decomposes its share of the matrices
    and counts its own batches; all of them hold the same result.

    Args:
        model: a model of transformers, in any floating dtype, on any device.
        config: which matrices and how; default all of them, at full rank.
        calibration: batches that the model is called with, `model(**batch)`, such as `text_batches`
            makes: the cores are then fitted to what the layers' outputs lose on them, and a quarter
            of them is kept to report it (`output_error`). A cut without any warns, and so does
            one with few tokens.
        calibration_memory: bytes for second moments at a time; where that is too little for all
            matrices, the batches are passed through the model several times.

    Raises:
        TypeError: another kind of model, or a weight that is not floating-point.
        ValueError: what `plan` says; weights with NaN or Inf, or on meta; a model that is already
            compressed or quantized, or a PeftModel; a budget that cannot be met, with the least
            that can; too little calibration for a matrix. The model is as it was.
    """
    config = CompressionConfig() if config is None else config
    if not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.Module):
            check_unwrapped(model)  # says what to do with a PeftModel
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    if mpo_matrices(model) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("expected a dense model, got one that is already compressed or quantized")
    if config.shares_budget:
        selected = select(model, config)
    else:
        planned = plan(model, config)
        selected = [matrix.names for matrix in planned]
    for names in selected:
        _check_weight(model, names[0])
    before, bytes_before = count_parameters(model).total, count_bytes(model).total
    source = Calibration(model, calibration, calibration_memory)
    if calibration is None and (
        config.shares_budget or not all(matrix.is_exact for matrix in planned)
    ):
        warn_uncalibrated()
    undo: Callable[[], None] | None = None
    if config.shares_budget:
        if config.factors == "auto":
            undo = sort_hidden_units(model, selected)
        work = _fit_within(model, selected, config, source)
    else:
        work = _fit_planned(model, planned, source)
    rows, kept = [], []
    try:
        fitted: Iterable[Fitted] = progress(work, "compress: matrix", len(selected))
        if calibration is not None or config.shares_budget:
            # What is wrong with the batches may show late: nothing is replaced before all is there.
            fitted = list(fitted)
        for names, decomposition in fitted:
            if decomposition is None:
                kept.append(names)
                continue
            form = _form(model, names, config)
            rows.append(row_of(names, decomposition, form))
            replace(model, names, decomposition, form)
    finally:
        # After an interrupt too, so that the model says truthfully what it holds.
        if rows:
            attach(model)
        elif undo is not None:
            undo()
    left = left_dense(model, kept)
    unasked = [part for part in left if part.is_unasked]
    if 2 * sum(part.parameters for part in unasked) > before:
        warnings.warn(
            f"most of this {type(model).__name__} stays dense: {unasked[0].reason}, "
            f"{unasked[0].parameters / before:.0%} of it; the report lists the rest",
            stacklevel=2,
        )
    after, bytes_after = count_parameters(model).total, count_bytes(model).total
    return CompressionReport(tuple(rows), before, after, bytes_before, bytes_after, left)


def _form(model: PreTrainedModel, names: Names, config: CompressionConfig) -> str | None:
    """How a matrix is held that is cut to low rank."""
    module = module_at(model, names[0])
    is_linear = isinstance(module, nn.Linear | Conv1D)
    return INTERPOLATIVE if config.factors == INTERPOLATIVE and is_linear else None


def _shares_core(model: PreTrainedModel, names: Names, config: CompressionConfig) -> bool:
    return config.shared_core and isinstance(module_at(model, names[0]), DenseExperts)


# A matrix and what takes its place, None where it stays dense.
Fitted: TypeAlias = tuple[Names, Decomposition | None]


def _fit_planned(
    model: PreTrainedModel, matrices: list[MatrixPlan], source: Calibration
) -> Iterator[Fitted]:
    planned = {matrix.names: matrix for matrix in matrices}

    def fit(names: Names, weight: Tensor, moments: Moments | None) -> Decomposition:
        matrix = planned[names]
        if matrix.is_exact or matrix.config.rel_error:  # of the matrix, whatever it is fed
            weight = weight_at(model, names)
        return matrix.decompose(weight, **_given(moments))

    yield from in_sequence(model, source.batches, source.groups(list(planned)), fit)


def _fit_within(
    model: PreTrainedModel, selected: list[Names], config: CompressionConfig, source: Calibration
) -> Iterator[Fitted]:
    """All the matrices under one budget, each by what the model's output loses with it."""
    budget = config.compression
    assert budget is not None
    first = weight_at(model, selected[0])
    served = config.rows, first.dtype, first.device
    costs = {
        form: LayerCost(config.objective, *served, interpolative=form is not None)
        for form in (None, INTERPOLATIVE)
    }

    def cost_of(names: Names) -> LayerCost:
        return costs[_form(model, names, config)]

    def losses(moments: dict[Names, Moments], names: Names) -> list[Point]:
        is_shared = _shares_core(model, names, config)
        return curve(weight_at(model, names), moments.get(names), cost_of(names), is_shared)

    def judged() -> Iterator[tuple[Names, list[Point]]]:
        for group, moments in source.groups(selected):
            yield from over_processes(group, partial(losses, moments))

    curves = dict(progress(judged(), "compare: matrix", len(selected)))
    dense = {names: dense_cost(weight_at(model, names), cost_of(names)) for names in selected}
    whole, least = sum(dense.values()), sum(points[0].cost for points in curves.values())
    if budget * whole < least:
        raise ValueError(
            f"expected a compression of at least {rounded_up(least / whole)}, the "
            f"cheapest that {len(curves)} matrices can be in {config.objective}, got {budget:g}"
        )
    points = allocate(list(curves.values()), budget * whole)
    budgets = {names: point.cost for names, point in zip(curves, points, strict=True)}

    if all(budgets[names] >= dense[names] for names in selected):
        raise ValueError(
            f"no matrix is worth an MPO within a compression of {budget:g} in {config.objective}: "
            "expected a lower one"
        )

    def fit(names: Names, weight: Tensor, moments: Moments | None) -> Decomposition | None:
        if budgets[names] >= dense[names]:
            return None
        return choose_stack(
            weight,
            budgets[names],
            cost_of(names),
            **_given(moments),
            tensor_parallel=devices_of(model, names, config),
            shared_core=_shares_core(model, names, config),
        )

    yield from in_sequence(model, source.batches, source.groups(selected), fit)


def _given(moments: Moments | None) -> dict[str, Tensor | None]:
    """As `decompose_stack` takes them."""
    if moments is None:
        return {}
    fit, judge, gradients = moments.fit, moments.judge, moments.gradients
    return {"second_moments": fit, "gradient_moment": gradients, "judges": judge}


def _check_weight(model: PreTrainedModel, name: str) -> None:
    weight = module_at(model, name).weight
    if weight.is_meta:
        raise ValueError(f"{name}: expected a weight with values, got one on meta")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point weight, got {weight.dtype}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: expected a finite weight, got NaN or Inf in it")


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every MPO by the dense module that it stands for, in place; ties are kept.

    Returns:
        The same model, which saves as a plain transformers checkpoint.

    Raises:
        ValueError: a model without MPO modules, NaN or Inf in one, or adapters; the model is as it
            was.
    """
    densify(model)
    MPOQuantizer(MPOConfig()).remove_quantization_config(model)
    return model
