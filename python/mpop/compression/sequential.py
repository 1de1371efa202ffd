"""Cutting a model in the order in which it computes, each matrix to what it is fed by then.

Once what is before it is cut, a matrix W is fed x̂ where the dense model feeds it x. What gives from
x̂ the outputs that W gave from x is T, to which, and not to W, it is then cut:

    ‖W x − Ŵ x̂‖ = ‖(T − Ŵ) x̂‖ but for what Ŵ has no part in,   T = W + α W (C − Ŝ) Ŝ⁻¹,

with C = E[x x̂ᵀ], Ŝ = E[x̂ x̂ᵀ] and α = 1; of few rows T is uncertain, and α between 0 and 1 is what
loses least on rows held out. Both are of two streams through the model, one dense and one cut,
which are kept before one block at a time.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpo_kernels import Decomposition
from mpo_kernels.cores.fitting import output_error, output_square, regularised, scaled, weigh
from mpo_kernels.cores.stack import reconstruct_stack
from mpop.compression.calibration import JUDGE_EVERY, Moments, PaddingMask, called, shrink
from mpop.compression.work import is_everywhere, over_processes, sum_over_processes
from mpop.models.light import modes_kept
from mpop.models.matrices import Names, module_at, turned, weight_of
from mpop.models.subclasses import DenseExperts

logger = logging.getLogger(__name__)

Batch: TypeAlias = Mapping[str, Tensor]
# So many positions are enough for the streams: ten for each input of a wide matrix.
_POSITIONS = 2**17
# What takes the place of a weight `[out, in]`, None where it stays; experts' have a dimension more.
Fit: TypeAlias = Callable[[Names, Tensor, Moments | None], Decomposition | None]


def in_sequence(
    model: PreTrainedModel,
    batches: Sequence[Batch] | None,
    groups: Iterable[tuple[Sequence[Names], Mapping[Names, Moments]]],
    fit: Fit,
) -> Iterator[tuple[Names, Decomposition | None]]:
    """Fit all the matrices, those of blocks in sequence where the model has them in a row.

    Without batches, in models whose blocks are not a chain, and outside of the blocks (embeddings,
    heads, also experts within them), to the dense model's own inputs.

    Args:
        model: dense, and as it was after each of the results.
        groups: matrices in the model's order, and moments of theirs in the dense model.

    Returns:
        Each with the errors to the dense model's weight and outputs, those of its inputs included;
        all directions of an output count alike, whatever the model notices of them.
    """

    streams = None if batches is None else Streams.through(model, batches)
    for group, moments in groups:
        if streams is None:
            yield from over_processes(group, partial(_fitted, model, None, moments, fit))
            continue
        for block, members in groupby(group, streams.block_of):
            for name, stage in streams.stages(block, list(members)):
                inputs = None if name is None else streams.inputs(name)
                work = partial(_fitted, model, inputs, moments, fit)
                for names, found in over_processes(stage, work):
                    streams.hold(names, found)
                    yield names, found


def weight_at(model: nn.Module, names: Names) -> Tensor:
    """The weight ``[out, in]`` that modules hold, or that of experts."""
    return weight_of(module_at(model, names[0])).detach()


def _fitted(
    model: nn.Module,
    inputs: Inputs | None,
    moments: Mapping[Names, Moments],
    fit: Fit,
    names: Names,
) -> Decomposition | None:
    weight, dense = weight_at(model, names), moments.get(names)
    known = None if inputs is None or dense is None else inputs.moments(dense)
    if inputs is None or known is None:
        found = fit(names, weight, dense)
        if found is None or dense is None or dense.gradients is None:
            return found
        made = _made(found, weight)
        return replace(found, output_error=output_error(weight.float(), made, dense.judge))
    found = fit(names, inputs.target(weight, known), known)
    if found is None:
        return None
    errors = inputs.errors(weight, _made(found, weight))
    return replace(found, rel_error=errors.weight, output_error=errors.output)


def _made(found: Decomposition, weight: Tensor) -> Tensor:
    """What the cores make once they are held in the weight's dtype; fp32."""
    held = [core.to(weight).float() for core in found.cores]
    return reconstruct_stack(held, found.shape)


class Errors(NamedTuple):
    """Relative, of a matrix and of what it gives."""

    weight: float
    output: float


