"""The hooks by which transformers loads, writes and merges MPO models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer

from mpo_kernels import MPOEmbedding, MPOExperts
from mpo_kernels.layers.quantized import QuantizedLayer
from mpo_kernels.layers.unformed import UnformedWeight
from mpop.checkpoints.keys import (
    Contents,
    are_dense,
    check_shapes,
    first_targets,
    keep_whole,
    state_to_save,
    tie,
)
from mpop.models.config import STORES, ModuleSpec, MPOConfig
from mpop.models.matrices import (
    MPO,
    OTHER_EMBEDDINGS,
    compressed_matrices,
    describe,
    kind_of,
    module_at,
    mpo_matrices,
    sorted_matrices,
    turned,
    weight_key,
    weight_of,
)
from mpop.models.plain import check_unwrapped
from mpop.models.selection import MatrixPlan, plan, warn_uncalibrated
from mpop.models.swapping import densify, drop_broken_ties, empty_mpo, replace, swap, update_ties

# transformers initialises what was not loaded; a weight without values bears its mark of what was.
# So does what some of their models initialise by the name of experts' parameters.
_made: Any
for _made in (UnformedWeight, MPOExperts):
    _made._is_hf_initialized = True


@register_quantizer("mpo")
class MPOQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` call for a model with an `MPOConfig`."""

    quantization_config: MPOConfig

    def __init__(self, quantization_config: MPOConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.planned: dict[str, MatrixPlan] = {}
        self.padded: dict[MPOEmbedding, int] = {}
        self.asked: set[str] = set()
        self.refused: str | None = None
        self.frozen: list[str] = []
        self.is_dense = False

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
        config, state = self.quantization_config, _local(2, "state_dict")
        is_dense = config.compress is not None
        contents = Contents(model, checkpoint_files, state, _local(2, "key_mapping"), is_dense)
        specs = config.specs()
        places = contents.places(specs, model.state_dict())
        tie(model, contents, places)
        if config.compress is not None:
            # Whichever name of a matrix a file has.
            matrices = plan(model, config.compress)
            if not all(matrix.is_exact for matrix in matrices):
                warn_uncalibrated()
            self.planned = {
                weight_key(model, name): matrix for matrix in matrices for name in matrix.names
            }
            self.asked = first_targets(self.planned, contents.conversions)
            return
        found = contents.of_dense(model)
        reasons = sorted_matrices(model)
        matched = {
            names: specs[places[name]] for names in reasons for name in names if name in places
        }
        for names in matched:
            # An embedding may have been the words' once, as a decoder's.
            if reasons[names] not in (None, OTHER_EMBEDDINGS):
                raise ValueError(
                    f"{names[0]}: held as cores in the checkpoint, which a {type(model).__name__} "
                    f"cannot use ({reasons[names]}): merge the checkpoint first (mpop merge)"
                )
        if not matched:
            raise ValueError(
                f"none of the {len(specs)} compressed matrices of this checkpoint, such as "
                f"{next(iter(specs))!r}, has its place in a {type(model).__name__}"
            )
        self.is_dense = are_dense(matched.items(), found)
        if self.is_dense:
            return
        for names, spec in matched.items():
            swap(model, names, _empty(model, names[0], spec))
        update_ties(model)
        self.hide_padding(model)
        self.frozen = [names[0] for names, spec in matched.items() if spec.frozen]
        check_shapes(model, contents)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return param_name in self.asked

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
        if self.is_dense:
            self.remove_quantization_config(model)
        for name in self.frozen:
            module_at(model, name).freeze_central()
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

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any], dict[str, str]]:
        # `save_pretrained` calls this first, takes what is returned for the state, and forgets the
        # one it was given: that of a sharded model, gathered.
        state = _local(1, "state_dict")
        state = model.state_dict() if state is None else state
        if model._hf_peft_config_loaded:  # it saves an adapter alone, without a config
            return state, {}
        check_unwrapped(model)
        if not compressed_matrices(model):
            self.remove_quantization_config(model)
            return state, {}
        attach(model)  # ranks may have changed since the model was compressed
        keep_whole(model)
        return state_to_save(model, state), {}

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
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for key in list(input_dict):  # several, where one tensor of the file is split
            weight = input_dict.pop(key)
            matrix = self.quantizer.planned.get(key)
            if matrix is None:
                made[key] = weight
            elif self.quantizer.refused is None and not _is_done(model, matrix):
                weight = weight[0] if isinstance(weight, list) else weight
                made |= self._cores(matrix, weight, model, missing_keys)
        return made

    def _cores(
        self, matrix: MatrixPlan, weight: Tensor, model: PreTrainedModel, missing_keys: set[str]
    ) -> dict[str, Tensor]:
        name = matrix.names[0]
        keys = {weight_key(model, each) for each in matrix.names}
        try:
            cores = matrix.decompose(turned(module_at(model, name), weight))
        except (TypeError, ValueError) as error:
            # Raised here it would become a page of transformers' own; it is raised after loading.
            self.quantizer.refused = f"{name}: {error}"
            return {}
        replace(model, matrix.names, cores)
        update_ties(model)
        self.quantizer.hide_padding(model)
        missing_keys.difference_update(keys)
        return {f"{name}.cores.{k}": core for k, core in enumerate(cores.cores)}


def _is_done(model: PreTrainedModel, matrix: MatrixPlan) -> bool:
    """Whether a file has it a second time, by the name of another module."""
    return isinstance(module_at(model, matrix.names[0]), MPO)


# What else is done where there is a compressed model, such as telling packages of it.
ON_ATTACH: list[Callable[[], None]] = []


def attach(model: PreTrainedModel) -> None:
    """Let `model.save_pretrained` write a compressed model as an MPO checkpoint."""
    for tell in ON_ATTACH:
        tell()
    drop_broken_ties(model)
    config = describe(model)
    model.config.quantization_config = config
    model.hf_quantizer = MPOQuantizer(config)  # type: ignore[assignment]


def _empty(model: PreTrainedModel, name: str, spec: ModuleSpec) -> MPO | QuantizedLayer:
    """What the checkpoint has in the place of a dense module, without values."""
    dense, shape = module_at(model, name), spec.shape
    *experts, out_features, in_features = weight_of(dense).shape
    expected = (kind_of(dense), *experts, out_features, in_features)
    stack = () if spec.experts is None else (spec.experts,)
    found = (spec.kind, *stack, shape.out_features, shape.in_features)
    if found == expected:
        made: Any = empty_mpo(dense, shape, spec.form, spec.shared)
        return made if spec.store is None else made.quantized(STORES[spec.store])
    if isinstance(dense, nn.Linear) and found == ("embedding", in_features, out_features):
        # A head that shared the cores of an embedding once, and has such ones of its own now.
        device, dtype = dense.weight.device, dense.weight.dtype
        table = MPOEmbedding(out_features, in_features, shape, device=device, dtype=dtype)
        return table.as_linear()
    raise ValueError(
        f"{name}: expected (kind, [experts,] out, in) = {expected} in a {type(model).__name__}, "
        f"got {found} in the checkpoint's configuration"
    )


def _local(depth: int, name: str) -> Any:
    """A variable of the function of transformers that asks, which does not pass it on."""
    return sys._getframe(depth + 1).f_locals.get(name)
