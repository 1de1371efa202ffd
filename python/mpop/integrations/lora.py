"""peft's LoRA over MPO layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel

from mpo_kernels import InterpolativeLinear, MPOEmbedding, MPOExperts, MPOLinear
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLinear
from mpop.integrations.light_config import check_lone, fits
from mpop.integrations.light_layer import auxiliary, device_and_dtype, matrices_of, named_rows
from mpop.models.matrices import check_not_quantized


class MPOLoraLinear(lora.Linear):
    """LoRA beside an MPO layer: `base_layer(x) + B A x`."""

    @property
    def lora_variants(self) -> dict:
        return {(): None}  # the others read the dense weight

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        return device_and_dtype(base_layer)

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
            is_held = auxiliary(module) or isinstance(module, MPOExperts)
            if is_held and fits(peft_config, place):
                check_lone(place, model.get_submodule(place), lora.LoraLayer)
                _check_plain(peft_config, place, module)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # peft looks for a parameter of a tie's name, which a list of cores is not.
        tied = super()._get_module_names_tied_with_embedding()
        for names in matrices_of(self.model):
            modules = {name: self.model.get_submodule(name) for name in names}
            tables = {name for name in names if isinstance(modules[name], MPOEmbedding)}
            tied += sorted(modules.keys() - tables) if tables else []
        return tied

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        for name in tied_weight_keys:
            if auxiliary(self.model.get_submodule(name)):
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
            named_rows(self, adapter_names, kwargs.get("num_beams")),
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
