"""Layers that share a centre (MPOBERT, Liu et al., Findings of EMNLP 2023).

A deep stack of layers of one size holds one central tensor; what tells the layers apart are their
auxiliary cores. Run: python -m examples.shared_centre
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from examples.problem import loss_of, teacher, train
from mpo_kernels import MPOLinear, MPOShape


def share_centre(layers: Sequence[MPOLinear]) -> None:
    """Let MPOs of one shape hold the first one's central tensor, in place.

    Raises:
        ValueError: layers of different shapes.
    """
    first = layers[0]
    if any(layer.shape != first.shape for layer in layers):
        raise ValueError(f"expected layers of one shape, got {[layer.shape for layer in layers]}")
    for layer in layers[1:]:
        layer.cores[first.central] = first.cores[first.central]


def stack(depth: int, width: int = 64) -> nn.Sequential:
    """Residual-free layers with a nonlinearity between."""
    shape = MPOShape.balanced(width, width, 3)
    layers = [MPOLinear(width, width, shape) for _ in range(depth)]
    share_centre(layers)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))[:-1]


def main() -> None:
    """Four layers with one centre."""
    target, model = teacher(), stack(depth=4)
    before = loss_of(model, target)
    train(model, target, model.parameters())
    count = sum(p.numel() for p in model.parameters())  # a shared tensor counts once
    alone = sum(p.numel() for layer in model[::2] for p in layer.parameters())
    print(
        f"{count} parameters, {alone} without sharing, "
        f"loss {before:.4f} -> {loss_of(model, target):.4f}"
    )


if __name__ == "__main__":
    main()
