"""Adapters of peft, of either kind, and what else is done to a compressed model."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import SEQ_CLS, assert_untouched, changed, compressed, output, state_of, train
from peft import (
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny_models import build
from torch import Tensor

import mpop
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpop.cli import main
from mpop.finetuning.task import finetune
from mpop.integrations.peft import LightConfig, LightLayer


@pytest.mark.parametrize("first", [LightConfig, LoraConfig])
def test_a_layer_has_adapters_of_one_kind(first: Any) -> None:
    model = inject_adapter_in_model(first(target_modules=["query"]), compressed(), "a")
    before = state_of(model)
    second = LoraConfig(target_modules=["query"]) if first is LightConfig else LightConfig()
    message = r"query: expected an MPO layer without adapters of another kind, got a (Light|MPOLor)"
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(second, model, "b")
    assert_untouched(model, before)
    options: Any = {"target_modules": ["key"]} if first is LightConfig else {}
    inject_adapter_in_model(replace(second, exclude_modules=["query"], **options), model, "b")


def codes_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(module, part).clone()
        for name, module in model.named_modules()
        if isinstance(module, BlockwiseLayer)
        for part in ("codes", "scales")
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "config",
    [LightConfig(**SEQ_CLS), LoraConfig(**SEQ_CLS, r=3, target_modules=["query", "dense"])],
    ids=["light", "lora"],
)
def test_quantised_centres_stay_as_they_are(config: Any, bits: int, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        config.exclude_modules = {"classifier"}
    model = compressed()
    mpop.quantize_centres(model, bits)
    quantised = copy.deepcopy(model)
    before = output(model)
    peft_model = get_peft_model(model, config)
    assert torch.equal(output(peft_model), before)
    codes = codes_of(peft_model)
    assert codes
    trained = train(peft_model)
    assert not torch.allclose(trained, before)
    for name, tensor in codes_of(peft_model).items():
        assert torch.equal(tensor, codes[name]), name
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised, tmp_path)
    assert torch.equal(output(loaded), trained)
    if isinstance(config, LoraConfig):
        with pytest.raises(ValueError, match="LoRA cannot be merged"):
            peft_model.merge_and_unload()
        return
    light = compressed().requires_grad_(False)
    mpop.quantize_centres(light, bits)
    mpop.dequantize_centres(light)
    mpop.freeze_central(light)
    light.classifier.requires_grad_(True)
    torch.testing.assert_close(train(light), trained, rtol=1e-4, atol=1e-4)
    merged = peft_model.merge_and_unload()
    assert torch.equal(output(merged), trained)
    mpop.dequantize_centres(merged)
    torch.testing.assert_close(output(merged), trained, rtol=1e-4, atol=1e-4)
    PeftModel.from_pretrained(compressed(), tmp_path)  # to the centres of more bits


DENSE_ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(target_modules=["query"], init_lora_weights=False),
    "ia3": IA3Config(target_modules=["key"], feedforward_modules=[]),
    "head": LoraConfig(target_modules=["classifier"]),
    "whole": LoraConfig(target_modules=["key"], modules_to_save=["query"]),
}


@pytest.mark.parametrize("kind", DENSE_ADAPTERS)
def test_a_dense_model_with_adapters_is_not_compressed(kind: str, tmp_path: Path) -> None:
    adapted = get_peft_model(build("bert"), copy.deepcopy(DENSE_ADAPTERS[kind])).eval()
    expected = output(adapted)
    for model in (adapted, adapted.get_base_model()):
        before = state_of(model)
        for action in (mpop.compress, mpop.inspect_model):
            message = r"expected a model without modules of peft, got a .*merge_and_unload\(\) it"
            with pytest.raises(ValueError, match=message) as caught:
                action(model)
            assert "\n" not in str(caught.value)
            assert_untouched(model, before)
    model = adapted.merge_and_unload()  # what the error advises
    mpop.compress(model)
    mpop.save(model, tmp_path / "saved")
    torch.testing.assert_close(output(mpop.load(tmp_path / "saved")), expected)


@pytest.mark.parametrize(
    "config", [LightConfig(), LoraConfig(target_modules=["query"])], ids=["light", "lora"]
)
def test_a_compressed_model_with_adapters_is_not_changed_under_them(
    config: Any, tmp_path: Path
) -> None:
    adapted = changed(get_peft_model(compressed(), copy.deepcopy(config)).eval())
    (tmp_path / "saved").mkdir()
    for model in (adapted, adapted.get_base_model()):
        before, expected = state_of(model), output(model)
        for action in (
            lambda model: mpop.save(model, tmp_path / "saved"),
            lambda _: adapted.get_base_model().save_pretrained(tmp_path / "plain"),
            lambda model: model.dequantize(),
            lambda model: mpop.squeeze(model, evaluate=float, finetune=None, max_drop=0.1),
            mpop.balance,
            mpop.merge,
        ):
            with pytest.raises(ValueError, match="expected a model without modules of peft"):
                action(model)
            assert_untouched(model, before)
            assert torch.equal(output(model), expected)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    mpop.save(adapted.unload(), tmp_path / "saved")


@pytest.mark.parametrize(
    "config",
    [LightConfig(), LoraConfig(target_modules=["query", "dense"], exclude_modules=["classifier"])],
    ids=["light", "lora"],
)
def test_centres_are_quantised_under_adapters_as_before_them(config: Any) -> None:
    base = compressed()
    mpop.quantize_centres(base, 4)
    made = []
    for model in (base, compressed()):
        torch.manual_seed(7)
        made.append(get_peft_model(model, copy.deepcopy(config)).eval())
    before, after = made
    mpop.quantize_centres(after, 4)
    assert torch.equal(output(changed(after)), output(changed(before)))
    mpop.dequantize_centres(after)
    torch.testing.assert_close(output(after), output(before), rtol=1e-4, atol=1e-4)


def test_transformers_saves_the_adapter_that_it_added_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")
    model = compressed()
    mpop.quantize_centres(model, 4)
    model.add_adapter(LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    other = compressed()
    other.load_adapter(tmp_path)
    found = {key: value for key, value in other.state_dict().items() if ".lora_" in key}
    assert len(found) == 4
    for key, value in found.items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_mpop_does_not_import_peft() -> None:
    code = """
import sys, mpop
assert "peft" not in sys.modules
import importlib, mpop.peft, mpop.integrations.peft
importlib.reload(mpop.integrations.peft)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_run_on_a_task(bits: int | None, data: Path, bert: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    assert main(["compress", "--model", str(bert), "--output", base]) == 0
    result = finetune(
        base,
        "sst2",
        output=tmp_path / "adapter",
        data_dir=data,
        method="light",
        epochs=1,
        max_length=16,
        centre_bits=bits,
        prepare=lambda model: get_peft_model(model, LightConfig(**SEQ_CLS)),
    )
    assert result["trainable_parameters"] < result["total_parameters"] / 2
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    layers = [module for module in loaded.modules() if isinstance(module, LightLayer)]
    assert len(layers) == 14
    for layer in layers:
        own = [core for k, core in enumerate(layer.cores) if k != layer.central]
        for core, trained in zip(own, layer.mpo_light_cores["default"], strict=True):
            assert not torch.equal(core, trained)
