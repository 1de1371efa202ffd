"""A small regression that every example trains on: a two-layer network told to be another one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def teacher(width: int = 64, seed: int = 0) -> nn.Module:
    """What the examples learn; frozen."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    return layers.requires_grad_(False)


def loss_of(model: nn.Module, target: nn.Module, rows: int = 256, seed: int = 1) -> float:
    """Mean squared error on rows that were not trained on."""
    x = _rows(target, rows, seed)
    with torch.no_grad():
        return float((model(x) - target(x)).square().mean())


def train(
    model: nn.Module,
    target: nn.Module,
    parameters: Iterable[nn.Parameter],
    steps: int = 200,
    rate: float = 3e-3,
) -> None:
    """Adam on fresh rows at every step."""
    optimizer = torch.optim.Adam(parameters, rate)
    for step in range(steps):
        x = _rows(target, 64, seed=step + 2)
        optimizer.zero_grad()
        (model(x) - target(x)).square().mean().backward()
        optimizer.step()


def _rows(target: nn.Module, count: int, seed: int) -> Tensor:
    width = next(target.parameters()).shape[1]
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
