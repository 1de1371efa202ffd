"""Light fine-tuning as a tuner of peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from mpop.integrations.light_config import check_saved, selected
from mpop.integrations.light_layer import PREFIX, AdapterCores, LightLayer, cores_at, named_rows
from mpop.models.matrices import check_no_experts, check_not_quantized


class LightModel(BaseTuner):
    """What `peft.get_peft_model` makes of a model and a `LightConfig`."""

    prefix = PREFIX
    tuner_layer_cls = LightLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        # peft calls this before it changes anything.
        check_not_quantized(self.model)
        if peft_config.target_modules is None:
            check_no_experts(self.model, "name other layers in target_modules")
        matrices = selected(self.model, peft_config)
        if peft_config.saved_shapes is not None:
            check_saved(self.model, peft_config, matrices)
        for layer in self._layers:
            layer.unmerge()
        self._new: dict[str, tuple[list[str], AdapterCores]] = {}
        for names in matrices:
            cores = AdapterCores(core.detach().clone() for core in cores_at(self.model, names[0]))
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
        with named_rows(self, adapter_names, kwargs.get("num_beams")):
            yield
