"""Putting other modules in the place of those that hold a matrix, shared ones kept tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpo_kernels import (
    Decomposition,
    InterpolativeLinear,
    MPOEmbedding,
    MPOExperts,
    MPOLinear,
    MPOShape,
)
from mpo_kernels.cores.chain import check_finite
from mpo_kernels.layers.quantized import QuantizedLayer
from mpo_kernels.layers.unformed import UnformedLayer
from mpop.models.matrices import (
    MPO,
    Compressed,
    Dense,
    DenseLayer,
    Names,
    check_centres,
    compressed_matrices,
    kind_of,
    kind_of_mpo,
    module_at,
    tensors_of,
    turned,
)
from mpop.models.plain import check_unwrapped
from mpop.models.subclasses import DenseExperts, adopt, hold


def _tensor_of(module: nn.Module) -> Any:
    """The one that tells which modules share a matrix; None where they hold none themselves."""
    if isinstance(module, Compressed):
        return tensors_of(module)[0]
    return module._parameters.get("weight")


def empty_mpo(
    dense: Dense, shape: MPOShape, form: str | None = None, shared: int | None = None
) -> MPO:
    """An MPO module of this shape and form without values, on the device of `dense`.

    Args:
        shared: a core that experts have in common.
    """
    size = (shape.in_features, shape.out_features)
    device, dtype = dense.weight.device, dense.weight.dtype
    if isinstance(dense, DenseExperts):
        return MPOExperts(len(dense.weight), shape, shared, device=device, dtype=dtype)
    if isinstance(dense, nn.Embedding):
        return MPOEmbedding(*size, shape, dense.padding_idx, device=device, dtype=dtype)
    has_bias = dense.bias is not None
    if form is not None:
        return InterpolativeLinear(*size, shape.ranks[0], has_bias, device=device, dtype=dtype)
    return MPOLinear(*size, shape, has_bias, device=device, dtype=dtype)


def to_dense(
    module: MPO | QuantizedLayer, dtype: torch.dtype = torch.float32
) -> DenseLayer | nn.Parameter:
    """A dense module of the kind that was replaced, or of experts `[E, out, in]`, as it is now.

    Args:
        dtype: for the weight of quantised cores; others keep theirs.
    """
    if isinstance(module, MPOEmbedding):
        return module.to_embedding()
    if isinstance(module, MPOExperts):
        return nn.Parameter(module.to_weight())
    linear = module.to_linear(dtype) if isinstance(module, QuantizedLayer) else module.to_linear()
    if kind_of_mpo(module) != "conv1d":
        return linear
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    return conv


def densify(model: PreTrainedModel) -> None:
    """Put dense modules in the place of all MPO modules; ties are kept.

    Raises:
        ValueError: a model without MPO modules, NaN or Inf in one, or adapters; the model is as it
            was.
    """
    check_unwrapped(model)
    check_centres(model)
    matrices = compressed_matrices(model)
    if not matrices:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    for names in matrices:
        try:
            held = tensors_of(module_at(model, names[0]))
            check_finite([tensor for tensor in held if tensor.is_floating_point()])
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from error
    dtype = model.dtype
    for names in matrices:
        swap(model, names, to_dense(module_at(model, names[0]), dtype))
    update_ties(model)


def swap(
    model: PreTrainedModel, names: Names, new: MPO | QuantizedLayer | DenseLayer | nn.Parameter
) -> None:
    """Put `new` in the place of the modules `names`, which go on sharing one matrix.

    Biases, training modes, hooks and what an embedding's own class adds are kept; call
    `update_ties` after the last swap.
    """
    if isinstance(new, MPOExperts | nn.Parameter):
        _swap_experts(model, names[0], new)
        return
    parts: dict[nn.Module, Any] = {}
    for name in names:
        old = module_at(model, name)
        if old not in parts:
            parts[old] = _part(new, old, shared=bool(parts))
        put(model, name, parts[old])


def _swap_experts(model: nn.Module, name: str, new: MPOExperts | nn.Parameter) -> None:
    """By one of the names, which all are of the same module."""
    owner, _, leaf = name.rpartition(".")
    experts = module_at(model, owner)
    if isinstance(new, MPOExperts):
        new.train(experts.training)
        new.label = name
    else:
        new = nn.Parameter(turned(DenseExperts(experts, leaf), new.detach()).contiguous())
    hold(experts, leaf, new)


def _part(new: MPO | QuantizedLayer | DenseLayer, old: Any, shared: bool) -> Any:
    """What takes the place of one of the modules that share a matrix."""
    part: Any = new
    if isinstance(new, nn.Embedding | MPOEmbedding):
        if isinstance(old, nn.Linear | MPOLinear):
            part = _tied_head(new)
            part.bias = old.bias  # the very Parameter, which some models tie as well
            return part
        if shared:
            part = _sibling(new)
        part.padding_idx = old.padding_idx
        adopt(part, old)
        return part
    if not isinstance(new, QuantizedLayer):  # whose own is a buffer
        in_bytes = isinstance(old, QuantizedLayer) and old.bias is not None
        part.bias = nn.Parameter(old.bias) if in_bytes else old.bias
    if isinstance(new, MPOLinear | InterpolativeLinear | QuantizedLayer):
        part.kind = kind_of_mpo(old) if isinstance(old, Compressed) else kind_of(old)
    return part


def _sibling(embedding: nn.Embedding | MPOEmbedding) -> nn.Embedding | MPOEmbedding:
    """Another embedding over the very same table."""
    size = (embedding.num_embeddings, embedding.embedding_dim)
    if isinstance(embedding, MPOEmbedding):
        sibling = MPOEmbedding(*size, embedding.shape, device="meta")
        sibling.cores = embedding.cores
        return sibling
    dense = nn.Embedding(*size, device="meta", dtype=embedding.weight.dtype)
    dense.weight = embedding.weight
    return dense


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, whose training mode and hooks it takes over."""
    old = module_at(model, name)
    new.train(old.training)
    hooks = {key: value for key, value in vars(old).items() if "ward_" in key and "hook" in key}
    if any(hooks.values()):
        vars(new).update(hooks)  # the very dictionaries, from which a handle removes its hook
    if hasattr(old, "_hf_hook"):  # servers do without accelerate
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
    if isinstance(new, UnformedLayer):
        new.label = name
    model.set_submodule(name, new)


