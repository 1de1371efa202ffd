"""Whose the tensors of a checkpoint are: what transformers renames, fuses and ties."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import load_state_dict
from transformers.pytorch_utils import id_tensor_storage
from transformers.quantizers import get_module_from_name

from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpop.models.config import STORES, ModuleSpec
from mpop.models.matrices import Names, compressed_matrices, module_at, spec_of, weight_key
from mpop.models.swapping import drop_broken_ties

# Of a prefix that a file may have or lack; the first versions of transformers 5 know none.
_PREFIXES = getattr(core_model_loading, "PrefixChange", ())
# By what a module that is held as cores is known: the first of them, whatever they are stored in.
_FIRST = ("cores.0", *(f"{store}_core_0" for store in STORES))
# What stands for a weight in a file.
_PARTS = re.compile(rf"\.((cores\.|({'|'.join(STORES)})_core_|scale_)\d+|order)$")


class Found(NamedTuple):
    """A tensor of a file."""

    key: str
    shape: tuple[int, ...] | None  # None where it is a part of the model's tensor, or the other way


class Contents:
    """What a checkpoint holds, under the names that its tensors have in a model.

    Args:
        files: of safetensors, or, to be compressed while they are read, pickles as well.
        state: in place of files.
        key_mapping: what the caller of `from_pretrained` has renamed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: Iterable[str | Path] | None,
        state: Mapping[str, Tensor] | None,
        key_mapping: dict[str, str] | None,
        is_dense: bool,
    ) -> None:
        self.files, self.state, self.is_dense = list(files or ()), state, is_dense
        self.prefix = model.base_model_prefix
        self.conversions = get_model_conversion_mapping(model, key_mapping)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the names in the files, whose headers alone are read."""
        if self.state is not None:
            return {key: tuple(tensor.shape) for key, tensor in self.state.items()}
        if not self.is_dense:
            return read_shapes(self.files)
        states = (load_state_dict(file, map_location="meta") for file in self.files)
        return {key: tuple(tensor.shape) for state in states for key, tensor in state.items()}

    def renamed(self, keys: Iterable[str], known: dict[str, Any]) -> dict[str, Found]:
        """What each key is for a model that knows these, by the rule of `from_pretrained`."""
        renamings = [each for each in self.conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in self.conversions if isinstance(each, WeightConverter)]
        found = {}
        for key in sorted(keys, key=dot_natural_key):
            name, fused = rename_source_key(key, renamings, converters, self.prefix, known)
            if name not in known and key in known:
                name, fused = rename_source_key(key, [], [], self.prefix, known)
            found[name] = Found(key, self.shapes.get(key) if fused is None else None)
        return found

    def places(self, specs: Mapping[str, ModuleSpec], known: dict[str, Any]) -> dict[str, str]:
        """By the modules of a model, those of a checkpoint's configuration.

        They have the names of a model, of another class perhaps or of an older transformers.
        """
        places = {}
        for name, spec in specs.items():
            weight = spec.weight(name)
            key, _ = rename_source_key(weight, [], [], self.prefix, known)
            if key not in known:
                (key,) = self.renamed([weight], known)
            places[key.removesuffix(".weight")] = name
        return places

    def of_dense(self, model: PreTrainedModel) -> dict[str, Found]:
        """For a model whose matrices are dense still, those held as cores by the first of these."""
        known = dict(model.state_dict())
        stems = [key[:-6] if key.endswith("weight") else f"{key}." for key in known]
        cores = {f"{stem}{first}": True for stem in stems for first in _FIRST}
        return self.renamed(self.shapes, known | cores)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors of the files have the same values."""
        tensors = [self._read(key) for key in (first, second)]
        return tensors[0].shape == tensors[1].shape and torch.equal(*tensors)

    def _read(self, key: str) -> Tensor:
        if self.state is not None:
            return self.state[key]
        states = (load_state_dict(file) for file in self.files)
        return next(state[key] for state in states if key in state)


