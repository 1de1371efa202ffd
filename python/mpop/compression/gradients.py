"""What a model loses by the outputs of its matrices: second moments of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mpop.compression.work import sum_over_processes
from mpop.models.matrices import Names, is_embedding, module_at, outputs_of
from mpop.models.subclasses import DenseExperts

# Of a wider output, such as a vocabulary, the gradients' mean square is all that is kept.
_MOST_OUTPUTS = 2**14


class Mask(Protocol):
    """Which positions of a batch are no padding."""

    def rows(self, x: Tensor, positions: torch.Size, is_decoder: bool) -> Tensor:
        """``x [*positions, …]`` as the rows that count."""


def probe(
    output: ModelOutput, mask: Mask, is_decoder: bool, generator: torch.Generator
) -> Tensor | None:
    """A loss whose squared gradients are, on average, the curvature of what the output loses.

    Of logits the negative log-likelihood of labels drawn from them (Kunstner et al., "Limitations
    of the empirical Fisher approximation", 2019); of other outputs they times random signs. None
    where logits are NaN.
    """
    logits = output.get("logits")
    if logits is not None and logits.shape[-1] > 1:
        rows = mask.rows(logits, logits.shape[:-1], is_decoder)
        likely = rows.flatten(0, -2).float().log_softmax(-1)
        if likely.isnan().any():
            return None
        drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
        return -likely.gather(1, drawn).sum()
    total = torch.zeros((), dtype=torch.float32, device=generator.device)
    for tensor in output.to_tuple() if logits is None else (logits,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            rows = mask.rows(tensor, tensor.shape[:-1], is_decoder).float()
            drawn = torch.rand(
                rows.shape, dtype=rows.dtype, device=rows.device, generator=generator
            )
            total = total + (rows * (drawn - 0.5).sign()).sum() / rows.detach().norm()
    return total


@contextmanager
def backward_pass(model: nn.Module) -> Iterator[None]:
    """Gradients of activations alone; what they need waits in the host's memory."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = flags[0][0].device
    saved = nullcontext() if device.type == "cpu" else torch.autograd.graph.save_on_cpu()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad(), saved:
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Gradients:
    """Sums over the gradients at the outputs of one matrix."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        module = module_at(model, names[0])
        self._is_table, self._device = is_embedding(module), next(module.parameters()).device
        size = self.size_of(module)
        self._sum = torch.zeros(size, size, dtype=torch.float32, device=self._device)
        self._squares = torch.zeros(2, dtype=torch.float64, device=self._device)
        self.rows = torch.zeros(2, dtype=torch.float64, device=self._device)

    @staticmethod
    def size_of(module: Any) -> int:
        """Of the second moment; 0 where it is not kept."""
        outputs = outputs_of(module)
        return outputs if outputs <= _MOST_OUTPUTS else 0

    def watch(self, module: nn.Module, mask: Mask, is_decoder: bool) -> Any:
        """A handle to end it with."""
        is_other = is_embedding(module) != self._is_table

        def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            fed = inputs[0].detach()
            # What comes first in the model begins the graph; it may be written to from here on.
            output = output if output.requires_grad else output.requires_grad_().clone()
            output.register_hook(lambda gradient: add(fed, gradient))
            return output

        @torch.no_grad()
        def add(fed: Tensor, gradient: Tensor) -> None:
            rows = mask.rows(gradient, gradient.shape[:-1], is_decoder).float()
            squares = rows.square().sum(1)
            if is_other:  # a head that reads the words' table: each row of it is one output
                fed = mask.rows(fed, fed.shape[:-1], is_decoder).float()
                squares = squares * fed.square().mean(1)
            else:
                squares = squares / rows.shape[1]
                if len(self._sum):
                    self._sum.addmm_(rows.t(), rows)
            self._squares[int(is_other)] += squares.sum()
            self.rows[int(is_other)] += len(rows)

        return module.register_forward_hook(seen)

    def begin(self) -> None:
        """Before a batch is passed back."""

    def end(self) -> None:
        """After it."""

    def add_other_processes(self) -> None:
        """Sums over all of them."""
        for tensor in (self._sum, self._squares, self.rows):
            sum_over_processes(tensor)

    @property
    def slope(self) -> float:
        """The mean over rows and outputs of the squared gradient."""
        return float((self._squares / self.rows.clamp(min=1)).sum())

    @property
    def moment(self) -> Tensor | None:
        """``[out, out]``, in any scale; None where it is not kept, or all zero."""
        return self._sum if len(self._sum) and self._sum.any() else None


class ExpertsGradients(Gradients):
    """Those of one projection of experts, of whose parameter's gradient they are the square.

    That is Σ ‖g‖²‖x‖² over the tokens, whose gradients are independent of one another.
    """

    def __init__(self, experts: DenseExperts) -> None:
        self._experts, device = experts, experts.weight.device
        self._sum = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self._squares = torch.zeros(1, dtype=torch.float64, device=device)
        self.rows = torch.zeros(1, dtype=torch.float64, device=device)  # Σ ‖x‖² in their place
        self._kept: Tensor | None = None  # a gradient that was there before

    def begin(self) -> None:
        weight = self._experts.weight
        self._kept, weight.grad = weight.grad, None
        weight.requires_grad_(True)

    def end(self) -> None:
        weight = self._experts.weight
        if weight.grad is not None:
            self._squares += weight.grad.double().square().sum() / outputs_of(self._experts)
        weight.grad = self._kept
