"""Light fine-tuning (the paper's LFA): train everything but the central tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mpop.modules import MPO, mpo_modules


class ParameterCount(NamedTuple):
    """The paper's #Pr and #To; a parameter that several modules share counts once."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters, as trainable where they require a gradient."""
    parameters = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )


def freeze_central(model: nn.Module) -> ParameterCount:
    """Freeze the central tensor of every MPO module; all else stays as trainable as it was.

    Returns:
        The parameters now trained and all of them.

    Raises:
        ValueError: a model without MPO modules.
    """
    for module in _modules_of(model):
        module.freeze_central()
    return count_parameters(model)


def balance(model: nn.Module) -> None:
    """Prepare every MPO module for light fine-tuning; what the model computes stays the same.

    A step on an entry of an auxiliary tensor then changes its weight by as much as on any other, in
    every matrix; see `mpo_kernels.gauge.balanced`. To be called before there is an optimizer, and
    not for modules that share a single core, such as a centre.

    Raises:
        ValueError: a model without MPO modules.
    """
    for module in _modules_of(model):
        module.balance()


def unfreeze(model: nn.Module) -> ParameterCount:
    """Make the central tensor of every MPO module trainable again; see `freeze_central`."""
    for module in _modules_of(model):
        module.unfreeze()
    return count_parameters(model)


def _modules_of(model: nn.Module) -> list[MPO]:
    modules = [module for _, module in mpo_modules(model)]
    if not modules:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    return modules
