"""What a model's matrices are fed, and what it loses by their outputs, streamed over batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpo_kernels.cores.fitting import output_square, scaled
from mpop.compression.gradients import ExpertsGradients, Gradients, backward_pass, probe
from mpop.compression.work import progress, sum_over_processes
from mpop.models.light import modes_kept
from mpop.models.matrices import Names, inputs_of, is_embedding, module_at
from mpop.models.subclasses import DenseExperts

# A model's keyword arguments, such as a tokenizer makes them: tensors [rows, …].
Batches: TypeAlias = Iterable[Mapping[str, Tensor]]

# Bytes for second moments at a time.
MEMORY = 4 * 2**30
# One batch in so many is kept for judging what was fitted to the others.
JUDGE_EVERY = 4
# Gradients at so many positions are enough: what is taken of them are means.
_POSITIONS = 2**15
# With fewer rows for an input feature a second moment is shrunk.
_ENOUGH = 10
_SHRINKAGES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
# An expert that fewer of the tokens reach is fitted to what all experts of its layer are fed.
_LEAST = 0.01


class Moments(NamedTuple):
    """Of one matrix: E[x xᵀ] of its inputs and E[g gᵀ] of gradients at its output, fp32.

    Of an embedding's ids the former is diagonal. Gradients are those of the model's own
    log-likelihood at labels drawn from it, whose second moment is the curvature of its
    Kullback-Leibler divergence; of a model without logits those of its relative squared change.

    Attributes:
        fit: sums over inputs, ``[in, in]`` or ``[in]``, of three batches in four; of experts
            ``[E, in, in]``.
        judge: the same of the fourth.
        rows: inputs that were seen for the former.
        slope: mean over rows and outputs of the squared gradient.
        gradients: ``[out, out]``, mean over rows; None of experts and of a very wide output.
    """

    fit: Tensor
    judge: Tensor
    rows: int
    slope: float
    gradients: Tensor | None

    def whole(self, weight: Tensor) -> float:
        """What the model loses by second order over the batches fitted to, were the matrix zero.

        Args:
            weight: ``[out, in]``, or of experts ``[E, out, in]``.
        """
        work = weight.float()
        if work.dim() == 3:
            pairs = zip(work, self.fit, strict=True)
            return 0.5 * self.slope * sum(output_square(each, moment) for each, moment in pairs)
        gradients = None if self.gradients is None else scaled(self.gradients)
        return 0.5 * self.slope * output_square(work, self.fit, gradients)


@torch.no_grad()
def second_moments(
    model: PreTrainedModel, batches: Batches, matrices: Sequence[Names]
) -> dict[Names, Moments]:
    """Second moments of inputs and of gradients, over all positions that no mask hides.

    Of experts each one's, over what is routed to it, by the square of its gate; with n rows it is
    n / (n + in) of what is fitted to, and that of all experts of the layer the rest. A UserWarning
    lists experts that less than 1 % of the tokens reach, which are fitted to the latter alone.

    With fewer than ten rows for an input feature, what is fitted to is shrunk to a multiple of the
    identity, as far as makes the rows to judge by most likely; a UserWarning says how far.

    Args:
        model: in any mode, on any device; it is as it was afterwards.
        batches: what the model is called with, `**batch`; at least two. The first of them, up to
            32,768 rows, are passed back through it as well.
        matrices: as `dense_matrices` or `mpo_matrices` gives them. A matrix that
            several modules share sees the inputs of all of them.

    Raises:
        ValueError: inputs that are all zero, or NaN or Inf in an input or a gradient.
    """
    streams = {names: _stream(model, names) for names in matrices}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    with ExitStack() as hooks:
        mask, products = PaddingMask(model), _Products()
        has_decoder = bool(model.config.is_encoder_decoder)
        for names, stream in streams.items():
            for name in names:
                for handle in stream.hooks(module_at(model, name), name, mask, products):
                    hooks.callback(handle.remove)
        hooks.enter_context(modes_kept(model))
        model.eval()
        positions = 0
        for number, batch in enumerate(progress(batches, "calibrate: batch")):
            inputs = {key: value.to(device) for key, value in batch.items()}
            mask.of(inputs)
            is_judging = number % JUDGE_EVERY == 1
            for stream in streams.values():
                stream.is_judging = is_judging
            if is_judging or positions >= _POSITIONS:
                called(model, inputs)
            else:
                positions += max(value.shape[:2].numel() for value in inputs.values())
                with backward_pass(model):
                    for stream in streams.values():
                        stream.gradients.begin()
                    loss = probe(called(model, inputs), mask, has_decoder, generator)
                    if loss is not None:  # else inputs are not finite, which is told below
                        loss.backward()
                    for stream in streams.values():
                        stream.gradients.end()
            products.forget()
    for stream in streams.values():
        stream.add_other_processes()
    moments = {names: stream.moments() for names, stream in streams.items()}
    _say_what_was_few(streams.values())
    return moments


def called(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The model's outputs.

    Raises:
        ValueError: tokens or positions that it has no embeddings for.
    """
    try:
        return model(**inputs)
    except IndexError as error:  # of a table
        ids = inputs.get("input_ids")
        got = "" if ids is None else f", got ids up to {int(ids.max()):,} in {list(ids.shape)}"
        raise ValueError(
            f"calibration: expected tokens and positions that the model has{got}"
        ) from error


