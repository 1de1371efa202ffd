"""Dimension squeezing: cut the bonds that carry least, fine-tune, and go on while quality holds."""

from __future__ import annotations

import copy
import heapq
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpo_kernels import reconstruct, round_cores
from mpo_kernels.cores.fitting import weighted_spectrum
from mpo_kernels.cores.gauge import bond_maps, carried
from mpo_kernels.layers.embedding import MPOTiedLinear
from mpo_kernels.layers.module import MPOModule
from mpop.compression.calibration import Batches, Calibration, Moments
from mpop.finetuning.resuming import check_same
from mpop.models.light import count_parameters, modes_kept
from mpop.models.matrices import (
    check_no_experts,
    check_not_interpolative,
    check_own_cores,
    is_embedding,
    mpo_matrices,
    mpo_modules,
)
from mpop.models.plain import check_unwrapped

# A round that cuts less than this fraction is not tried.
_LEAST = 0.002
_MOST = 0.2
# What torch's optimizers call their moments: of gradients, and of their squares.
_FIRST = {"exp_avg", "momentum_buffer", "grad_avg"}
_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"}


class Tuner(Protocol):
    """What trains between the cuts: a `Settler`, or anything with its four members."""

    optimizer: torch.optim.Optimizer

    def __call__(self) -> float:
        """Train until the loss settles; returns it."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class SqueezeRound:
    """One cut of several bonds, what came of it, and whether it was kept.

    Attributes:
        step: from 1.
        fraction: of the parameters in cores that were to go.
        cuts: bonds that became smaller.
        estimate: root of the summed squares of the relative errors of the cut matrices, from
            their discarded singular values; with calibration, of what they do to the model's
            output.
        parameters: of the whole model after the cut.
        loss: after fine-tuning; None where it diverged.
        metric: likewise; None where that or the metric was not finite.
        kept: whether the metric was within the bound.
        seconds: of the round.
    """

    step: int
    fraction: float
    cuts: int
    estimate: float
    parameters: int
    loss: float | None
    metric: float | None
    kept: bool
    seconds: float


@dataclass(frozen=True)
class SqueezeReport:
    """Where it began, every round, and the smallest model within the bound, which is the result."""

    metric_before: float
    parameters_before: int
    metric: float
    parameters: int
    rounds: tuple[SqueezeRound, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        kept = sum(r.kept for r in self.rounds)
        return (
            f"{self.parameters_before:,} -> {self.parameters:,} parameters "
            f"({self.parameters / self.parameters_before:.1%}), metric {self.metric_before:.4f} -> "
            f"{self.metric:.4f}, {kept} of {len(self.rounds)} rounds kept"
        )


def squeeze(
    model: nn.Module,
    *,
    evaluate: Callable[[], float],
    finetune: Tuner,
    max_drop: float,
    calibration: Batches | None = None,
    max_steps: int = 50,
    step: float = 0.05,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_round: Callable[[SqueezeRound], None] | None = None,
) -> SqueezeReport:
    """Cut bonds of a compressed model while a metric stays within ``max_drop`` of where it began.

    A round takes the bonds whose next cut adds least error for a parameter, over all matrices,
    until ``step`` of the parameters in cores are gone; rounds the cores from canonical form, the
    optimizer's state going with them; fine-tunes until the loss settles; and evaluates. A round
    within the bound is kept, and the next is half as large again where it was free, up to a fifth
    of the parameters; one outside is undone, and a half as large one is tried. The paper (section
    4.3) cuts one bond a round and stops at the first drop.

    Args:
        model: with MPO modules; it ends as the smallest that was within the bound.
        evaluate: the metric of the model as it is, higher is better.
        finetune: trains it, usually lightly; see `Settler`.
        max_drop: how far the metric may fall below what it is at the start.
        calibration: batches that a model of transformers is called with, `model(**batch)`, before
            each cut: singular values count by what the model's output loses with them, and the
            cores are fitted to what their layers' outputs lose. Without it each matrix's own
            relative error counts.
        max_steps: at most this many rounds.
        step: fraction of the parameters in cores that the first round cuts, at least 0.002.
        state: a file that always holds a whole state, replaced after each round; `trace.jsonl`
            beside it has a line for each.
        resume: go on from that file, with the same result as without the interruption; from the
            beginning where there is none yet.
        settings: what the result depends on besides, JSON-like; a state of others is refused.
        on_round: told of each round as it ends.

    A round whose training diverges or whose metric is not finite is undone like one outside the
    bound.

    Raises:
        ValueError: no MPO modules, adapters, experts held as cores or matrices in interpolative
            form, no bond above 1, a bound below zero, a metric that is NaN at the start, a state
            that is there without `resume`, or one to resume that is of another model or other
            settings. The model is as it was.
    """
    check_bounds(max_drop, step, max_steps)
    check_unwrapped(model)
    check_own_cores(model)
    check_no_experts(model, "leave them dense (mpop compress --exclude '*.experts.*')")
    check_not_interpolative(model, "squeeze first, and call mpop.interpolate after it")
    modules: dict[str, Any] = dict(mpo_modules(model))
    if not modules:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    if all(rank == 1 for module in modules.values() for rank in module.shape.ranks):
        raise ValueError("nothing to squeeze: every bond is 1 already")
    if resume and state is None:
        raise ValueError("expected the state's file to resume from")
    file = None if state is None else Path(state)
    settings = {"max_drop": max_drop, "step": step, **(settings or {})}
    if calibration is not None and iter(calibration) is calibration:
        raise ValueError("expected calibration batches for every cut, as a list or DataLoader")
    Calibration(model, calibration)  # what is wrong with the batches shows before anything is cut
    run = _Run(model, modules, finetune, calibration, file, settings)
    with modes_kept(model):
        if file is not None and file.exists():
            if not resume:
                raise ValueError(f"{file} holds a squeeze: resume it, or choose another place")
            run.load()
        else:
            run.metric_before = run.metric = float(evaluate())
            if not math.isfinite(run.metric):
                raise ValueError(f"expected a finite metric, got {run.metric}")
            run.parameters_before = run.parameters = count_parameters(model).total
            run.fraction = step
            run.best = run.snapshot()  # evaluating may have drawn random numbers
        try:
            while len(run.rounds) < max_steps and run.fraction >= _LEAST:
                made = run.round(evaluate, max_drop)
                if made is None:
                    break
                if on_round is not None:
                    on_round(made)
        finally:
            run.restore(run.best)
    return SqueezeReport(
        run.metric_before, run.parameters_before, run.metric, run.parameters, tuple(run.rounds)
    )


def check_bounds(max_drop: float, step: float, max_steps: int) -> None:
    """Raise a ValueError unless `squeeze` can be called with these."""
    if not 0 <= max_drop < math.inf or not _LEAST <= step < 1 or max_steps < 1:
        raise ValueError(
            f"expected max_drop >= 0, {_LEAST} <= step < 1 and max_steps >= 1, "
            f"got {max_drop}, {step} and {max_steps}"
        )


class _Run:
    """The state of a squeeze: what was best, and what is tried next."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, MPOModule],
        tuner: Tuner,
        calibration: Batches | None,
        file: Path | None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.modules, self.tuner, self.file = model, modules, tuner, file
        self.calibration = calibration
        self.settings = settings
        self.rounds: list[SqueezeRound] = []
        self.metric_before = self.metric = self.fraction = 0.0
        self.parameters_before = self.parameters = 0
        self.best = self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        """The model's tensors and the tuner's state, copied."""
        tensors = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return {"model": tensors, "tuner": copy.deepcopy(self.tuner.state_dict())}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.model.load_state_dict(snapshot["model"])
        self.tuner.load_state_dict(copy.deepcopy(snapshot["tuner"]))

    def save(self) -> None:
        """Replace the file in one step."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f"{self.file.name}.new")
        fields = ("metric_before", "metric", "fraction", "parameters_before", "parameters")
        progress = {name: getattr(self, name) for name in fields}
        rounds = [asdict(made) for made in self.rounds]
        whole = {"progress": progress, "rounds": rounds, "settings": self.settings}
        torch.save({**self.best, **whole}, new)
        os.replace(new, self.file)
        self.write_trace()

    def write_trace(self) -> None:
        assert self.file is not None
        new = self.file.with_name("trace.jsonl.new")
        lines = (f"{json.dumps(asdict(made))}\n" for made in self.rounds)
        new.write_text("".join(lines), encoding="utf-8")
        os.replace(new, self.file.with_name("trace.jsonl"))

    def load(self) -> None:
        assert self.file is not None
        try:
            held = torch.load(self.file, weights_only=True, map_location="cpu")
            found, progress = held["settings"], held["progress"]
            rounds = [SqueezeRound(**made) for made in held["rounds"]]
        except (UnpicklingError, RuntimeError, OSError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file}: not the state of a squeeze, or damaged") from error
        check_same(self.file, found, self.settings)
        before = self.best
        try:
            self.restore({"model": held["model"], "tuner": held["tuner"]})
        except (RuntimeError, ValueError, KeyError) as error:
            self.restore(before)
            raise ValueError(f"{self.file}: the state of another model ({error})") from error
        for name, value in progress.items():
            setattr(self, name, value)
        self.rounds, self.best = rounds, self.snapshot()
        self.write_trace()  # what was stopped between the two files

    def round(self, evaluate: Callable[[], float], max_drop: float) -> SqueezeRound | None:
        """One round, None where no bond is left to cut."""
        start = time.perf_counter()
        source = Calibration(self.model, self.calibration)
        matrices, losses = mpo_matrices(self.model), {}
        for group, moments in source.groups(matrices):
            for names in group:
                losses[names[0]] = self.losses(names[0], moments.get(names))
        if not self.rounds:
            self.save()  # what is wrong with the batches has shown by now
        ranks, estimate = choose_cuts(self.modules, losses, self.fraction)
        if not ranks:
            return None
        cuts = 0
        for group, moments in source.groups(matrices):
            for names in group:
                name, module = names[0], self.modules[names[0]]
                if name not in ranks:
                    continue
                before = module.shape.ranks
                cuts += sum(a != b for a, b in zip(ranks[name], before, strict=True))
                fitting = _fitting(module, moments.get(names))
                round_trained(module, ranks[name], self.tuner.optimizer, **fitting)
        parameters = count_parameters(self.model).total
        try:
            loss: float | None = self.tuner()
            metric = float(evaluate())
        except FloatingPointError:
            loss, metric = None, math.nan
        # So that a drop of just the bound, in floating point, is within it.
        kept = math.isfinite(metric) and self.metric_before - metric <= max_drop + 1e-12
        made = SqueezeRound(
            step=len(self.rounds) + 1,
            fraction=self.fraction,
            cuts=cuts,
            estimate=estimate,
            parameters=parameters,
            loss=loss,
            metric=metric if math.isfinite(metric) else None,
            kept=kept,
            seconds=time.perf_counter() - start,
        )
        self.rounds.append(made)
        if kept:
            is_free = metric >= self.metric
            self.metric, self.parameters, self.best = metric, parameters, self.snapshot()
            if is_free:
                self.fraction = max(self.fraction, min(_MOST, 1.5 * self.fraction))
        else:
            self.restore(self.best)
            self.fraction /= 2
        self.save()
        return made

    def losses(self, name: str, moments: Moments | None) -> list[list[float]]:
        """Squared relative errors of a matrix, or what the model's output loses by them."""
        module = self.modules[name]
        squares = relative_squares(module, **_fitting(module, moments))
        whole = 1.0 if moments is None else moments.whole(_weight_of(module))
        return [[whole * square for square in bond] for bond in squares]