class Inputs:
    """Sums over what a matrix is fed in the stream that is cut, x̂, and what it lacks of dense's, x.

    Of three batches in four to fit to, and of the fourth to judge by; fp32. Of x alone they would
    differ by less than their rounding where little is cut.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        def zeros() -> Tensor:
            return torch.zeros(2, size, size, dtype=torch.float32, device=device)

        self._cut, self._cross, self._lacking = zeros(), zeros(), zeros()
        self._rows = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, x: Tensor, cut: Tensor, is_judging: bool) -> None:
        """Rows ``[rows, in]`` of the same positions."""
        which, lacking = int(is_judging), x - cut
        self._cut[which].addmm_(cut.t(), cut)
        self._cross[which].addmm_(lacking.t(), cut)
        if is_judging:
            self._lacking[which].addmm_(lacking.t(), lacking)
        self._rows[which] += len(x)

    def add_other_processes(self) -> None:
        """Sums over all of them."""
        for tensor in (self._cut, self._cross, self._lacking, self._rows):
            sum_over_processes(tensor)

    def moments(self, dense: Moments) -> Moments | None:
        """Those of x̂, with the gradients of the dense model; None where nothing is left of it."""
        fit, judge, rows = self._of_cut
        if not (fit.any() and judge.any()):
            return None
        return Moments(fit, judge, rows, dense.slope, dense.gradients)

    @cached_property
    def _of_cut(self) -> tuple[Tensor, Tensor, int]:
        if not self._cut.isfinite().all():
            raise ValueError("expected finite inputs, got NaN or Inf once what is before is cut")
        fit, judge = self._cut[0].clone(), self._cut[1]
        fitted, judging = self._rows.tolist()
        if fit.any() and judge.any():
            shrink(fit, judge, fitted, judging)
        return fit, judge, fitted

    def target(self, weight: Tensor, moments: Moments) -> Tensor:
        """What is to be cut in the place of a weight ``[out, in]``."""
        work = weight.double()
        scale = moments.fit.diagonal().double().mean()
        moment = regularised(moments.fit.double())
        gained = self._cross[0].double() / scale  # C − Ŝ
        change = torch.cholesky_solve((work @ gained).t(), torch.linalg.cholesky(moment)).t()
        gradients = None if moments.gradients is None else scaled(moments.gradients).double()
        along = (weigh(self._cross[1].double(), change.t(), gradients) * work.t()).sum()
        across = output_square(change, self._cut[1].double(), gradients)
        alpha = min(max(float(along) / across, 0.0), 1.0) if across > 0 else 0.0
        return (work + alpha * change).to(weight.dtype)

    def errors(self, weight: Tensor, cut: Tensor) -> Errors:
        """Of ``cut``, fed x̂, for ``weight``, fed x."""
        work, lost = weight.double(), weight.double() - cut.double()
        norm = float(torch.linalg.vector_norm(work))

        def square(matrix: Tensor) -> float:
            """Sum of squares of ``matrix x̂ + W(x − x̂)``."""
            both = (weigh(self._cross[1].double(), matrix.t()) * work.t()).sum()
            lacking = output_square(work, self._lacking[1].double())
            return output_square(matrix, self._cut[1].double()) + 2 * float(both) + lacking

        whole, left = square(work), square(lost)
        return Errors(
            float(torch.linalg.vector_norm(lost)) / norm if norm else 0.0,
            math.sqrt(max(left, 0.0) / whole) if whole > 0 else 0.0,
        )


class Streams:
    """What two models, one dense and one cut so far, feed the block at hand, for every batch.

    The model itself runs, with the blocks before the one at hand passing their inputs on.
    """

    def __init__(self, model: Any, prefix: str, batches: Sequence[Batch]) -> None:
        self._model, self._prefix = model, f"{prefix}."
        device = next(model.parameters()).device
        rows = accumulate(max(v.shape[:2].numel() for v in b.values()) for b in batches)
        enough = max(2, sum(total < _POSITIONS for total in rows) + 1)
        self._batches = [
            {key: value.to(device) for key, value in batch.items()} for batch in batches[:enough]
        ]
        self._blocks = list(model.get_submodule(prefix))
        self._mask = PaddingMask(model)
        self._cuts: dict[Names, Tensor] = {}  # weights as modules have them, until a block is done
        self._at = 0
        self._length: int | None = None  # of the tuple that a block gives
        self._batch = 0  # that the model is called on
        # In the host's memory, by batch: what is fed to the block at hand and what it gives,
        self._dense: list[Tensor] = []
        self._dense_after: list[Tensor] = []
        self._cut: list[Tensor] = []
        # and rows that are fed to modules of it.
        self._fed: dict[str, dict[int, Tensor]] = {}

    @classmethod
    def through(cls, model: PreTrainedModel, batches: Sequence[Batch]) -> Streams | None:
        """Through the longest chain of blocks; None where blocks do more than feed the next one."""
        if model.config.is_encoder_decoder:
            return None
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in lists.items()}
        prefix = max(sizes, key=sizes.__getitem__, default=None)
        if prefix is None:
            return None
        streams = cls(model, prefix, batches)
        return streams if streams._is_chain() else None

    def _is_chain(self) -> bool:
        """Whether each is called once, in their order, with what the one before it gave.

        And gives the same again alone, with the others passing their inputs on.
        """
        given: list[tuple[nn.Module, Any, Any]] = []

        def seen(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Copies: what is written to between two blocks is another.
            given.append((block, _copy(_first(args, kwargs)), _copy(_hidden(output))))
            self._length = len(output) if isinstance(output, tuple) else None

        with ExitStack() as hooks, self._running():
            for block in self._blocks:
                handle = block.register_forward_hook(seen, with_kwargs=True)
                hooks.callback(handle.remove)
            called(self._model, self._batches[0])
        if [block for block, _, _ in given] != self._blocks:
            return False
        if any(x is None or y is None for _, x, y in given):
            return False
        if not all(torch.equal(y, x) for (_, _, y), (_, x, _) in pairwise(given)):
            return False
        try:
            return all(self._gives(at, x, y) for at, (_, x, y) in enumerate(given))
        except Exception as error:  # whatever a model raises whose blocks need the others
            logger.info("%s: blocks that need each other: %r", type(self._model).__name__, error)
            return False
        finally:
            self._at = 0

    def _gives(self, at: int, x: Tensor, y: Tensor) -> bool:
        self._at = at
        with self._running():
            again = self._run(0, x)
        return again is not None and bool((again.cpu() - y).norm() <= 1e-3 * y.norm())

    def block_of(self, names: Names) -> int | None:
        """That a matrix is in; None where it is in none, or not in one alone."""
        name, *others = names
        if others or not name.startswith(self._prefix):
            return None
        return int(name.removeprefix(self._prefix).partition(".")[0])

    def hold(self, names: Names, found: Decomposition | None) -> None:
        """In the stream that is cut this takes the place of the matrix."""
        if found is not None:
            module = module_at(self._model, names[0])
            cut = turned(module, reconstruct_stack(found.cores, found.shape))
            self._cuts[names] = cut.to(module.weight).contiguous()

    def stages(
        self, block: int | None, matrices: Sequence[Names]
    ) -> list[tuple[str | None, Sequence[Names]]]:
        """Those of a block in the order in which it computes, and a module that is fed as they are.

        With None those that are fitted to the dense model's inputs: what is outside of the blocks
        or in one that is done, experts, and what is not called just once with all positions.
        """
        if block is None or block < self._at:
            return [(None, matrices)]
        self._advance(block)
        positions = self._dense[0].shape[:-1].numel()
        fed: list[tuple[Tensor, int, list[Names]]] = []

        def see(names: Names, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x.shape[:-1].numel() != positions:
                return  # as of an expert, which gets some of them
            if not (fed and fed[-1][0] is x and fed[-1][1] == x._version):
                fed.append((x, x._version, []))
            fed[-1][2].append(names)

        with ExitStack() as hooks, self._running():
            for names in matrices:
                module = module_at(self._model, names[0])
                if not isinstance(module, DenseExperts):
                    handle = module.register_forward_pre_hook(partial(see, names))
                    hooks.callback(handle.remove)
            self._run(0, self._dense[0])
        calls = Counter(names for _, _, stage in fed for names in stage)
        others = [names for names in matrices if calls[names] != 1]
        stages = [[names for names in stage if calls[names] == 1] for _, _, stage in fed]
        found = {stage[0][0]: stage for stage in stages if stage}
        self._feed(list(found))
        return [*([(None, others)] if others else []), *found.items()]

    def _feed(self, names: Sequence[str]) -> None:
        """Pass the dense stream through the block at hand, and keep what is fed to modules."""
        fed: dict[str, dict[int, Tensor]] = {name: {} for name in names}

        def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = self._mask.rows(inputs[0], inputs[0].shape[:-1], False)
            fed[name][self._batch] = rows.to("cpu", copy=True)

        with ExitStack() as hooks, self._running():
            for name in names:
                module = module_at(self._model, name)
                handle = module.register_forward_pre_hook(partial(keep, name))
                hooks.callback(handle.remove)
            self._dense_after = self._after(self._dense)
        self._fed = fed

    def inputs(self, name: str) -> Inputs | None:
        """Of a module of the block at hand; None where the streams feed it other positions."""
        module, fed = module_at(self._model, name), self._fed.pop(name)
        size = next(iter(fed.values())).shape[-1]
        found, alike = Inputs(size, module.weight.device), True
        with self._running(), self._in_place(self._at):
            for number, x in enumerate(self._cut):
                cut, dense = self._run(number, x, module), fed.get(number)
                if cut is None or dense is None:
                    alike = alike and cut is dense
                    continue
                rows = self._mask.rows(cut, cut.shape[:-1], False).float()
                alike = alike and rows.shape == dense.shape
                if alike:
                    found.add(dense.to(rows), rows, number % JUDGE_EVERY == 1)
        found.add_other_processes()
        return found if is_everywhere(alike, module.weight.device) else None

    def _advance(self, block: int) -> None:
        """To the inputs of that one."""
        with self._running():
            if not self._dense:
                self._dense = self._entered()
                with self._in_place(None):
                    self._cut = self._entered()
            while self._at < block:
                self._dense = self._dense_after or self._after(self._dense)
                with self._in_place(self._at):
                    self._cut = self._after(self._cut)
                self._cuts = {
                    n: cut for n, cut in self._cuts.items() if self.block_of(n) != self._at
                }
                self._dense_after, self._at = [], self._at + 1

    def _after(self, stream: list[Tensor]) -> list[Tensor]:
        """What the block at hand makes of each."""
        return [_found(self._run(number, x)).cpu() for number, x in enumerate(stream)]

    @contextmanager
    def _running(self) -> Iterator[None]:
        with modes_kept(self._model), torch.no_grad():
            self._model.eval()
            yield

    @contextmanager
    def _in_place(self, block: int | None) -> Iterator[None]:
        """The matrices of a block, or those outside of all, as they are cut."""
        cuts = [(n, cut) for n, cut in self._cuts.items() if self.block_of(n) == block]
        weights = [(module_at(self._model, names[0]).weight, cut) for names, cut in cuts]
        held = [(weight, weight.data) for weight, _ in weights]
        try:
            for weight, cut in weights:
                weight.data = cut
            yield
        finally:
            for weight, data in held:
                weight.data = data

    def _entered(self) -> list[Tensor]:
        """What the first block is fed."""

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached(_first(args, kwargs))

        def entered(number: int) -> Tensor:
            handle = self._blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
            return _found(self._until(number, handle)).cpu()

        return [entered(number) for number in range(len(self._batches))]

    def _run(self, number: int, x: Tensor, module: nn.Module | None = None) -> Tensor | None:
        """What the block at hand makes of ``x``, of that batch, or feeds to a module of its.

        None where the module is not called.
        """
        block = self._blocks[self._at]

        def enter(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            mine = x.to(_first(args, kwargs).device)
            return ((mine, *args[1:]), kwargs) if args else (args, {**kwargs, _HIDDEN: mine})

        def feed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        def leave(block: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(_hidden(output))

        return self._until(
            number,
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave)
            if module is None
            else module.register_forward_pre_hook(feed),
        )

    def _until(self, number: int, *handles: Any) -> Tensor | None:
        """Call the model on a batch until a hook has what is looked for."""
        self._batch, batch = number, self._batches[number]
        self._mask.of(batch)
        with ExitStack() as changes:
            for handle in handles:
                changes.callback(handle.remove)
            for block in self._blocks[: self._at]:
                changes.enter_context(_passing(block, self._length))
            try:
                self._model(**batch)
            except _Reached as reached:
                return reached.hidden
        return None


_HIDDEN = "hidden_states"


class _Reached(Exception):
    """With what was to be reached."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _found(hidden: Tensor | None) -> Tensor:
    if hidden is None:
        raise RuntimeError("a block that was called once is not called any more")
    return hidden


def _copy(hidden: Any) -> Any:
    """In the host's memory."""
    return hidden.to("cpu", copy=True) if isinstance(hidden, Tensor) else None


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get(_HIDDEN)


def _hidden(output: Any) -> Any:
    """Of a block's output; None where that holds more."""
    if isinstance(output, tuple):
        hidden, *others = output
        return hidden if all(other is None for other in others) else None
    return output


@contextmanager
def _passing(block: Any, length: int | None) -> Iterator[None]:
    """The block gives what it is fed."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = _first(args, kwargs)
        return x if length is None else (x, *[None] * (length - 1))

    own = vars(block).get("forward")  # as offloading puts there
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