def _say_what_was_few(streams: Iterable[_Stream]) -> None:
    shrunk = {stream.name: stream.shrinkage for stream in streams if stream.shrinkage > 0}
    if shrunk:
        name, most = max(shrunk.items(), key=lambda item: item[1])
        warnings.warn(
            f"little text to calibrate with: the second moments of {len(shrunk)} matrices have "
            f"fewer than {_ENOUGH} rows for an input and are shrunk to the identity, as the rows "
            f"held out ask, by {most:.1%} at most ({name})",
            stacklevel=3,
        )
    if few := {owner: lone for stream in streams for owner, lone in stream.few()}:
        listed = "; ".join(f"{owner} {', '.join(map(str, lone))}" for owner, lone in few.items())
        warnings.warn(
            f"experts that less than {_LEAST:.0%} of the calibration's tokens reach are fitted to "
            f"what all experts of their layer are fed: {listed}",
            stacklevel=3,
        )


class Calibration:
    """Second moments of a model's matrices by groups, within a memory; none without batches.

    Args:
        model: of transformers; any other where there are no batches.

    Raises:
        TypeError, ValueError: no batches, or of something else.
    """

    def __init__(self, model: Any, batches: Batches | None, memory: int = MEMORY) -> None:
        self._model, self._memory = model, memory
        self._kept: dict[Names, Moments] = {}
        self.batches = None if batches is None else list(batches)
        if self.batches is not None:
            if not self.batches:
                raise ValueError("expected calibration batches, got none")
            first = self.batches[0]
            if not isinstance(first, Mapping) or not all(
                isinstance(value, Tensor) for value in first.values()
            ):
                raise TypeError(
                    "calibration: expected batches of named tensors, as a tokenizer makes them "
                    f"with return_tensors='pt', got {type(first).__name__}"
                )

    def groups(
        self, matrices: Sequence[Names]
    ) -> Iterator[tuple[list[Names], dict[Names, Moments]]]:
        """All the matrices in order; a single group is passed through the model only once."""
        if self.batches is None:
            yield list(matrices), {}
            return
        groups = list(self._within_memory(matrices))
        if len(groups) == 1:
            self._kept = self._kept or second_moments(self._model, self.batches, matrices)
            yield groups[0], self._kept
            return
        for group in groups:
            yield group, second_moments(self._model, self.batches, group)

    def _within_memory(self, matrices: Sequence[Names]) -> Iterator[list[Names]]:
        group: list[Names] = []
        used = 0
        for names in matrices:
            module = module_at(self._model, names[0])
            size = inputs_of(module)
            needed = 2 * 4 * (size if is_embedding(module) else size**2)
            if isinstance(module, DenseExperts):
                needed *= len(module.weight)
            else:
                needed += 4 * Gradients.size_of(module) ** 2
            if group and used + needed > self._memory:
                yield group
                group, used = [], 0
            group.append(names)
            used += needed
        if group:
            yield group


