"""The matrices of a transformers model: finding them, swapping them, keeping shared ones tied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mobilebert.modeling_mobilebert import MobileBertLMPredictionHead
from transformers.pytorch_utils import Conv1D

from mpo_kernels import Decomposition, MPOEmbedding, MPOLinear, MPOShape
from mpo_kernels.cores.chain import check_finite
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLayer
from mpo_kernels.layers.embedding import MPOTiedLinear
from mpop.models.config import ModuleSpec, MPOConfig

Dense: TypeAlias = nn.Linear | Conv1D | nn.Embedding
MPO: TypeAlias = MPOLinear | MPOEmbedding
Compressed: TypeAlias = MPO | BlockwiseLayer
Names: TypeAlias = tuple[str, ...]  # the modules that hold one matrix, its owner first

_KINDS = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}


def module_at(model: nn.Module, name: str) -> Any:
    """The submodule of this dotted name, of whatever type the caller knows it to be."""
    return model.get_submodule(name)


def _shared(model: nn.Module, held: dict[str, Tensor]) -> list[Names]:
    """Group module names by the very tensor they hold; an embedding owns what a head shares."""
    groups: dict[int, list[str]] = {}
    for name, tensor in held.items():
        groups.setdefault(id(tensor), []).append(name)

    def is_head(name: str) -> bool:
        return not is_embedding(module_at(model, name))

    return [tuple(sorted(names, key=is_head)) for names in groups.values()]


def dense_matrices(model: PreTrainedModel) -> list[Names]:
    """The matrices that can be compressed: those of Linears, Conv1Ds and the word embeddings."""
    held = {
        name: module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in _KINDS  # a subclass may compute something else
    }
    try:
        words = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a model without words, such as of images
        words = None
    matrices = []
    for names in _shared(model, held):
        modules = {module_at(model, name) for name in names}
        if isinstance(module_at(model, names[0]), nn.Embedding):
            is_candidate = held[names[0]] is words
        else:
            is_candidate = len(modules) == 1
        if is_candidate:
            matrices.append(names)
    return matrices


def mpo_matrices(model: nn.Module) -> list[Names]:
    """The compressed matrices.

    Raises:
        ValueError: centres that are quantised.
    """
    if any(isinstance(module, BlockwiseLayer) for module in model.modules()):
        raise ValueError("the centres are quantised: call mpop.dequantize_centres(model) first")
    return compressed_matrices(model)


def compressed_matrices(model: nn.Module) -> list[Names]:
    """The compressed matrices, those with quantised centres too."""
    held = {
        name: _tensor_of(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compressed)
    }
    return _shared(model, held)


def _tensor_of(module: nn.Module) -> Any:
    """The one that tells which modules share a matrix; None where they hold none themselves."""
    if isinstance(module, BlockwiseLayer):
        return module.auxiliary[0]
    return module.cores[0] if isinstance(module, MPO) else module._parameters.get("weight")


def mpo_modules(model: nn.Module) -> Iterator[tuple[str, MPO]]:
    """The owner of each compressed matrix with its name; tied heads are left out."""
    for names in mpo_matrices(model):
        yield names[0], module_at(model, names[0])


def describe(model: PreTrainedModel) -> MPOConfig:
    """What a checkpoint of the model, as it is now, has to say about its MPO modules."""
    ties = {
        target.removesuffix(".cores.0"): source.removesuffix(".cores.0")
        for target, source in model.all_tied_weights_keys.items()
    }
    specs = {}
    for names in compressed_matrices(model):
        # What shares a matrix and is not tied by the configuration is saved as one of its own.
        owners: dict[str, str] = {}
        for name in names:
            owners.setdefault(ties.get(name, name), name)
        specs.update({name: _spec(module_at(model, name)) for name in owners.values()})
    return MPOConfig.from_specs(specs)


def _spec(module: Compressed) -> ModuleSpec:
    if isinstance(module, BlockwiseLayer):
        is_light = all(core.requires_grad for core in module.auxiliary)
    else:
        trained = [core.requires_grad for core in module.cores]
        is_light = trained == [k != module.central for k in range(len(trained))]
    return ModuleSpec(_kind_of_mpo(module), module.shape, is_light)


def weight_of(dense: Dense) -> Tensor:
    """The weight as `[out, in]`, where an embedding is a map from the vocabulary."""
    return dense.weight if isinstance(dense, nn.Linear) else dense.weight.t()


def inputs_of(module: Dense | MPO) -> int:
    """The size of what a matrix maps: features, or the vocabulary."""
    if isinstance(module, MPOTiedLinear):
        return module.in_features  # its cores are a table's
    return module.shape.in_features if isinstance(module, MPO) else weight_of(module).shape[1]


def is_embedding(module: nn.Module) -> bool:
    """Whether its inputs are ids."""
    return isinstance(module, nn.Embedding | MPOEmbedding)


def empty_mpo(dense: Dense, shape: MPOShape) -> MPO:
    """An MPO module of this shape without values, on the device of `dense`."""
    size = (shape.in_features, shape.out_features)
    device, dtype = dense.weight.device, dense.weight.dtype
    if isinstance(dense, nn.Embedding):
        return MPOEmbedding(*size, shape, dense.padding_idx, device=device, dtype=dtype)
    return MPOLinear(*size, shape, dense.bias is not None, device=device, dtype=dtype)


def kind_of(dense: Dense) -> str:
    """One of `config.KINDS`."""
    return _KINDS[type(dense)]


def _kind_of_mpo(module: Compressed) -> str:
    """That of its cores: of a head that was tied once they are an embedding's."""
    if isinstance(module, MPOEmbedding | MPOTiedLinear | BlockwiseEmbedding):
        return "embedding"
    return getattr(module, "kind", None) or "linear"


