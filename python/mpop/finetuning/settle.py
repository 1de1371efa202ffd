"""Training until the loss settles, in steps that can be stopped and taken up again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Of a model and a batch of its keyword arguments.
Loss: TypeAlias = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


class Settler:
    """Trains what requires a gradient until the mean loss stops falling.

    It has settled where the mean of the last ``window`` losses is not below that of the window
    before by more than ``tolerance`` of it; two whole windows are needed to say so.

    Args:
        model: what is trained, in place.
        dataset: rows for ``collate``; the order of each epoch follows from ``seed``.
        collate: a batch of rows to the model's keyword arguments.
        optimizer: over the trained parameters.
        batch_size: rows a step.
        window: steps whose losses are averaged.
        tolerance: relative fall of a window's mean that still counts.
        max_steps: at most this many steps a call.
        max_grad_norm: gradients are clipped to this norm.
        autocast: the dtype that the forward pass is autocast to; None for none.
        loss: of the model and a batch; by default its output's `.loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Sequence[Any],
        collate: Callable[[list[Any]], Mapping[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int = 32,
        window: int = 20,
        tolerance: float = 0.02,
        max_steps: int = 200,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        loss: Loss | None = None,
    ) -> None:
        if min(batch_size, window, max_steps) < 1:
            raise ValueError("expected a batch_size, window and max_steps of at least 1")
        self.model, self.optimizer = model, optimizer
        self.dataset, self.collate, self.batch_size = dataset, collate, batch_size
        self.window, self.tolerance, self.max_steps = window, tolerance, max_steps
        self.max_grad_norm, self.seed, self.autocast = max_grad_norm, seed, autocast
        self.loss: Loss = loss or (lambda model, inputs: model(**inputs).loss)
        self.epoch = self.batch = 0

    def __call__(self) -> float:
        """Train until settled; returns the mean loss of the last window.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        losses: deque[float] = deque(maxlen=2 * self.window)
        device = next(self.model.parameters()).device
        self.model.train()
        batches = self._batches()
        for _ in range(self.max_steps):
            inputs = {key: value.to(device) for key, value in next(batches).items()}
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                loss = self.loss(self.model, inputs)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]}; lower the learning rate")
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if has_settled(losses, self.window, self.tolerance):
                break
        self.model.eval()
        recent = list(losses)[-self.window :]
        return sum(recent) / len(recent)

    def _batches(self) -> Iterator[Mapping[str, Tensor]]:
        """From where the last call ended."""
        while True:
            generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
            # Drawn whole, so that a part of it can be passed over.
            order = torch.randperm(
                len(self.dataset), dtype=torch.int64, device="cpu", generator=generator
            )[self.batch :]
            loader: DataLoader[Any] = DataLoader(
                self.dataset,  # type: ignore[arg-type]
                self.batch_size,
                sampler=order.tolist(),
                collate_fn=self.collate,
            )
            for rows in loader:
                self.batch += self.batch_size
                yield rows
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The optimizer, the place in the data, and torch's random numbers."""
        on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "random": torch.get_rng_state(),
            "random_on_device": on_device,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        torch.set_rng_state(state["random"])
        if state["random_on_device"]:
            torch.cuda.set_rng_state_all(state["random_on_device"])


def has_settled(losses: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether the last window's mean is no longer below that of the whole window before it."""
    if len(losses) < 2 * window:
        return False
    recent = list(losses)
    before, now = recent[-2 * window : -window], recent[-window:]
    return sum(now) > (1 - tolerance) * sum(before)
