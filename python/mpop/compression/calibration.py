"""What a model's matrices are fed: second moments of their inputs, streamed over batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from mpop.compression.distributed import sum_over_processes
from mpop.models.matrices import Names, inputs_of, is_embedding, module_at
from mpop.models.subclasses import DenseExperts

# A model's keyword arguments, such as a tokenizer makes them: tensors [rows, …].
Batches: TypeAlias = Iterable[Mapping[str, Tensor]]

# A relative error whose effect on the model is not lost in rounding.
MEASURABLE = 1e-3
# Bytes for second moments at a time.
MEMORY = 4 * 2**30
# One batch in so many is kept for judging what was fitted to the others.
_JUDGE_EVERY = 4
# An expert that fewer of the tokens reach is fitted to what all experts of its layer are fed.
_LEAST = 0.01


class Moments(NamedTuple):
    """E[x xᵀ] of one matrix's inputs, or of an embedding's ids its diagonal, unscaled, fp32.

    Attributes:
        fit: ``[in, in]`` or ``[in]``, of three batches in four; of experts ``[E, in, in]``.
        judge: the same of the fourth.
        rows: inputs that were seen for the former.
    """

    fit: Tensor
    judge: Tensor
    rows: int


@torch.no_grad()
def second_moments(
    model: PreTrainedModel, batches: Batches, matrices: Sequence[Names]
) -> dict[Names, Moments]:
    """Second moments of the inputs of matrices, over all positions that no mask hides.

    Of experts each one's, over what is routed to it, by the square of its gate; with n rows it is
    n / (n + in) of what is fitted to, and that of all experts of the layer the rest. A UserWarning
    lists experts that less than 1 % of the tokens reach, which are fitted to the latter alone.

    Args:
        model: in any mode, on any device; it is as it was afterwards.
        batches: what the model is called with, `**batch`; at least two.
        matrices: as `dense_matrices` or `mpo_matrices` gives them. A matrix that
            several modules share sees the inputs of all of them.

    Raises:
        ValueError: fewer rows than a matrix has inputs, or NaN or Inf in an input.
    """
    streams = {names: _stream(model, names) for names in matrices}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with ExitStack() as hooks:
        mask = _Mask(model)
        for names, stream in streams.items():
            for name in names:
                if is_embedding(module_at(model, name)) == stream.is_diagonal:
                    hook = stream.hook(mask, mask.is_decoder(name))
                    hooks.callback(module_at(model, name).register_forward_pre_hook(hook).remove)
        hooks.callback(model.train, training)
        for number, batch in enumerate(batches):
            inputs = {key: value.to(device) for key, value in batch.items()}
            mask.of(inputs)
            for stream in streams.values():
                stream.is_judging = number % _JUDGE_EVERY == 1
            model(**inputs)
    for stream in streams.values():
        stream.add_other_processes()
    moments = {names: stream.moments() for names, stream in streams.items()}
    if few := {owner: lone for stream in streams.values() for owner, lone in stream.few()}:
        listed = "; ".join(f"{owner} {', '.join(map(str, lone))}" for owner, lone in few.items())
        warnings.warn(
            f"experts that less than {_LEAST:.0%} of the calibration's tokens reach are fitted to "
            f"what all experts of their layer are fed: {listed}",
            stacklevel=2,
        )
    return moments


class Calibration:
    """Second moments of a model's matrices by groups, within a memory; none without batches.

    Args:
        model: of transformers; any other where there are no batches.

    Raises:
        ValueError: batches that can be passed only once, where they are needed more often.
    """

    def __init__(self, model: Any, batches: Batches | None, memory: int = MEMORY) -> None:
        self._model, self._batches, self._memory = model, batches, memory
        self._kept: dict[Names, Moments] = {}
        self._unchanged: list[Tensor] | None = None
        if batches is not None:
            first = next(iter(batches), None)
            if first is None:
                raise ValueError("expected calibration batches, got none")
            if not isinstance(first, Mapping) or not all(
                isinstance(value, Tensor) for value in first.values()
            ):
                raise TypeError(
                    "calibration: expected batches of named tensors, as a tokenizer makes them "
                    f"with return_tensors='pt', got {type(first).__name__}"
                )
            self._probe = first
            if iter(batches) is batches:
                self._batches = chain([first], batches)

    @torch.no_grad()
    def change(self, parameters: Mapping[str, Tensor]) -> float:
        """Relative squared change of the model's output with these in place of its parameters.

        Its logits, or where it has no head its hidden state and what is pooled of it, on the
        first batch.
        """
        if self._unchanged is None:
            self._unchanged = self._outputs({})
        return sum(
            float((after - before).square().sum() / before.square().sum())
            for before, after in zip(self._unchanged, self._outputs(parameters), strict=True)
        )

    def _outputs(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        model = self._model
        device, training = next(model.parameters()).device, model.training
        inputs = {key: value.to(device) for key, value in self._probe.items()}
        model.eval()
        try:
            output = functional_call(model, dict(parameters), (), inputs)
        finally:
            model.train(training)
        mask = _Mask(model)
        mask.of(inputs)
        is_decoder = bool(model.config.is_encoder_decoder)
        tensors = (output.logits,) if "logits" in output else output.to_tuple()
        return [
            mask.rows(tensor, tensor.shape[:-1], is_decoder).float()
            for tensor in tensors
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
        ]

    def groups(
        self, matrices: Sequence[Names]
    ) -> Iterator[tuple[list[Names], dict[Names, Moments]]]:
        """All the matrices in order; a single group is passed through the model only once."""
        if self._batches is None:
            yield list(matrices), {}
            return
        groups = list(self._within_memory(matrices))
        if len(groups) == 1:
            self._kept = self._kept or second_moments(self._model, self._batches, matrices)
            yield groups[0], self._kept
            return
        if iter(self._batches) is self._batches:
            raise ValueError(
                f"expected calibration batches that can be iterated {2 * len(groups)} times, as a "
                "list or DataLoader, or a larger calibration_memory: all moments do not fit in it"
            )
        for group in groups:
            yield group, second_moments(self._model, self._batches, group)

    def _within_memory(self, matrices: Sequence[Names]) -> Iterator[list[Names]]:
        group: list[Names] = []
        used = 0
        for names in matrices:
            module = module_at(self._model, names[0])
            size = inputs_of(module)
            needed = 2 * 4 * (size if is_embedding(module) else size**2)
            if isinstance(module, DenseExperts):
                needed *= len(module.weight)
            if group and used + needed > self._memory:
                yield group
                group, used = [], 0
            group.append(names)
            used += needed
        if group:
            yield group


class _Mask:
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


class _Stream:
    """The sums of one matrix."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        module = module_at(model, names[0])
        self.name, self.is_judging = names[0], False
        self.is_diagonal = is_embedding(module)
        size = (inputs_of(module),) * (1 if self.is_diagonal else 2)
        device = next(module.parameters()).device
        self._sums = [torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2)]
        self._rows = torch.zeros(2, dtype=torch.int64, device=device)

    def hook(self, mask: _Mask, is_decoder: bool) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, which = inputs[0], int(self.is_judging)
            if self.is_diagonal:
                rows = mask.rows(x, x.shape, is_decoder)
                self._sums[which] += torch.bincount(rows, minlength=len(self._sums[which]))
            else:
                rows = mask.rows(x, x.shape[:-1], is_decoder).float()
                self._sums[which].addmm_(rows.t(), rows)
            self._rows[which] += len(rows)

        return add

    def add_other_processes(self) -> None:
        for tensor in (*self._sums, self._rows):
            sum_over_processes(tensor)

    def moments(self) -> Moments:
        fit, judge = self._sums
        fitted, judging = self._rows.view(2, -1).sum(1).tolist()
        if not self.is_diagonal and min(fitted, 4 * judging) < fit.shape[-1]:
            raise ValueError(
                f"{self.name}: expected at least {fit.shape[-1]} rows (tokens; of a pooler, texts) "
                f"to calibrate with, and a quarter as many to judge by, got {fitted} and {judging}"
                ": give more text, in several batches, or leave this matrix dense "
                "(mpop compress --exclude)"
            )
        if not (fit.any() and judge.any()):
            raise ValueError(
                f"{self.name}: expected inputs to calibrate with that are not all zero, and others "
                "to judge by, in two batches or more: give more text"
            )
        if not (torch.isfinite(fit).all() and torch.isfinite(judge).all()):
            raise ValueError(f"{self.name}: expected finite inputs, got NaN or Inf in calibration")
        return Moments(fit, judge, fitted)

    def few(self) -> Iterator[tuple[str, list[int]]]:
        """Experts that hardly any token reached, by the name of what holds them."""
        yield from ()


class _ExpertsStream(_Stream):
    """Those of one projection of experts."""

    def __init__(self, experts: DenseExperts, name: str) -> None:
        count, size, device = len(experts.weight), inputs_of(experts), experts.weight.device
        self.name, self.is_judging, self.is_diagonal = name, False, False
        self._sums = [
            torch.zeros(count, size, size, dtype=torch.float32, device=device) for _ in range(2)
        ]
        self._rows = torch.zeros(2, count, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)

    def hook(self, mask: _Mask, is_decoder: bool) -> Any:
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

        return add

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