class PaddingMask:
    """Which positions of the batch at hand are no padding, on the two sides of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._has_decoder = bool(model.config.is_encoder_decoder)
        self._masks: dict[bool, Tensor | None] = {}

    def of(self, inputs: Mapping[str, Any]) -> None:
        for is_decoder, part in ((False, ""), (True, "decoder_")):
            mask = inputs.get(f"{part}attention_mask")
            self._masks[is_decoder] = None if mask is None else mask.bool()

    def is_decoder(self, name: str) -> bool:
        """Whether a module sees what a decoder does; keys and values across see the encoder's."""
        parts = name.split(".")
        crosses = not _CROSS.isdisjoint(parts) and parts[-1] in _KEYS_AND_VALUES
        return self._has_decoder and "decoder" in parts and not crosses

    def rows(self, x: Tensor, positions: torch.Size, is_decoder: bool) -> Tensor:
        """``x [*positions, …]`` as the rows that count."""
        mask = self._masks[is_decoder]
        if mask is not None and positions == (mask.numel(),):
            mask = mask.flatten()  # as of what is fed to experts
        if mask is not None and mask.shape == positions:
            return x[mask]
        return x.flatten(0, len(positions) - 1)


_CROSS = {"EncDecAttention", "encoder_attn", "crossattention"}
_KEYS_AND_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value"}


class _Products:
    """xᵀ x of the input seen last, which several matrices in a row may be fed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Between batches."""
        self._seen: Tensor | None = None
        self._version = -1

    def of(self, x: Tensor, mask: PaddingMask, is_decoder: bool) -> tuple[Tensor, int]:
        """Of the rows that count, and their number."""
        if self._seen is not x or self._version != x._version:
            rows = mask.rows(x, x.shape[:-1], is_decoder).float()
            product = rows.new_zeros(2 * rows.shape[1:])
            # In place, which autocast leaves in fp32.
            self._product, self._rows = product.addmm_(rows.t(), rows), len(rows)
            self._seen, self._version = x, x._version
        return self._product, self._rows


class _Stream:
    """The sums of one matrix."""

    gradients: Gradients

    def __init__(self, model: nn.Module, names: Names) -> None:
        module = module_at(model, names[0])
        self.name, self.is_judging, self.shrinkage = names[0], False, 0.0
        self.is_diagonal = is_embedding(module)
        size = (inputs_of(module),) * (1 if self.is_diagonal else 2)
        device = next(module.parameters()).device
        self._sums = [torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2)]
        self._rows = torch.zeros(2, dtype=torch.int64, device=device)
        self.gradients = Gradients(model, names)

    def hooks(
        self, module: Any, name: str, mask: PaddingMask, products: _Products
    ) -> Iterator[Any]:
        """Handles to end them with."""
        is_decoder = mask.is_decoder(name)
        yield self.gradients.watch(module, mask, is_decoder)

        @torch.no_grad()
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, which = inputs[0].detach(), int(self.is_judging)
            if self.is_diagonal:
                rows = mask.rows(x, x.shape, is_decoder)
                self._sums[which] += torch.bincount(rows, minlength=len(self._sums[which]))
                self._rows[which] += len(rows)
            else:
                product, count = products.of(inputs[0], mask, is_decoder)
                self._sums[which] += product
                self._rows[which] += count

        if is_embedding(module) == self.is_diagonal:
            yield module.register_forward_pre_hook(add)

    def add_other_processes(self) -> None:
        for tensor in (*self._sums, self._rows):
            sum_over_processes(tensor)
        self.gradients.add_other_processes()

    def moments(self) -> Moments:
        fit, judge = self._sums
        fitted = int(self._rows[0].sum())
        if not (fit.any() and judge.any()):
            raise ValueError(
                f"{self.name}: expected inputs to calibrate with that are not all zero, and others "
                "to judge by, in two batches or more: give more text"
            )
        slope, gradients = self.gradients.slope, self.gradients.moment
        held = (fit, judge, fit.new_tensor(slope), *([] if gradients is None else [gradients]))
        if not all(torch.isfinite(tensor).all() for tensor in held):
            raise ValueError(f"{self.name}: expected finite inputs, got NaN or Inf in calibration")
        if fit.dim() == 2:
            self.shrinkage = shrink(fit, judge, fitted, int(self._rows[1].sum()))
        return Moments(fit, judge, fitted, slope, gradients)

    def few(self) -> Iterator[tuple[str, list[int]]]:
        """Experts that hardly any token reached, by the name of what holds them."""
        yield from ()


