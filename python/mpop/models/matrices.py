"""The matrices of a transformers model: which there are, what holds them, what is said of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpo_kernels import InterpolativeLinear, MPOEmbedding, MPOExperts, MPOLinear, MPOShape
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLayer
from mpo_kernels.layers.embedding import MPOTiedLinear
from mpo_kernels.layers.quantized import QuantizedInterpolativeLinear, QuantizedLayer
from mpo_kernels.layers.unformed import UnformedLayer
from mpop.models.config import INTERPOLATIVE, STORES, ModuleSpec, MPOConfig
from mpop.models.reads import weights_read
from mpop.models.subclasses import DenseExperts, expert_parameters

DenseLayer: TypeAlias = nn.Linear | Conv1D | nn.Embedding
Dense: TypeAlias = DenseLayer | DenseExperts
MPO: TypeAlias = MPOLinear | InterpolativeLinear | MPOEmbedding | MPOExperts
Interpolative: TypeAlias = InterpolativeLinear | QuantizedInterpolativeLinear
Compressed: TypeAlias = MPO | BlockwiseLayer | QuantizedLayer
Names: TypeAlias = tuple[str, ...]  # the modules that hold one matrix, its owner first

_KINDS: dict[type[DenseLayer], str] = {
    nn.Linear: "linear",
    Conv1D: "conv1d",
    nn.Embedding: "embedding",
}


OTHER_EMBEDDINGS = "embeddings other than of words"


def module_at(model: nn.Module, name: str) -> Any:
    """The submodule of this dotted name, of whatever type the caller knows it to be.

    Where it is that of a parameter, which experts have their matrices in, what stands for it.
    """
    owner, _, leaf = name.rpartition(".")
    holder = model.get_submodule(owner)
    return DenseExperts(holder, leaf) if leaf in holder._parameters else model.get_submodule(name)


def _shared(model: nn.Module, held: dict[str, tuple[Tensor, ...]]) -> list[Names]:
    """Group module names by the very tensors they hold; an embedding owns what a head shares."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in held.items():
        groups.setdefault(tuple(map(id, tensors)), []).append(name)

    def is_head(name: str) -> bool:
        return not is_embedding(module_at(model, name))

    return [tuple(sorted(names, key=is_head)) for names in groups.values()]


def dense_matrices(model: PreTrainedModel) -> list[Names]:
    """The matrices that can be compressed: those of Linears, Conv1Ds and the word embeddings."""
    return [names for names, reason in sorted_matrices(model).items() if reason is None]


