"""The hooks by which transformers loads, writes and merges MPO models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, get_module_from_name, register_quantizer

from mpo_kernels import MPOEmbedding
from mpo_kernels.layers.unformed import UnformedWeight
from mpop.models.config import ModuleSpec, MPOConfig
from mpop.models.matrices import (
    Names,
    densify,
    describe,
    empty_mpo,
    kind_of,
    module_at,
    mpo_matrices,
    mpo_modules,
    replace,
    sorted_matrices,
    swap,
    update_ties,
    weight_of,
)
from mpop.models.plain import check_unwrapped
from mpop.models.selection import MatrixPlan, plan

# transformers initialises what was not loaded; a weight without values bears its mark of what was.
_weight: Any = UnformedWeight
_weight._is_hf_initialized = True


@register_quantizer("mpo")
class MPOQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` call for a model with an `MPOConfig`."""

    quantization_config: MPOConfig

    def __init__(self, quantization_config: MPOConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.planned: dict[str, MatrixPlan] = {}
        self.padded: dict[MPOEmbedding, int] = {}
        self.refused: str | None = None

    def validate_environment(
        self, *args: Any, device_map: str | dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # Before it is inferred it is a word; transformers calls again with what came of it.
        devices = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                "cores are not offloaded to a CPU or a disk: expected a device map without, got "
                f"one over {', '.join(sorted(devices))}"
            )
        config = self.quantization_config
        if self.pre_quantized and not config.modules:
            raise ValueError(
                "expected the configuration of a saved MPO model, got no modules in it"
            )
        if not self.pre_quantized and config.compress is None:
            raise ValueError(
                "expected MPOConfig(compress=CompressionConfig(...)) for a dense checkpoint"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        # The model is on meta here, and the files are checked before anything is allocated.
        _tie(model)
        if self.quantization_config.compress is not None:
            planned = plan(model, self.quantization_config.compress)
            self.planned = {f"{matrix.names[0]}.weight": matrix for matrix in planned}
            return
        specs = self._specs(model)
        matched = []
        for names, reason in sorted_matrices(model).items():
            if (spec := _spec_of(names, specs, model)) is None:
                continue
            if reason is not None:
                raise ValueError(
                    f"{names[0]}: held as cores in the checkpoint, which a {type(model).__name__} "
                    f"cannot use ({reason}): merge the checkpoint first (mpop merge)"
                )
            matched.append((names, spec))
        if not matched:
            raise ValueError(
                f"none of the {len(specs)} compressed matrices of this checkpoint, such as "
                f"{next(iter(specs))!r}, has its place in a {type(model).__name__}"
            )
        for names, spec in matched:
            dense = module_at(model, names[0])
            expected = (kind_of(dense), *weight_of(dense).shape)
            found = (spec.kind, spec.shape.out_features, spec.shape.in_features)
            if found != expected:
                raise ValueError(
                    f"{names[0]}: expected (kind, out, in) = {expected} in a "
                    f"{type(model).__name__}, got {found} in the checkpoint's configuration"
                )
            swap(model, names, empty_mpo(dense, spec.shape))
        update_ties(model)
        self.hide_padding(model)
        if checkpoint_files is not None:
            _check_shapes(model, read_shapes(checkpoint_files))

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return param_name in self.planned

    def get_quantize_ops(self) -> ConversionOps:
        return _Decompose(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.planned:
            if self.refused:
                raise ValueError(self.refused)
            if not mpo_matrices(model):
                raise ValueError(f"the checkpoint has none of {list(self.planned)[:3]} …")
            self.planned = {}
            attach(model)
        specs = self._specs(model)
        for names in mpo_matrices(model):
            if (spec := _spec_of(names, specs, model)) is not None and spec.frozen:
                module_at(model, names[0]).freeze_central()
        for embedding, index in self.padded.items():
            embedding.padding_idx = index
        # Cores are plain floating-point parameters, so `.half()` and `.float()` are fine.
        model.is_quantized = False  # type: ignore[assignment]

    def hide_padding(self, model: PreTrainedModel) -> None:
        """Until all is loaded: where there is a padding_idx, models write zeros to its row."""
        for embedding in model.modules():
            if isinstance(embedding, MPOEmbedding) and embedding.padding_idx is not None:
                self.padded[embedding] = embedding.padding_idx
                embedding.padding_idx = None

    def _specs(self, model: PreTrainedModel) -> dict[str, ModuleSpec]:
        specs = self.quantization_config.specs()
        return {_bare(name, model): spec for name, spec in specs.items()}

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        # `save_pretrained` calls this first; ranks may have changed since the model was compressed.
        if not model._hf_peft_config_loaded:  # else it saves an adapter alone, without a config
            check_unwrapped(model)
            model.config.quantization_config = describe(model)
        # It takes what is returned here for the state, and forgets the one it was given: that of
        # a sharded model, gathered.
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        return caller.f_locals.get("state_dict"), {}  # type: ignore[union-attr]

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        densify(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Decompose(ConversionOps):
    """A dense weight of a checkpoint becomes cores as it is read."""

    def __init__(self, quantizer: MPOQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        matrix = self.quantizer.planned[full_layer_name]
        name = matrix.names[0]
        weight = weight[0] if isinstance(weight, list) else weight
        if not isinstance(module_at(model, name), nn.Linear):
            weight = weight.t()
        if self.quantizer.refused:
            return {}
        try:
            cores = matrix.decompose(weight)
        except (TypeError, ValueError) as error:
            # Raised here it would become a page of transformers' own; it is raised after loading.
            self.quantizer.refused = f"{name}: {error}"
            return {}
        replace(model, matrix.names, cores)
        update_ties(model)
        self.quantizer.hide_padding(model)
        missing_keys.difference_update(f"{name}.weight" for name in matrix.names)
        return {f"{name}.cores.{k}": core for k, core in enumerate(cores.cores)}


def attach(model: PreTrainedModel) -> None:
    """Let `model.save_pretrained` write a compressed model as an MPO checkpoint."""
    config = describe(model)
    model.config.quantization_config = config
    model.hf_quantizer = MPOQuantizer(config)  # type: ignore[assignment]


def _tie(model: PreTrainedModel) -> None:
    # `from_pretrained` ties after loading, which is too late to tell which modules share cores.
    for target, source in model.all_tied_weights_keys.items():
        module, name = get_module_from_name(model, target)
        setattr(module, name, model.get_parameter_or_buffer(source))


def _bare(name: str, model: PreTrainedModel) -> str:
    # A bare BertModel and a BertForX name their modules alike but for this prefix.
    return name.removeprefix(f"{model.base_model_prefix}.")


def _spec_of(
    names: Names, specs: Mapping[str, ModuleSpec], model: PreTrainedModel
) -> ModuleSpec | None:
    bare = (_bare(name, model) for name in names)
    return next((specs[name] for name in bare if name in specs), None)


def read_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, read from the headers alone."""
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


def _check_shapes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what the file holds with the cores, and with the rest of the base model."""
    found = {_bare(key, model): shape for key, shape in shapes.items()}
    for name, module in mpo_modules(model):
        name = _bare(name, model)
        for k, expected in enumerate(module.shape.core_shapes):
            key = f"{name}.cores.{k}"
            if key not in found:
                raise ValueError(f"{key}: missing from the checkpoint")
            if found[key] != expected:
                raise ValueError(
                    f"{key}: expected {list(expected)} by the configuration, "
                    f"got {list(found[key])} in the file"
                )
        if f"{name}.cores.{module.shape.num_cores}" in found:
            raise ValueError(
                f"{name}: expected {module.shape.num_cores} cores by the configuration, "
                "got more in the file"
            )
    for key, tensor in model.base_model.state_dict().items():
        if found.get(key, tensor.shape) != tensor.shape:
            raise ValueError(f"{key}: expected {list(tensor.shape)}, got {list(found[key])}")
