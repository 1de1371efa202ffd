"""What a light adapter is of: its configuration, and the matrices of a model that it targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.utils import cached_file

from mpop.checkpoints.keys import read_shapes
from mpop.integrations.light_layer import CORES, PREFIX, LightLayer, cores_at, matrices_of
from mpop.models.matrices import is_dense


class LightType(str, Enum):
    """A type beside those of `peft.PeftType`, which is closed."""

    MPO_LIGHT = "MPO_LIGHT"


PEFT_TYPE: Any = LightType.MPO_LIGHT


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
        self.peft_type = PEFT_TYPE
        if self.bias not in ("none", "all", f"{PREFIX}only"):
            raise ValueError(f"bias: expected none, all or {PREFIX}only, got {self.bias!r}")

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


def selected(model: nn.Module, config: LightConfig) -> list[list[str]]:
    """The matrices that a configuration targets.

    Raises:
        ValueError: a dense model, targets that fit no MPO layer or a dense one, or adapters of
            another kind on one.
    """
    matrices = matrices_of(model)
    if not matrices:
        raise ValueError(
            f"expected a compressed model, got a dense {type(model).__name__}: mpop.load a saved "
            "one, or mpop.compress it"
        )
    anything = replace(config, target_modules=".*")
    matrices = [names for names in matrices if all(fits(anything, name) for name in names)]
    if not matrices:
        raise ValueError("exclude_modules and modules_to_save leave no MPO layer to adapt")
    if config.target_modules is not None:
        matrices = _targeted(model, config, matrices)
    for name in (name for names in matrices for name in names):
        check_lone(name, model.get_submodule(name), LightLayer)
    return matrices


def _targeted(model: nn.Module, config: LightConfig, matrices: list[list[str]]) -> list[list[str]]:
    """Those that `target_modules` names; raises as :func:`selected`."""
    targets: Any = config.target_modules
    each = [targets] if isinstance(targets, str) else [[target] for target in targets]
    patterns = [replace(config, target_modules=target) for target in each]
    for pattern in patterns:
        for name, module in model.named_modules():
            if is_dense(module) and fits(pattern, name):
                raise ValueError(
                    f"target_modules: expected MPO layers, got {name}, a dense "
                    f"{type(module).__name__}: put it in exclude_modules or in modules_to_save"
                )
        if not any(fits(pattern, name) for names in matrices for name in names):
            raise ValueError(
                f"target_modules: expected MPO layers such as {matrices[0][0]!r}, got "
                f"{pattern.target_modules!r}, which fits none of {len(matrices)}"
            )
    return [
        names
        for names in matrices
        if any(fits(pattern, name) for pattern in patterns for name in names)
    ]


def fits(config: PeftConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def check_saved(model: nn.Module, config: LightConfig, matrices: list[list[str]]) -> None:
    """Raise a ValueError unless a saved adapter is one of this model."""
    expected: dict[str, tuple[int, ...]] = {}
    for names in matrices:
        for k, core in enumerate(cores_at(model, names[0])):
            expected |= {f"{name}.{CORES}.{k}": tuple(core.shape) for name in names}
    heads = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if name.endswith(heads):
            state = getattr(module, "original_module", module).state_dict()
            expected |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    saved = config.saved_shapes or {}
    found = {key.removeprefix("base_model.model."): shape for key, shape in saved.items()}
    for key in found:
        if f".{CORES}." in key and key not in expected:
            raise ValueError(f"{key}: this adapter is of another base, which has this core")
    for key, shape in expected.items():
        if key not in found:
            raise ValueError(f"{key}: missing from the adapter, which may be of another base")
        if found[key] != shape:
            raise ValueError(
                f"{key}: expected {list(shape)} for this base, got {list(found[key])}: "
                "the adapter is of another"
            )


def check_lone(name: str, layer: nn.Module, kind: type[BaseTunerLayer]) -> None:
    """Raise a ValueError for adapters of another kind, which would be adapted with the layer."""
    if isinstance(layer, BaseTunerLayer) and not isinstance(layer, kind):
        raise ValueError(
            f"{name}: expected an MPO layer without adapters of another kind, got a "
            f"{type(layer).__name__}: put it in exclude_modules, or unload those first"
        )