def sorted_matrices(model: PreTrainedModel) -> dict[Names, str | None]:
    """All dense matrices of layers, and why one cannot be compressed; None where it can.

    A matrix can be where its modules do no more than `nn.Linear`, `Conv1D` or `nn.Embedding` do,
    and nothing reads its values but they; those of experts, which stand for one, where transformers
    knows how they are computed.
    """
    held: dict[str, tuple[Tensor, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_dense(module):
            held[name] = (module.weight,)
        for leaf in expert_parameters(module):
            if leaf in module._parameters:
                held[f"{name}.{leaf}"] = (module._parameters[leaf],)
    try:
        words = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a model without words, such as of images
        words = None
    layers = [module_at(model, name) for name in held]
    linears = [each for each in layers if isinstance(each, nn.Linear | Conv1D)]
    alike = [type(each).forward for each in linears if _is_alike(each)]
    read = weights_read(model, alike)

    def reason(names: Names) -> str | None:
        modules = [module_at(model, name) for name in names]
        if isinstance(modules[0], nn.Embedding) and held[names[0]][0] is not words:
            return OTHER_EMBEDDINGS
        for module in modules:
            if not _is_alike(module):
                return f"of a class of its own, {type(module).__name__}"
            if module in read:
                return f"read by {read[module]}"
        is_one = isinstance(modules[0], nn.Embedding) or len({*modules}) == 1
        return None if is_one else "shared by several layers"

    return {names: reason(names) for names in _shared(model, held)}


def _is_alike(module: nn.Module | DenseExperts) -> bool:
    """Whether a module computes what its base class does, or, of an embedding, above that."""
    if isinstance(module, nn.Embedding | DenseExperts) or type(module).forward in (
        k.forward for k in _KINDS
    ):
        return True
    adds = vars(module).keys() - vars(nn.Linear(1, 1, device="meta")).keys()
    if not isinstance(module, nn.Linear) or any(name != "_is_hf_initialized" for name in adds):
        return False
    cls: Any = type(module)
    return _is_linear(cls, module.bias is not None)


@cache
def _is_linear(cls: Any, bias: bool) -> bool:
    """Whether a subclass of `nn.Linear` without settings of its own is one by another name."""

    def numbers(*size: int) -> Tensor:
        made = torch.linspace(-1, 1, math.prod(size), dtype=torch.float32, device="cpu")
        return made.view(size).mul(9).sin()

    def agrees(size: tuple[int, int], dtype: torch.dtype) -> bool:
        twin = nn.Linear(*size, bias, device="meta", dtype=torch.float32)
        twin.weight, twin.__class__ = nn.Parameter(numbers(*size[::-1])), cls
        if bias:
            twin.bias = nn.Parameter(numbers(size[1]))
        twin.to(dtype)
        for leading in ((), (4,), (2, 3), (1, 2, 2)):
            for scale in (1e-3, 1.0, 1e3):
                x = (scale * numbers(*leading, size[0])).to(dtype)
                right = nn.functional.linear(x, twin.weight, twin.bias)
                found = [twin.train(mode)(x) for mode in (False, True)]
                if not all(y.dtype == dtype and torch.allclose(y, right) for y in found):
                    return False
        return True

    try:
        with torch.random.fork_rng(devices=[]):
            sizes, dtypes = ((3, 2), (8, 8), (32, 64)), (torch.float32, torch.float64)
            return all(agrees(size, dtype) for size in sizes for dtype in dtypes)
    except Exception:  # whatever a class may raise that computes something else
        return False


def mpo_matrices(model: nn.Module) -> list[Names]:
    """The compressed matrices.

    Raises:
        ValueError: quantised centres or matrices.
    """
    check_centres(model)
    check_not_quantized(model)
    return compressed_matrices(model)


def expert_names(model: nn.Module) -> list[str]:
    """The names of the stacks of cores that are experts'."""
    return [name for name, module in model.named_modules() if isinstance(module, MPOExperts)]


def check_no_experts(model: nn.Module, instead: str) -> None:
    """Raise a ValueError where cores are experts', which says what to do `instead`."""
    if names := expert_names(model):
        raise ValueError(
            f"{names[0]}: expected cores of layers, got those of experts, for which this is not "
            f"done: {instead}"
        )


def check_centres(model: nn.Module) -> None:
    """Raise a ValueError where centres are quantised."""
    if any(isinstance(module, BlockwiseLayer) for module in model.modules()):
        raise ValueError("the centres are quantised: call mpop.dequantize_centres(model) first")


def check_not_quantized(model: nn.Module) -> None:
    """Raise a ValueError that names the first matrix whose cores are int8 or e4m3."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise ValueError(
                f"{name}: expected cores of 16 bits or more, got {store_of(module)}, which neither "
                "train nor change: take the model as it was before mpop.quantize (mpop compress "
                "without --store), and quantize last"
            )


def check_not_interpolative(model: nn.Module, instead: str) -> None:
    """Raise a ValueError that names the first matrix in that form, and says what to do instead."""
    for name, module in model.named_modules():
        if isinstance(module, InterpolativeLinear):
            raise ValueError(
                f"{name}: expected plain cores, got a matrix in interpolative form: {instead}"
            )


def compressed_matrices(model: nn.Module) -> list[Names]:
    """The compressed matrices, those with quantised centres and quantised ones too."""
    held = {
        name: tensors_of(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compressed)
    }
    return _shared(model, held)


def tensors_of(module: Compressed) -> tuple[Tensor, ...]:
    """Those that hold the matrix of a module, without a bias."""
    if isinstance(module, BlockwiseLayer):
        return (*module.auxiliary, module.codes, module.scales)
    if isinstance(module, QuantizedInterpolativeLinear):
        return (*module.codes, *module.scales, module.order)
    if isinstance(module, QuantizedLayer):
        return (*module.codes, *module.scales)
    if isinstance(module, InterpolativeLinear):
        return (*module.cores, module.order)
    return tuple(module.cores)


def store_of(module: Compressed) -> str | None:
    """One of `config.STORES` where the cores are quantised."""
    if not isinstance(module, QuantizedLayer):
        return None
    return next(store for store, dtype in STORES.items() if dtype == module.dtype)


def check_own_cores(model: nn.Module) -> None:
    """Raise a ValueError where two matrices share a core, which could not be changed for one."""
    owners: dict[int, str] = {}
    for names in mpo_matrices(model):
        for core in module_at(model, names[0]).cores:
            owner = owners.setdefault(id(core), names[0])
            if owner != names[0]:
                raise ValueError(
                    f"expected matrices with cores of their own, got {owner} and {names[0]}, which "
                    "share one"
                )


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
        specs.update({name: spec_of(module_at(model, name)) for name in owners.values()})
    return MPOConfig.from_specs(specs)


def spec_of(module: Compressed) -> ModuleSpec:
    """What a checkpoint says of a module."""
    if isinstance(module, BlockwiseLayer):
        is_light = all(core.requires_grad for core in module.auxiliary)
    elif isinstance(module, QuantizedLayer):
        is_light = False
    else:
        trained = [core.requires_grad for core in module.cores]
        is_light = trained == [k != module.central for k in range(len(trained))]
    experts = module.num_experts if isinstance(module, MPOExperts) else None
    form = INTERPOLATIVE if isinstance(module, Interpolative) else None
    kind, store, shared = kind_of_mpo(module), store_of(module), getattr(module, "shared", None)
    return ModuleSpec(kind, module.shape, is_light, store, experts, form, shared)


def weight_key(model: nn.Module, name: str) -> str:
    """What the dense model's state holds, or did, in the place of the module of this name."""
    is_of_experts = isinstance(module_at(model, name), DenseExperts | MPOExperts)
    return name if is_of_experts else f"{name}.weight"


def matrices_in(module: Compressed) -> int:
    """How many have this shape: those of experts, or one."""
    return module.num_experts if isinstance(module, MPOExperts) else 1


def sizes(shape: MPOShape, count: int) -> str:
    """Of a matrix, or of so many, as text."""
    return f"{f'{count} × ' if count > 1 else ''}{shape.in_features} × {shape.out_features}"


def parameters_of(module: Compressed) -> tuple[int, int]:
    """What a module holds for its matrix, or those of experts, and what the dense one does."""
    count, shape = matrices_in(module), module.shape
    held = count * shape.num_parameters
    if isinstance(module, Interpolative | MPOExperts):
        held = sum(core.numel() for core in module.cores)
    return held, count * shape.dense_parameters


def weight_of(dense: Dense) -> Tensor:
    """The weight as `[out, in]`, where an embedding is a map from the vocabulary.

    Those of experts as `[E, out, in]`.
    """
    return turned(dense, dense.weight)


def turned(dense: Dense, weight: Tensor) -> Tensor:
    """From the layout that a dense module has its weight in to that of `weight_of`, or back."""
    if isinstance(dense, DenseExperts):
        return weight.mT if dense.owner.is_transposed else weight
    return weight if isinstance(dense, nn.Linear) else weight.t()


def inputs_of(module: Dense | MPO) -> int:
    """The size of what a matrix maps: features, or the vocabulary."""
    if isinstance(module, MPOTiedLinear):
        return module.in_features  # its cores are a table's
    return module.shape.in_features if isinstance(module, MPO) else weight_of(module).shape[-1]


def outputs_of(module: Dense | MPO) -> int:
    """The size of what a matrix maps to: features, of an embedding its dimension."""
    if isinstance(module, MPOTiedLinear):
        return module.out_features
    return module.shape.out_features if isinstance(module, MPO) else weight_of(module).shape[-2]


def is_dense(module: nn.Module) -> bool:
    """Whether it holds a matrix as such."""
    return isinstance(module, DenseLayer) and not isinstance(module, UnformedLayer)


def is_embedding(module: nn.Module | DenseExperts) -> bool:
    """Whether its inputs are ids."""
    return isinstance(module, nn.Embedding | MPOEmbedding)


def kind_of(dense: Dense) -> str:
    """One of `config.KINDS`."""
    if isinstance(dense, DenseExperts):
        return "experts"
    return next(kind for cls, kind in _KINDS.items() if isinstance(dense, cls))


def kind_of_mpo(module: Compressed) -> str:
    """That of its cores: of a head that was tied once they are an embedding's."""
    if isinstance(module, MPOEmbedding | MPOTiedLinear | BlockwiseEmbedding):
        return "embedding"
    if isinstance(module, MPOExperts):
        return "experts"
    return getattr(module, "kind", None) or "linear"
