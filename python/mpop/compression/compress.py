"""Replacing the matrices of a transformers model by MPOs, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mpo_kernels import Decomposition, MPOShape, decompose, reconstruct
from mpo_kernels.cores.decompose import rounded_up
from mpo_kernels.cores.family import choose, judged
from mpo_kernels.layers.cost import LayerCost
from mpop.checkpoints.quantizer import MPOQuantizer, attach
from mpop.compression.allocation import Point, allocate, curve
from mpop.compression.calibration import MEASURABLE, MEMORY, Batches, Calibration, Moments
from mpop.compression.distributed import over_processes, sum_over_processes
from mpop.compression.permute import sort_hidden_units
from mpop.compression.report import CompressionReport, row_of
from mpop.models.config import CompressionConfig, MPOConfig
from mpop.models.left import left_dense
from mpop.models.light import count_bytes, count_parameters
from mpop.models.matrices import (
    Names,
    densify,
    inputs_of,
    is_embedding,
    module_at,
    mpo_matrices,
    replace,
    weight_of,
)
from mpop.models.plain import check_unwrapped
from mpop.models.selection import MatrixPlan, devices_of, plan, select, warn_uncalibrated

# Below this many weights no progress bar is shown: it is done at once.
_QUICK = 10_000_000
# Fewer do not tell the second moments of a matrix's inputs.
_TOKENS_AN_INPUT = 10


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
    if config.factors == "auto":
        selected = select(model, config)
    else:
        planned = plan(model, config)
        selected = [matrix.names for matrix in planned]
    for names in selected:
        _check_weight(model, names[0])
    before, bytes_before = count_parameters(model).total, count_bytes(model).total
    source = Calibration(model, calibration, calibration_memory)
    if calibration is None:
        if config.factors == "auto" or not all(matrix.is_exact for matrix in planned):
            warn_uncalibrated()
    elif isinstance(calibration, Sequence):
        _warn_of_few(model, calibration, selected)
    undo: Callable[[], None] | None = None
    if config.factors == "auto":
        undo = sort_hidden_units(model, selected)
        work = _fit_within(model, selected, config, source)
    else:
        work = _fit_planned(model, planned, source)
    weights = sum(weight_of(module_at(model, names[0])).numel() for names in selected)
    is_quick = weights < _QUICK and calibration is None
    rows = []
    try:
        # `disable=None`: no bar where stderr is not a terminal.
        fitted: Iterable[Fitted] = tqdm(work, "compress", len(selected), disable=is_quick or None)
        if calibration is not None or config.factors == "auto":
            # What is wrong with the batches may show late: nothing is replaced before all is there.
            fitted = list(fitted)
        for names, decomposition in fitted:
            if decomposition is not None:
                replace(model, names, decomposition)
                rows.append(row_of(names, decomposition))
    finally:
        # After an interrupt too, so that the model says truthfully what it holds.
        if rows:
            attach(model)
        elif undo is not None:
            undo()
    left = left_dense(model)
    unasked = [part for part in left if part.is_unasked]
    if 2 * sum(part.parameters for part in unasked) > before:
        warnings.warn(
            f"most of this {type(model).__name__} stays dense: {unasked[0].reason}, "
            f"{unasked[0].parameters / before:.0%} of it; the report lists the rest",
            stacklevel=2,
        )
    after, bytes_after = count_parameters(model).total, count_bytes(model).total
    return CompressionReport(tuple(rows), before, after, bytes_before, bytes_after, left)


# A matrix and what takes its place, None where it stays dense.
Fitted: TypeAlias = tuple[Names, Decomposition | None]


def _fit_planned(
    model: PreTrainedModel, matrices: list[MatrixPlan], source: Calibration
) -> Iterator[Fitted]:
    planned = {matrix.names: matrix for matrix in matrices}

    def fitted(moments: dict[Names, Moments], names: Names) -> Decomposition:
        weight, of_inputs = weight_of(module_at(model, names[0])).detach(), moments.get(names)
        found = planned[names].decompose(weight, of_inputs and of_inputs.fit)
        return judged(found, weight, of_inputs.judge) if of_inputs else found

    for group, moments in source.groups(list(planned)):
        yield from over_processes(group, partial(fitted, moments))


def _fit_within(
    model: PreTrainedModel, selected: list[Names], config: CompressionConfig, source: Calibration
) -> Iterator[Fitted]:
    """All the matrices under one budget.

    A matrix's loss counts by what it does to the model: each is cut by itself to the budget's
    fraction, and the change of the model's output is measured.
    """

    def weight_at(names: Names) -> Tensor:
        return weight_of(module_at(model, names[0])).detach()

    budget = config.compression
    assert budget is not None
    first = weight_at(selected[0])
    cost = LayerCost(config.objective, config.rows, first.dtype, first.device)

    def losses(moments: dict[Names, Moments], names: Names) -> list[Point]:
        weight = weight_at(names)
        if not moments:
            return curve(weight, None, cost)
        out_features, in_features = weight.shape
        moment = moments[names].fit
        rank = max(1, int(budget * weight.numel() / sum(weight.shape)))
        while True:
            shape = MPOShape.low_rank(in_features, out_features, min(rank, *weight.shape))
            cut = decompose(weight, shape, second_moment=moment)
            lost = cut.output_error or 0.0
            if lost > MEASURABLE:
                new = reconstruct(cut.cores)
                is_linear = isinstance(module_at(model, names[0]), nn.Linear)
                change = source.change({f"{names[0]}.weight": new if is_linear else new.t()})
                return curve(weight, moment, cost, change / lost**2)
            if rank == 1:
                return curve(weight, moment, cost)
            rank //= 2  # a matrix of low rank loses nothing yet

    curves: dict[Names, list[Point]] = {}
    for group, moments in source.groups(selected):
        curves.update(over_processes(group, partial(losses, moments)))
    dense = {names: cost.of_dense(*weight_at(names).shape[::-1]) for names in selected}
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

    def fitted(moments: dict[Names, Moments], names: Names) -> Decomposition | None:
        if budgets[names] >= dense[names]:
            return None
        fit, judge = (moments[names].fit, moments[names].judge) if moments else (None, None)
        devices = devices_of(model, names, config)
        return choose(weight_at(names), budgets[names], cost, fit, judge, devices)

    for group, moments in source.groups(selected):
        yield from over_processes(group, partial(fitted, moments))


def _warn_of_few(
    model: PreTrainedModel, calibration: Sequence[Mapping[str, Tensor]], selected: list[Names]
) -> None:
    modules = (module_at(model, names[0]) for names in selected)
    widest = max((inputs_of(module) for module in modules if not is_embedding(module)), default=0)
    tokens = sum(next(iter(batch.values())).shape[:2].numel() for batch in calibration)
    shown = torch.tensor(tokens, dtype=torch.int64, device=model.device)
    sum_over_processes(shown)
    if shown < _TOKENS_AN_INPUT * widest:
        warnings.warn(
            f"calibration has {int(shown):,} tokens, fewer than {_TOKENS_AN_INPUT} for each of "
            f"{widest:,} inputs: what they do not show is held by shrinkage alone; more text cuts "
            "better (mpop compress --samples, --calibrate)",
            stacklevel=3,
        )


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
