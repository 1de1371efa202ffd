"""MPO layers that compute with the auxiliary cores of an adapter, or of one for each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.func import functional_call

from mpo_kernels import InterpolativeLinear, MPOExperts
from mpo_kernels.cores.chain import check_finite
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpo_kernels.layers.module import MPOModule

PREFIX = "mpo_light_"
CORES = f"{PREFIX}cores"


class AdapterCores(nn.ParameterList):
    """The auxiliary cores of one adapter, and of the base those that it took the place of."""

    replaced: list[Tensor] | None = None


class LightLayer(nn.Module, BaseTunerLayer):
    """An MPO layer that computes with the auxiliary cores of its active adapter.

    Its other attributes are those of `base_layer`.
    """

    adapter_layer_names = (CORES,)

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
        base = auxiliary(self.base_layer).items()
        cores = self._cores_of(adapter_name)
        return [(key, own, ours) for (key, own), ours in zip(base, cores, strict=True)]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        return device_and_dtype(base_layer)


def auxiliary(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The auxiliary cores of an MPO layer by their names in it; of another module, none."""
    is_stacked = isinstance(layer, MPOExperts)
    if isinstance(layer, MPOModule | InterpolativeLinear) and not is_stacked:
        return {f"cores.{k}": c for k, c in enumerate(layer.cores) if k != layer.central}
    if isinstance(layer, BlockwiseLayer):
        return {f"auxiliary.{k}": core for k, core in enumerate(layer.auxiliary)}
    return {}


def base_of(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LightLayer) else layer


def cores_at(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(auxiliary(base_of(model.get_submodule(name))).values())


def matrices_of(model: nn.Module) -> list[list[str]]:
    """The names of the layers that can be adapted, those that share their cores together."""
    groups: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            cores = auxiliary(base_of(child))
            if cores and not isinstance(parent, LightLayer):
                key = id(next(iter(cores.values())))
                place = f"{prefix}.{name}".removeprefix(".").removesuffix(".base_layer")
                groups.setdefault(key, []).append(place)
    return list(groups.values())


def device_and_dtype(base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    # peft asks the weight, which is on meta.
    core = next(base_layer.parameters())
    return core.device, core.dtype


@contextmanager
def named_rows(
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