def replace(
    model: PreTrainedModel, names: Names, decomposition: Decomposition, form: str | None = None
) -> None:
    """Put cores in the place of a dense matrix; they train where it did.

    Args:
        form: `INTERPOLATIVE` to hold a linear's low rank so.
    """
    dense = module_at(model, names[0])
    module: Any
    if isinstance(dense, DenseExperts):
        module = MPOExperts.from_decomposition(decomposition)
    elif isinstance(dense, nn.Embedding):
        module = MPOEmbedding.from_decomposition(decomposition, dense.padding_idx)
    else:
        module = MPOLinear.from_decomposition(decomposition, dense.bias)
        module = module if form is None else module.interpolative()
    module.cores.requires_grad_(dense.weight.requires_grad)
    module.rel_error = decomposition.rel_error  # for the model's card
    swap(model, names, module)


def _tied_head(embedding: nn.Embedding | MPOEmbedding) -> nn.Linear | MPOLinear:
    if isinstance(embedding, MPOEmbedding):
        return embedding.as_linear()
    size = (embedding.embedding_dim, embedding.num_embeddings)
    head = nn.Linear(*size, bias=False, device="meta", dtype=embedding.weight.dtype)
    head.weight = embedding.weight
    return head


def update_ties(model: PreTrainedModel) -> None:
    """Name the tensors now shared, cores or weights, where transformers looks for ties."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        if keys := part._tied_weights_keys:
            part._tied_weights_keys = {
                _parameter_name(part, target): _parameter_name(part, source)
                for target, source in keys.items()
            }
    for part in parts:
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)


def drop_broken_ties(model: PreTrainedModel) -> None:
    """Forget the ties that the configuration names and the model does not have.

    Where that is all of them, the configuration says so as well, for others who read it.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    tied = [
        part
        for part in parts
        if part._tied_weights_keys and getattr(part.config, "tie_word_embeddings", False)
    ]
    for part in tied:
        part._tied_weights_keys = {
            target: source
            for target, source in part._tied_weights_keys.items()
            if not _are_apart(part, target, source)
        }
    update_ties(model)
    if tied and not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False


def _are_apart(part: PreTrainedModel, *keys: str) -> bool:
    target, source = (_tensor_at(part, key) for key in keys)
    return target is not None and source is not None and target is not source


def _tensor_at(part: PreTrainedModel, key: str) -> Any:
    """What a tie names, a core for all cores; None for a pattern or what this model lacks."""
    stem, _, leaf = key.rpartition(".")
    try:
        module = part.get_submodule(stem)
    except AttributeError:
        return None
    return _tensor_of(module) if leaf in ("weight", "cores") else module._parameters.get(leaf)


def _parameter_name(part: PreTrainedModel, key: str) -> str:
    stem, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "cores"):
        return key
    try:
        module = part.get_submodule(stem)
    except AttributeError:  # a pattern, or a module that this model lacks
        return key
    return f"{stem}.cores" if isinstance(module, MPO) else f"{stem}.weight"
