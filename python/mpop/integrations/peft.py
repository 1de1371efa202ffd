"""Light fine-tuning as a method of peft, and peft's LoRA and prompts over MPO layers.

Importing this module registers them: peft trains, saves and loads them by its own functions then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import lora
from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.utils import cached_file

from mpo_kernels import InterpolativeLinear, MPOEmbedding, MPOExperts, MPOLinear
from mpo_kernels.cores.chain import check_finite
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLayer, BlockwiseLinear
from mpo_kernels.layers.module import MPOModule
from mpop.checkpoints.keys import read_shapes
from mpop.models.matrices import check_no_experts, check_not_quantized, is_dense

_PREFIX = "mpo_light_"
_CORES = f"{_PREFIX}cores"


class LightType(str, Enum):
    """A type beside those of `peft.PeftType`, which is closed."""

    MPO_LIGHT = "MPO_LIGHT"


_PEFT_TYPE: Any = LightType.MPO_LIGHT


@dataclass
class LightConfig(PeftConfig):
    """Light fine-tuning: an adapter is a trained copy of the auxiliary cores of MPO layers.

    For a compressed model, its centres quantised or not. What shares a matrix, such as an output
    head tied to the word embeddings, shares its adapter and is targeted with it.

    Args:
        target_modules: names of MPO layers, or the ends of their names; or one regular expression
            for whole names; default all of them. Experts are not adapted: name others.
        exclude_modules: layers left out, given in the same way.
        modules_to_save: modules that train whole and are saved with the adapter, such as a head.
        bias: `"none"`; `"all"` or `"mpo_light_only"` train the model's or these layers' biases
            too, which are not kept apart for each adapter.

    Raises:
        ValueError: another `bias`. Injection raises it for a dense model, for targets that fit no
            MPO layer, or a dense one, and for a saved adapter that is not of this base; the model
            is as it was.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    # Of the tensors in the file beside a configuration, where it was loaded.
    saved_shapes: ClassVar[dict[str, tuple[int, ...]] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        if self.bias not in ("none", "all", f"{_PREFIX}only"):
            raise ValueError(f"bias: expected none, all or {_PREFIX}only, got {self.bias!r}")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> LightConfig:
        """As peft's; what the adapter's file holds is noted, to be compared with a base.

        Raises:
            ValueError: no `adapter_config.json`.
            OSError: no `adapter_model.safetensors`, or a truncated one.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        of_hub, *_ = cls._split_kwargs(kwargs)
        file = cached_file(
            pretrained_model_name_or_path,
            SAFETENSORS_WEIGHTS_NAME,
            subfolder=subfolder or "",
            **of_hub,
        )
        config.saved_shapes = read_shapes([str(file)])
        return config


class AdapterCores(nn.ParameterList):
    """The auxiliary cores of one adapter, and of the base those that it took the place of."""

    replaced: list[Tensor] | None = None


class LightLayer(nn.Module, BaseTunerLayer):
    """An MPO layer that computes with the auxiliary cores of its active adapter.

    Its other attributes are those of `base_layer`.
    """

    adapter_layer_names = (_CORES,)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mpo_light_cores = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """What the base layer takes and gives; with names, each row by the adapter named for it.

        Raises:
            ValueError: other than a name a row, or a merged adapter where rows have names.
        """
        if adapter_names is not None and len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if adapter_names is not None and self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        if self.disable_adapters:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        if adapter_names is None:
            return self._adapted(x, self.one_of(self.active_adapters))
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name if name in self.mpo_light_cores else None, []).append(row)
        order = [row for part in rows.values() for row in part]
        parts = [self._adapted(x[part], name) for name, part in rows.items()]
        return (
            torch.cat(parts)[sorted(order, key=order.__getitem__)] if parts else self.base_layer(x)
        )

    def _adapted(self, x: Tensor, name: str | None) -> Tensor:
        if name is None:
            return self.base_layer(x)
        # As peft has it, the adapters of a model in 16 bits are held in 32.
        cores = {key: ours.to(own.dtype) for key, own, ours in self._pairs(name)}
        return functional_call(self.base_layer, cores, (x,), tie_weights=False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As peft's; a ValueError for two adapters of this layer."""
        self.one_of([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode)

    def one_of(self, adapter_names: Iterable[str]) -> str | None:
        """Of these adapters that of this layer, if any; a ValueError for two."""
        ours = [name for name in adapter_names if name in self.mpo_light_cores]
        if len(ours) > 1:
            raise ValueError(
                f"expected one adapter of a layer, since each replaces cores, got {ours}"
            )
        return ours[0] if ours else None

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapter whose cores the base layer has now, if any."""
        return [name for name in self.mpo_light_cores if self._cores_of(name).replaced is not None]

    def to_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> str | None:
        """The adapter that would be merged, if any.

        Raises:
            ValueError: two adapters of this layer, or for a safe merge NaN or Inf in it.
        """
        name = self.one_of(self.active_adapters if adapter_names is None else adapter_names)
        if name is not None and safe_merge:
            check_finite(list(self._cores_of(name)))
        return name

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the base layer have an adapter's cores, in place of its own or of another's."""
        name = self.to_merge(safe_merge, adapter_names)
        if name is None or name in self.merged_adapters:
            return
        cores = self._cores_of(name)
        self.unmerge()
        cores.replaced = [own.data for _, own, _ in self._pairs(name)]
        for _, own, ours in self._pairs(name):
            own.data = ours.data.to(own.dtype).contiguous()

    def unmerge(self) -> None:
        """Give the base layer its own cores back."""
        for name in self.merged_adapters:
            cores = self._cores_of(name)
            for (_, own, _), replaced in zip(self._pairs(name), cores.replaced or (), strict=True):
                own.data = replaced.to(own)
            cores.replaced = None

    def _cores_of(self, adapter_name: str) -> AdapterCores:
        cores: Any = self.mpo_light_cores[adapter_name]
        return cores

    def _pairs(self, adapter_name: str) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """The base layer's auxiliary cores by name, and an adapter's."""
        base = _auxiliary(self.base_layer).items()
        cores = self._cores_of(adapter_name)
        return [(key, own, ours) for (key, own), ours in zip(base, cores, strict=True)]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        return _device_and_dtype(base_layer)


class LightModel(BaseTuner):
    """What `peft.get_peft_model` makes of a model and a `LightConfig`."""

    prefix = _PREFIX
    tuner_layer_cls = LightLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        # peft calls this before it changes anything.
        check_not_quantized(self.model)
        if peft_config.target_modules is None:
            check_no_experts(self.model, "name other layers in target_modules")
        matrices = _selected(self.model, peft_config)
        if peft_config.saved_shapes is not None:
            _check_saved(self.model, peft_config, matrices)
        for layer in self._layers:
            layer.unmerge()
        self._new: dict[str, tuple[list[str], AdapterCores]] = {}
        for names in matrices:
            cores = AdapterCores(core.detach().clone() for core in _cores_at(self.model, names[0]))
            self._new |= {name: (names, cores) for name in names}
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._new

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # peft would come once to a layer that sits in several places.
        names, cores = self._new[current_key]
        for name in names:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, LightLayer):
                layer = LightLayer(layer)
                self.model.set_submodule(name, layer)
            layer.mpo_light_cores[adapter_name] = cores

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # peft's own would set the weight, which an MPO layer lacks.
        setattr(parent, child_name, new_module)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # else peft would warn of adapters that are not tied; here they are

    @property
    def _layers(self) -> list[LightLayer]:
        return [module for module in self.model.modules() if isinstance(module, LightLayer)]

    # peft meets what is wrong with a layer when it comes to it, others being changed by then.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in self._layers:
            layer.one_of(names)
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        for layer in self._layers:
            layer.to_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        for layer in self._layers:
            layer.to_merge(safe_merge, adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        with _named_rows(self, adapter_names, kwargs.get("num_beams")):
            yield


@contextmanager
def _named_rows(
    tuner: BaseTuner, adapter_names: Sequence[str] | None, num_beams: int | None
) -> Iterator[None]:
    """Tell the layers which adapter each row of the batch is for, as peft's LoRA tells its own.

    Raises:
        ValueError: a model in training, or names of no adapter of either kind.
    """
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [each for each in tuner.modules() if isinstance(each, LightLayer | lora.LoraLayer)]
    known = {"__base__"}.union(*(layer._get_available_adapters() for layer in layers))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    beams = num_beams or 1
    # Beams repeat the rows of a decoder, not those of the encoder that it looks at.
    encoder = _get_encoder(tuner.model) if beams > 1 else None
    inside = set() if encoder is None else set(encoder.modules())
    with ExitStack() as hooks:
        wrappers = [each for each in tuner.modules() if isinstance(each, AuxiliaryTrainingWrapper)]
        for module in (*layers, *wrappers):
            names = [
                name for name in adapter_names for _ in range(1 if module in inside else beams)
            ]
            hook = module.register_forward_pre_hook(partial(_give, names), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def _give(
    adapter_names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _auxiliary(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The auxiliary cores of an MPO layer by their names in it; of another module, none."""
    is_stacked = isinstance(layer, MPOExperts)
    if isinstance(layer, MPOModule | InterpolativeLinear) and not is_stacked:
        return {f"cores.{k}": c for k, c in enumerate(layer.cores) if k != layer.central}
    if isinstance(layer, BlockwiseLayer):
        return {f"auxiliary.{k}": core for k, core in enumerate(layer.auxiliary)}
    return {}


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LightLayer) else layer


def _cores_at(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(_auxiliary(_base(model.get_submodule(name))).values())


def _matrices(model: nn.Module) -> list[list[str]]:
    """The names of the layers that can be adapted, those that share their cores together."""
    groups: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            cores = _auxiliary(_base(child))
            if cores and not isinstance(parent, LightLayer):
                key = id(next(iter(cores.values())))
                place = f"{prefix}.{name}".removeprefix(".").removesuffix(".base_layer")
                groups.setdefault(key, []).append(place)
    return list(groups.values())


def _selected(model: nn.Module, config: LightConfig) -> list[list[str]]:
    """The matrices that a configuration targets.

    Raises:
        ValueError: a dense model, targets that fit no MPO layer or a dense one, or adapters of
            another kind on one.
    """
    matrices = _matrices(model)
    if not matrices:
        raise ValueError(
            f"expected a compressed model, got a dense {type(model).__name__}: mpop.load a saved "
            "one, or mpop.compress it"
        )
    anything = replace(config, target_modules=".*")
    matrices = [names for names in matrices if all(_fits(anything, name) for name in names)]
    if not matrices:
        raise ValueError("exclude_modules and modules_to_save leave no MPO layer to adapt")
    if config.target_modules is not None:
        matrices = _targeted(model, config, matrices)
    for name in (name for names in matrices for name in names):
        _check_lone(name, model.get_submodule(name), LightLayer)
    return matrices


def _targeted(model: nn.Module, config: LightConfig, matrices: list[list[str]]) -> list[list[str]]:
    """Those that `target_modules` names; raises as :func:`_selected`."""
    targets: Any = config.target_modules
    each = [targets] if isinstance(targets, str) else [[target] for target in targets]
    patterns = [replace(config, target_modules=target) for target in each]
    for pattern in patterns:
        for name, module in model.named_modules():
            if is_dense(module) and _fits(pattern, name):
                raise ValueError(
                    f"target_modules: expected MPO layers, got {name}, a dense "
                    f"{type(module).__name__}: put it in exclude_modules or in modules_to_save"
                )
        if not any(_fits(pattern, name) for names in matrices for name in names):
            raise ValueError(
                f"target_modules: expected MPO layers such as {matrices[0][0]!r}, got "
                f"{pattern.target_modules!r}, which fits none of {len(matrices)}"
            )
    return [
        names
        for names in matrices
        if any(_fits(pattern, name) for pattern in patterns for name in names)
    ]


def _fits(config: PeftConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def _check_saved(model: nn.Module, config: LightConfig, matrices: list[list[str]]) -> None:
    """Raise a ValueError unless a saved adapter is one of this model."""
    expected: dict[str, tuple[int, ...]] = {}
    for names in matrices:
        for k, core in enumerate(_cores_at(model, names[0])):
            expected |= {f"{name}.{_CORES}.{k}": tuple(core.shape) for name in names}
    heads = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if name.endswith(heads):
            state = getattr(module, "original_module", module).state_dict()
            expected |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    saved = config.saved_shapes or {}
    found = {key.removeprefix("base_model.model."): shape for key, shape in saved.items()}
    for key in found:
        if f".{_CORES}." in key and key not in expected:
            raise ValueError(f"{key}: this adapter is of another base, which has this core")
    for key, shape in expected.items():
        if key not in found:
            raise ValueError(f"{key}: missing from the adapter, which may be of another base")
        if found[key] != shape:
            raise ValueError(
                f"{key}: expected {list(shape)} for this base, got {list(found[key])}: "
                "the adapter is of another"
            )


def _device_and_dtype(base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    # peft asks the weight, which is on meta.
    core = next(base_layer.parameters())
    return core.device, core.dtype


class MPOLoraLinear(lora.Linear):
    """LoRA beside an MPO layer: `base_layer(x) + B A x`."""

    @property
    def lora_variants(self) -> dict:
        return {(): None}  # the others read the dense weight

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        return _device_and_dtype(base_layer)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always; the sum of an MPO and of B A has larger bonds than the MPO.
        """
        raise ValueError(
            "LoRA cannot be merged into MPO cores, whose ranks would grow: serve it as an adapter, "
            "or save it, make the model dense with mpop.merge, and load and merge it there"
        )


class MPOLoraModel(lora.LoraModel):
    """peft's LoRA, which finds MPO layers besides those that peft knows."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        check_not_quantized(model)
        super()._prepare_model(peft_config, model)
        if str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= _hidden_linears(model)
        for name, module in model.named_modules():
            # Of a layer that has an adapter already, what is within.
            place = name.removesuffix(".base_layer")
            if isinstance(module, MPOModule | BlockwiseLayer) and _fits(peft_config, place):
                _check_lone(place, model.get_submodule(place), lora.LoraLayer)
                _check_plain(peft_config, place, module)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # peft looks for a parameter of a tie's name, which a list of cores is not.
        tied = super()._get_module_names_tied_with_embedding()
        for names in _matrices(self.model):
            modules = {name: self.model.get_submodule(name) for name in names}
            tables = {name for name in names if isinstance(modules[name], MPOEmbedding)}
            tied += sorted(modules.keys() - tables) if tables else []
        return tied

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        for name in tied_weight_keys:
            if _auxiliary(self.model.get_submodule(name)):
                raise ValueError(
                    f"ensure_weight_tying: {name} shares an embedding's cores and cannot share a "
                    "copy of them: leave both out of modules_to_save, or use LightConfig for them"
                )
        super()._add_modules_to_save_to_tie(peft_config, tied_weight_keys)

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if isinstance(target, MPOLinear | InterpolativeLinear | BlockwiseLinear):
            return MPOLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        return lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, MPOLoraLinear):  # peft's own moves it to where the weight is
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        with (
            super()._enable_peft_forward_hooks(*args, **kwargs),
            _named_rows(self, adapter_names, kwargs.get("num_beams")),
        ):
            yield

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, MPOLoraLinear):
                module.merge()


def _hidden_linears(model: nn.Module) -> set[str]:
    """The names of the MPO linears, but for a language model's output head and those adapted."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, MPOLinear | InterpolativeLinear | BlockwiseLinear)
        and module is not head
        and not name.endswith(".base_layer")
    }


def _check_lone(name: str, layer: nn.Module, kind: type[BaseTunerLayer]) -> None:
    """Raise a ValueError for adapters of another kind, which would be adapted with the layer."""
    if isinstance(layer, BaseTunerLayer) and not isinstance(layer, kind):
        raise ValueError(
            f"{name}: expected an MPO layer without adapters of another kind, got a "
            f"{type(layer).__name__}: put it in exclude_modules, or unload those first"
        )


def _check_plain(config: LoraConfig, name: str, module: nn.Module) -> None:
    """Raise an error unless LoRA of this kind needs no dense weight of this module."""
    if isinstance(module, MPOEmbedding | BlockwiseEmbedding):
        raise TypeError(f"{name}: LoRA takes MPO linears, got an embedding: use LightConfig for it")
    if isinstance(module, MPOExperts):
        raise TypeError(f"{name}: LoRA takes MPO linears, got experts: name others")
    variants = [
        field.name
        for field in fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        variants.append(f"init_lora_weights={config.init_lora_weights!r}")
    if variants:
        raise ValueError(f"{name}: expected plain LoRA over an MPO layer, got {variants[0]}")


def _finding_words(setup: Any) -> Any:
    """peft's setup of a prompt, which finds words that are an MPO as it finds a dense table.

    It searches the parameters for one with a row a word, and takes the module that has it.
    """

    @wraps(setup)
    def with_tables(self: PeftModel, adapter_name: str) -> None:
        with ExitStack() as after:
            for module in self.base_model.modules():
                words: Any = _base(module)
                if isinstance(words, MPOEmbedding | BlockwiseEmbedding):
                    one = next(words.parameters()).new_empty(1, 1)
                    table = one.expand(words.num_embeddings, words.embedding_dim)
                    module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
                    after.callback(module._parameters.pop, "weight", None)
            setup(self, adapter_name)

    return with_tables


PeftModel._setup_prompt_encoder = _finding_words(  # type: ignore[method-assign]
    PeftModel._setup_prompt_encoder
)
PEFT_TYPE_TO_CONFIG_MAPPING[_PEFT_TYPE] = LightConfig
PEFT_TYPE_TO_TUNER_MAPPING[_PEFT_TYPE] = LightModel
PEFT_TYPE_TO_PREFIX_MAPPING[_PEFT_TYPE] = _PREFIX
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = MPOLoraModel