def to_dense(module: MPO) -> Dense:
    """A dense module of the kind that was replaced, with the weights of now."""
    if isinstance(module, MPOEmbedding):
        return module.to_embedding()
    linear = module.to_linear()
    if _kind_of_mpo(module) != "conv1d":
        return linear
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    return conv


def densify(model: PreTrainedModel) -> None:
    """Put dense modules in the place of all MPO modules; ties are kept.

    Raises:
        ValueError: a model without MPO modules, or NaN or Inf in one; the model is as it was.
    """
    matrices = mpo_matrices(model)
    if not matrices:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    for names in matrices:
        try:
            check_finite(list(module_at(model, names[0]).cores))
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from error
    for names in matrices:
        swap(model, names, to_dense(module_at(model, names[0])))
    update_ties(model)


def swap(model: PreTrainedModel, names: Names, new: MPO | Dense) -> None:
    """Put `new` in the place of the modules `names`, which go on sharing one matrix.

    Biases and training modes are kept; call `update_ties` after the last swap.
    """
    part: Any = new
    if isinstance(new, MPOLinear):
        part.kind = kind_of(module_at(model, names[0]))
    for name in names:
        old = module_at(model, name)
        part = new
        if isinstance(new, nn.Embedding | MPOEmbedding):
            if isinstance(old, nn.Linear | MPOLinear):
                part = _tied_head(new)
                part.bias = old.bias  # the very Parameter, which some models tie as well
        else:
            part.bias = old.bias
        part.train(old.training)
        model.set_submodule(name, part)


def replace(model: PreTrainedModel, names: Names, decomposition: Decomposition) -> None:
    """Put cores in the place of a dense matrix; they train where it did."""
    dense = module_at(model, names[0])
    module: Any
    if isinstance(dense, nn.Embedding):
        module = MPOEmbedding.from_decomposition(decomposition, dense.padding_idx)
    else:
        module = MPOLinear.from_decomposition(decomposition, dense.bias)
    module.cores.requires_grad_(dense.weight.requires_grad)
    module.rel_error = decomposition.rel_error  # for the model's card
    swap(model, names, module)


def _tied_head(embedding: nn.Embedding | MPOEmbedding) -> nn.Linear | MPOLinear:
    if isinstance(embedding, MPOEmbedding):
        return embedding.as_linear()
    size = (embedding.embedding_dim, embedding.num_embeddings)
    head = nn.Linear(*size, bias=False, device="meta")
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
    for module in model.modules():
        if isinstance(module, MobileBertLMPredictionHead):
            is_mpo = isinstance(module.decoder, MPOLinear)
            module.__class__ = _MobileBertHead if is_mpo else MobileBertLMPredictionHead


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


class _MobileBertHead(MobileBertLMPredictionHead):
    """The same product as `h @ cat([decoder.weight.T, dense.weight])`, by the decoder's forward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.transform(hidden_states)
        width = self.decoder.in_features
        return self.decoder(hidden_states[..., :width]) + torch.matmul(
            hidden_states[..., width:], self.dense.weight
        )
