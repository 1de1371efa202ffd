"""Whether modules are what their classes say: what was put on one is lost where it is replaced."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from transformers.pytorch_utils import Conv1D

from mpo_kernels.layers.unformed import UnformedLayer

# Packages that put modules of their own in the place of a model's, and what has to come first.
_WRAPPERS = {
    "peft": "merge_and_unload() it first, unload() it, or of a prompt take get_base_model()",
    "bitsandbytes": "take the model as it was before quantizing",
    "torch.ao": "take the model as it was before quantizing",
}
_LAYERS = (nn.Linear, Conv1D, nn.Embedding)


def check_unwrapped(model: nn.Module) -> None:
    """Raise a ValueError for adapters or quantised layers, with which none could load the model.

    Nor with layers of cores whose values are made by other code.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            for package, remedy in _WRAPPERS.items():
                if f"{cls.__module__}.".startswith(f"{package}."):
                    raise ValueError(
                        f"{name or 'model'}: expected a model without modules of {package}, got a "
                        f"{type(module).__name__}: {remedy}"
                    )
    check_own_values(model)


def check_own_values(model: nn.Module) -> None:
    """Raise a ValueError for layers of cores that are pruned, parametrised or called otherwise."""
    for name, module in model.named_modules():
        if isinstance(module, UnformedLayer):
            made = [
                k for k in module.state_dict() if "parametrizations" in k or k.endswith("_orig")
            ]
            if found := ", ".join(made) or _own_forward(module):
                raise ValueError(
                    f"{name}: expected a plain {type(module).__name__}, got one with {found}: "
                    "undo that first"
                )


def check_plain(model: nn.Module, matrices: Iterable[tuple[str, ...]]) -> None:
    """Raise a ValueError unless dense matrices are whole in the weights of their modules.

    Args:
        matrices: names of Linears, Conv1Ds, Embeddings and parameters of experts; those that
            share a weight together.
    """
    for name in chain.from_iterable(matrices):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:  # of experts
            found = _own_forward(module)
        else:
            module = model.get_submodule(name)
            found = _put_on(module)
        if found:
            kind = type_before_parametrizations(module).__name__
            raise ValueError(
                f"{name}: expected a plain {kind}, got one with {found}: undo "
                "that (torch.nn.utils removes parametrizations, norms and pruning), or exclude it"
            )


def _put_on(module: nn.Module) -> str:
    """What is there beside a weight and a bias, or in their place."""
    # An embedding of a model's own class may hold more.
    is_own = type_before_parametrizations(module) not in _LAYERS and not is_parametrized(module)
    if not is_own and (more := module.state_dict().keys() - {"weight", "bias"}):
        return ", ".join(sorted(more))
    if type(module.weight) is not nn.Parameter:
        return f"a {type(module.weight).__name__} for a weight"
    if found := _own_forward(module):
        return found
    if isinstance(module, nn.Embedding):
        options = ("max_norm", "scale_grad_by_freq", "sparse")
        return ", ".join(option for option in options if getattr(module, option))
    return ""


def _own_forward(module: nn.Module) -> str:
    # accelerate replaces it as well, to move inputs to where the weight is.
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    is_own = own is not None and getattr(own, "__func__", None) is not type(module).forward
    return "a forward of its own" if is_own else ""