def read_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, read from the headers alone.

    Raises:
        ValueError: a file that is not of safetensors.
        OSError: one that is truncated.
    """
    shapes = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise ValueError(f"{file}: expected a safetensors file, pickled weights are refused")
        try:
            with safe_open(file, framework="pt") as tensors:
                keys = tensors.keys()
                shapes.update({key: tuple(tensors.get_slice(key).get_shape()) for key in keys})
        except SafetensorError as error:
            raise OSError(f"{file}: not a whole safetensors file ({error})") from error
    return shapes


def tie(model: PreTrainedModel, contents: Contents, compressed: Collection[str]) -> None:
    """Tie a model on meta before it is loaded, but for what the checkpoint holds apart.

    `from_pretrained` ties after loading, which is too late to tell which modules share cores.

    Args:
        compressed: the modules that the configuration has cores of; others' are of a tie.
    """
    if not model.all_tied_weights_keys:
        return
    found = contents.of_dense(model)

    def key_of(name: str) -> str | None:
        module = name.removesuffix(".weight")
        keys = [f"{module}.{first}" for first in _FIRST] if module in compressed else [name]
        return next((found[key].key for key in keys if key in found), None)

    for target, source in model.all_tied_weights_keys.items():
        first, second = key_of(target), key_of(source)
        if first and second and not (contents.is_dense and contents.are_equal(first, second)):
            continue
        module, name = get_module_from_name(model, target)
        setattr(module, name, model.get_parameter_or_buffer(source))
    drop_broken_ties(model)


def are_dense(matrices: Iterable[tuple[Names, ModuleSpec]], found: Mapping[str, Found]) -> bool:
    """Whether a checkpoint holds all of these as weights and none as cores."""
    return all(
        any(spec.weight(name) in found for name in names)
        and not any(f"{name}.{first}" in found for name in names for first in _FIRST)
        for names, spec in matrices
    )


def check_shapes(model: PreTrainedModel, contents: Contents) -> None:
    """Compare what the files hold with the cores, and with the rest of the base model.

    Raises:
        ValueError: cores that are missing, more than expected or of another shape, or a tensor of
            another shape.
    """
    found = contents.renamed(contents.shapes, model.state_dict())
    for names in compressed_matrices(model):
        spec = spec_of(module_at(model, names[0]))
        name = next((name for name in names if f"{name}.{spec.core(0)}" in found), names[0])
        for tensor, expected in spec.tensors.items():
            key = f"{name}.{tensor}"
            if key not in found:
                raise ValueError(f"{key}: missing from the checkpoint")
            if found[key].shape != expected:
                raise ValueError(
                    f"{key}: expected {list(expected)} by the configuration, "
                    f"got {list(found[key].shape or ())} in the file"
                )
        if f"{name}.{spec.core(spec.shape.num_cores)}" in found:
            raise ValueError(
                f"{name}: expected {spec.shape.num_cores} cores by the configuration, "
                "got more in the file"
            )
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    for key, tensor in base.state_dict(prefix=prefix).items():
        held = found.get(key)
        if held and held.shape is not None and held.shape != tensor.shape:
            raise ValueError(f"{key}: expected {list(tensor.shape)}, got {list(held.shape)}")


def first_targets(keys: Iterable[str], conversions: Iterable[Any]) -> set[str]:
    """What transformers asks about for these: where a tensor of a file is split, the first part."""
    asked = set(keys)
    for converter in conversions:
        if isinstance(converter, WeightConverter):
            first, *others = converter.target_patterns
            asked |= {key.replace(other, first) for key in keys for other in others if other in key}
    return asked


def state_to_save(model: PreTrainedModel, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with plain cores, and a tensor for each name but those that loading ties."""
    state = dict(state)
    for name, layer in model.named_modules():
        if isinstance(layer, BlockwiseLayer) and f"{name}.codes" in state:
            del state[f"{name}.codes"], state[f"{name}.scales"]
            cores = [state.pop(f"{name}.auxiliary.{k}") for k in range(len(layer.auxiliary))]
            # Where the codes are there may be no room for the centres.
            cores.insert(layer.central, layer.centre(dtype=cores[0].dtype).cpu().contiguous())
            state.update({f"{name}.cores.{k}": core for k, core in enumerate(cores)})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in model.all_tied_weights_keys.items():
        if target in parameters and parameters[target] is parameters.get(source):
            state.pop(target, None)
    seen = set()
    for key, tensor in state.items():
        if isinstance(tensor, Tensor):
            place = (id_tensor_storage(tensor), tensor.storage_offset())
            # A second in a place transformers would drop, and safetensors writes no strides.
            state[key] = tensor.clone() if place in seen else tensor
            state[key] = state[key].contiguous()
            seen.add(place)
    return state


def keep_whole(model: PreTrainedModel) -> None:
    """Let `save_pretrained` fuse neither cores nor what they were fused with in the files."""
    held = [weight_key(model, name) for names in compressed_matrices(model) for name in names]
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # Those that it would take itself.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if not isinstance(each, _PREFIXES)]
    if any(isinstance(each, WeightConverter | _Whole) for each in conversions):
        model._weight_conversions = [  # type: ignore[assignment]
            _Whole(each, held) if isinstance(each, WeightConverter | _Whole) else each
            for each in conversions
        ]


class _Whole:
    """A conversion whose reverse leaves alone what a compressed matrix would be a part of."""

    conversion: WeightConverter

    def __init__(self, conversion: WeightConverter | _Whole, held: list[str]) -> None:
        if isinstance(conversion, _Whole):
            conversion = conversion.conversion
        self.conversion = conversion
        self.held = held

    def reverse_transform(self) -> WeightConverter:
        reverse: Any = self.conversion.reverse_transform()
        apart = {reverse.rename_source_key(key)[0] for key in self.held}

        class Reverse(type(reverse)):  # type: ignore[misc]
            __slots__ = ()

            def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
                # What it is a part of, of a layer or of experts.
                rename = super().rename_source_key
                weights = [_PARTS.sub(end, source_key) for end in (".weight", "")]
                if any(rename(weight)[0] in apart for weight in weights):
                    return source_key, None
                return rename(source_key)

        reverse.__class__ = Reverse
        return reverse