def choose_cuts(
    modules: Mapping[str, MPOModule],
    losses: Mapping[str, Sequence[Sequence[float]]],
    fraction: float,
) -> tuple[dict[str, tuple[int, ...]], float]:
    """The ranks after cutting the bonds that add least loss for a parameter, and that loss.

    Args:
        modules: by name.
        losses: for each bond of each module what goes with each of its singular values, largest
            first: a squared relative error.
        fraction: of the parameters in cores that are to go.

    Returns:
        Ranks of the modules that change, and the root of the sum of what goes with the cut.
    """
    ranks = {name: list(module.shape.ranks) for name, module in modules.items()}
    left = fraction * sum(module.shape.num_parameters for module in modules.values())

    def smaller(name: str, bond: int) -> int:
        # By a sixteenth at a time, so that large bonds do not take a round a rank.
        rank = ranks[name][bond]
        return rank - max(1, rank // 16)

    def price(name: str, bond: int) -> tuple[float, float, int]:
        """Loss for a parameter, loss, and parameters of the bond's next cut."""
        after = list(ranks[name])
        after[bond] = smaller(name, bond)
        shape = modules[name].shape
        saved = (
            shape.with_ranks(ranks[name]).num_parameters - shape.with_ranks(after).num_parameters
        )
        added = sum(losses[name][bond][after[bond] : ranks[name][bond]])
        return added / saved, added, saved

    queue = [
        (price(name, bond)[0], name, bond)
        for name in modules
        for bond in range(len(ranks[name]))
        if ranks[name][bond] > 1
    ]
    heapq.heapify(queue)
    changed: dict[str, tuple[int, ...]] = {}
    error = 0.0
    while queue and left > 0:
        known, name, bond = heapq.heappop(queue)
        cost, added, saved = price(name, bond)
        if cost > known:  # a neighbour was cut since, and there is less to save
            heapq.heappush(queue, (cost, name, bond))
            continue
        ranks[name][bond] = smaller(name, bond)
        left, error = left - saved, error + added
        changed[name] = tuple(ranks[name])
        if ranks[name][bond] > 1:
            heapq.heappush(queue, (price(name, bond)[0], name, bond))
    return changed, math.sqrt(error)


def relative_squares(
    module: MPOModule, second_moment: Tensor | None = None, gradient_moment: Tensor | None = None
) -> list[list[float]]:
    """λ² / Σλ² of each bond of the cores as they are now, of plain low rank under S and G if given.

    Args:
        second_moment, gradient_moment: see `mpo_kernels.decompose`.
    """
    if second_moment is not None and module.shape.is_low_rank:
        spectra = [weighted_spectrum(_weight_of(module), second_moment, gradient_moment)]
    else:
        spectra = round_cores(list(module.cores)).spectra
    squares = [spectrum.square() for spectrum in spectra]
    return [(square / square.sum().clamp(min=1e-300)).tolist() for square in squares]


def _weight_of(module: MPOModule) -> Tensor:
    """``[out, in]``, of a table the map from the vocabulary."""
    size = {"in_features": module.shape.in_features, "out_features": module.shape.out_features}
    weight = reconstruct(list(module.cores), **size)
    return weight.t() if isinstance(module, MPOTiedLinear) else weight  # whose cores are a table's


def _fitting(module: MPOModule, moments: Moments | None) -> dict[str, Tensor | None]:
    """What a linear layer's cores are fitted to; a table's are too large for it at every cut."""
    if moments is None or is_embedding(module) or isinstance(module, MPOTiedLinear):
        return {}
    return {"second_moment": moments.fit + moments.judge, "gradient_moment": moments.gradients}


def round_trained(
    module: MPOModule,
    ranks: tuple[int, ...],
    optimizer: torch.optim.Optimizer,
    second_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
) -> None:
    """Round a module's cores in place, and carry what an optimizer knows of them over.

    First moments follow the change of gauge exactly, second ones as those of independent entries.
    Of an optimizer whose moments are not known by name, what it knows of the core is dropped.

    Args:
        second_moment, gradient_moment: see `mpo_kernels.round_cores`.
    """
    old = [core.detach().clone() for core in module.cores]
    new = module.round(
        ranks=ranks, second_moment=second_moment, gradient_moment=gradient_moment
    ).cores
    maps = bond_maps(old, new, module.central)
    for k, core in enumerate(module.cores):
        known = optimizer.state.get(core, {})
        moments = {
            name: value
            for name, value in known.items()
            if isinstance(value, Tensor) and value.dim() > 0
        }
        if not moments.keys() <= _FIRST | _SECOND:
            del optimizer.state[core]
            continue
        for name, value in moments.items():
            squared = name in _SECOND
            known[name] = carried(value, maps[k], maps[k + 1], squared=squared)


def plot_trace(report: SqueezeReport, path: str | os.PathLike[str]) -> None:
    """Draw the metric against the parameters, round by round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    kept: list[tuple[int, float | None]] = [(report.parameters_before, report.metric_before)]
    kept += [(r.parameters, r.metric) for r in report.rounds if r.kept]
    undone = [(r.parameters, r.metric) for r in report.rounds if not r.kept and r.metric]
    axes.plot(*zip(*kept, strict=True), "o-", label="kept")
    if undone:
        axes.plot(*zip(*undone, strict=True), "x", color="tab:red", label="undone")
    axes.invert_xaxis()
    axes.set(xlabel="parameters", ylabel="metric")
    axes.legend()
    figure.savefig(path)