class _ExpertsStream(_Stream):
    """Those of one projection of experts."""

    def __init__(self, experts: DenseExperts, name: str) -> None:
        count, size, device = len(experts.weight), inputs_of(experts), experts.weight.device
        self.name, self.is_judging, self.shrinkage = name, False, 0.0
        self._sums = [
            torch.zeros(count, size, size, dtype=torch.float32, device=device) for _ in range(2)
        ]
        self._rows = torch.zeros(2, count, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.gradients = ExpertsGradients(experts)

    def hooks(
        self, module: Any, name: str, mask: PaddingMask, products: _Products
    ) -> Iterator[Any]:
        is_decoder = mask.is_decoder(name)

        @torch.no_grad()
        def add(experts: DenseExperts, inputs: tuple[Tensor, ...]) -> None:
            which = int(self.is_judging)
            x, index, gates = (mask.rows(part, part.shape[:1], is_decoder) for part in inputs)
            rows, offsets, gates = experts.inputs(x, index, gates)
            rows = rows.float() * gates.float()[:, None]
            counts = offsets.diff(prepend=offsets.new_zeros(1))
            for total, part in zip(self._sums[which], rows.split(counts.tolist()), strict=True):
                total.addmm_(part.t(), part)
            self._rows[which] += counts
            self._tokens += 0 if which else len(x)
            if experts.weight.requires_grad:
                self.gradients.rows += rows.double().square().sum()

        yield module.register_forward_pre_hook(add)

    def add_other_processes(self) -> None:
        super().add_other_processes()
        sum_over_processes(self._tokens)

    def moments(self) -> Moments:
        found = super().moments()
        rows = self._rows[0]
        pooled = found.fit.sum(0) / rows.sum()
        own = rows / (rows + len(pooled)) * ~self._is_few()
        for moment, share, count in zip(found.fit, own, rows, strict=True):
            # In one scale for all of them; what no token reached counts as if one had.
            moment.mul_(share).add_((1 - share) * count.clamp(min=1) * pooled)
        return found

    def _is_few(self) -> Tensor:
        return self._rows[0] < _LEAST * self._tokens

    def few(self) -> Iterator[tuple[str, list[int]]]:
        if lone := self._is_few().nonzero().flatten().tolist():
            yield self.name.rpartition(".")[0], lone


def _stream(model: nn.Module, names: Names) -> _Stream:
    module = module_at(model, names[0])
    if isinstance(module, DenseExperts):
        return _ExpertsStream(module, names[0])
    return _Stream(model, names)


def shrink(fit: Tensor, judge: Tensor, fitted: int, judging: int) -> float:
    """Shrink second moments of few rows to a multiple of the identity, in place.

    Args:
        fit, judge: sums ``[in, in]`` over ``fitted`` and ``judging`` rows.

    Returns:
        How far: as makes the rows to judge by most likely; 0 of enough rows.
    """
    if fitted >= _ENOUGH * len(fit):
        return 0.0
    values, vectors = torch.linalg.eigh(fit.double() / fitted)
    others = (vectors * (judge.double() / judging @ vectors)).sum(0)

    def unlikely(shrinkage: float) -> float:
        spread = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
        return float((others / spread + spread.log()).sum())

    shrinkage = min(_SHRINKAGES, key=unlikely)
    mean = fit.diagonal().mean()
    fit.mul_(1 - shrinkage).diagonal().add_(shrinkage * mean)
    return shrinkage
