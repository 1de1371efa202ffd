"""Light fine-tuning and LoRA by peft's own functions, on compressed models."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import build, inputs
from torch import Tensor

import mpop
from mpo_kernels import MPOLinear
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpop.cli import main
from mpop.finetuning.task import finetune
from mpop.integrations.peft import LightConfig, LightLayer, MPOLoraLinear

SEQ_CLS: Any = {"task_type": "SEQ_CLS"}
FILE = "adapter_model.safetensors"


def compressed(name: str = "bert", **config: Any) -> hf.PreTrainedModel:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(**config))
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved base whose cores are those of :func:`compressed`."""
    mpop.save(compressed(), tmp_path / "base")
    return tmp_path / "base"


def output(model: Any) -> Tensor:
    batch = inputs(model.get_base_model() if isinstance(model, PeftModel) else model)
    with torch.no_grad():
        return model(**batch).logits


def train(model: Any, steps: int = 3) -> Tensor:
    """The output after a few steps of AdamW on what requires a gradient."""
    batch = inputs(model.get_base_model() if isinstance(model, PeftModel) else model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    return output(model)


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that an error must leave as it was."""
    parameters = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    return {"modules": [(n, type(m)) for n, m in model.named_modules()], "parameters": parameters}


def assert_untouched(model: torch.nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    assert now["modules"] == before["modules"]
    assert now["parameters"].keys() == before["parameters"].keys()
    for name, (value, trains) in before["parameters"].items():
        assert torch.equal(now["parameters"][name][0], value), name
        assert now["parameters"][name][1] == trains, name


@pytest.mark.parametrize(
    "name",
    ["bert", "albert-mlm", "mobilebert-mlm", "electra-mlm", "gpt2-lm", "llama-tied", "t5-gated"],
)
def test_an_adapter_trains_as_light_fine_tuning_does(name: str) -> None:
    model = compressed(name)
    light = copy.deepcopy(model).requires_grad_(False)
    count = mpop.freeze_central(light)
    before, start = output(light), copy.deepcopy(light.state_dict())
    peft_model = get_peft_model(model, LightConfig())
    assert peft_model.get_nb_trainable_parameters()[0] == count.trainable
    torch.testing.assert_close(output(peft_model), before)
    expected = train(light)
    trained = train(peft_model)
    torch.testing.assert_close(trained, expected)
    assert not torch.allclose(trained, before, rtol=1e-3, atol=1e-3)

    unloaded = copy.deepcopy(peft_model).unload()
    plain = output(unloaded)
    for key, parameter in unloaded.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, start[key]), key
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model), plain)
    peft_model.merge_adapter()
    torch.testing.assert_close(output(peft_model), trained)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model), plain)
    torch.testing.assert_close(output(peft_model), trained)
    merged = peft_model.merge_and_unload()
    assert type(merged) is type(light)
    torch.testing.assert_close(output(merged), expected)
    for key, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, light.get_parameter(key))


@pytest.mark.parametrize("bias", ["all", "mpo_light_only"])
def test_biases_and_norms_train_too(bias: str, tmp_path: Path) -> None:
    model = compressed()
    light = copy.deepcopy(model)
    mpop.freeze_central(light)
    rest = ["LayerNorm", "position_embeddings", "token_type_embeddings"]
    config = LightConfig(**SEQ_CLS, bias=bias, modules_to_save=rest if bias == "all" else None)
    peft_model = get_peft_model(model, config)
    if bias == "mpo_light_only":
        for name, parameter in light.named_parameters():
            layer = light.get_submodule(name.rpartition(".")[0])
            trains = ".cores." in name or "classifier" in name or isinstance(layer, MPOLinear)
            parameter.requires_grad_(parameter.requires_grad and trains)
    # Otherwise all that `mpop finetune --method light` trains.
    count = mpop.count_parameters(light).trainable
    assert peft_model.get_nb_trainable_parameters()[0] == count
    trained = train(peft_model)
    torch.testing.assert_close(trained, train(light))
    peft_model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(compressed(), tmp_path)), trained)


def test_a_saved_adapter_is_small_and_complete(base: Path, tmp_path: Path) -> None:
    peft_model = get_peft_model(mpop.load(base).eval(), LightConfig(**SEQ_CLS))
    expected = train(peft_model)
    count, total = peft_model.get_nb_trainable_parameters()
    peft_model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)
    assert sum(tensor.numel() for tensor in tensors.values()) == count < total / 2
    assert all(".mpo_light_cores." in key or ".classifier." in key for key in tensors)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(
            mpop.load(base), tmp_path / "adapter", low_cpu_mem_usage=low_memory
        )
        assert torch.equal(output(loaded), expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    for trains in (False, True):
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "adapter", is_trainable=trains
        )
        assert torch.equal(output(loaded.eval()), expected)
        assert loaded.get_nb_trainable_parameters()[0] == (count if trains else 0)
    merged = loaded.merge_and_unload()
    mpop.save(merged, tmp_path / "merged")
    assert torch.equal(output(mpop.load(tmp_path / "merged").eval()), output(merged))


@pytest.mark.parametrize("name", ["t5", "gpt2-lm"])
@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:Model with")
def test_a_tied_head_loads_the_adapter_of_its_embedding(name: str, tmp_path: Path) -> None:
    model = get_peft_model(compressed(name), LightConfig())
    expected = train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(compressed(name), tmp_path)
    assert torch.equal(output(loaded), expected)
    torch.testing.assert_close(output(loaded.merge_and_unload()), expected)
    by_head = {"gpt2-lm": "lm_head", "t5": "shared"}[name]
    model = get_peft_model(compressed(name), LightConfig(target_modules=[by_head]))
    adapted = [module for module in model.modules() if isinstance(module, LightLayer)]
    assert len(adapted) == {"gpt2-lm": 2, "t5": 4}[name]
    assert len({id(core) for layer in adapted for core in layer.mpo_light_cores.parameters()}) == 4


def test_several_adapters_on_one_base(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(mpop.load(base).eval(), LightConfig(**SEQ_CLS), adapter_name="a")
    of_a = train(model)
    model.add_adapter("b", LightConfig(**SEQ_CLS, target_modules=["query", "output.dense"]))
    model.set_adapter("b")
    with model.disable_adapter():
        plain = output(model)
    assert torch.equal(output(model), plain)
    assert torch.equal(plain, output(mpop.load(base).eval()))
    of_b = train(model)
    assert not torch.allclose(of_b, of_a)
    model.set_adapter("a")
    assert torch.equal(output(model), of_a)
    model.save_pretrained(tmp_path)

    fresh = PeftModel.from_pretrained(mpop.load(base), tmp_path / "b", adapter_name="first")
    fresh.load_adapter(tmp_path / "a", "second")
    assert torch.equal(output(fresh), of_b)
    fresh.merge_adapter()
    assert torch.equal(output(fresh), of_b)
    fresh.save_pretrained(tmp_path / "again")  # merged, it still saves the adapter's cores
    for key, tensor in load_file(tmp_path / "again" / "first" / FILE).items():
        assert torch.equal(tensor, load_file(tmp_path / "b" / FILE)[key]), key
    fresh.unmerge_adapter()
    fresh.set_adapter("second")
    assert torch.equal(output(fresh), of_a)
    fresh.delete_adapter("first")
    assert torch.equal(output(fresh), of_a)
    assert torch.equal(output(model.merge_and_unload()), of_a)


def changed(model: Any) -> Any:
    """The model with other adapters, each its own, which none is after a few steps of training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mpo_light_cores." in name or ".lora_" in name or ".modules_to_save." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * parameter.abs().mean().clamp_min(0.2) * noise)
    return model


def test_one_adapter_at_a_time_replaces_a_layers_cores() -> None:
    model = get_peft_model(compressed(), LightConfig(target_modules=["query"]), adapter_name="a")
    model.add_adapter("b", LightConfig(target_modules=["query", "key"]))
    model.add_adapter("c", LightConfig(target_modules=["key"]))
    changed(model).base_model.set_adapter(["a", "c"])  # each has layers of its own
    before = output(model)
    for action in (
        lambda: model.base_model.set_adapter(["b", "c"]),
        lambda: model.base_model.merge_adapter(["b", "c"]),
        lambda: model.base_model.merge_and_unload(adapter_names=["b", "c"]),
    ):
        with pytest.raises(ValueError, match=r"expected one adapter of a layer.*\['b', 'c'\]"):
            action()
        assert torch.equal(output(model), before)


def test_an_adapter_added_while_another_is_merged_starts_from_the_base() -> None:
    model = get_peft_model(compressed(), LightConfig())
    with model.disable_adapter():
        plain = output(model)
    train(model)
    model.merge_adapter()
    model.add_adapter("new", LightConfig())
    model.set_adapter("new")
    assert torch.equal(output(model), plain)


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model = changed(get_peft_model(compressed(), LightConfig()))
    before = state_of(model)
    last = [p for p in model.parameters() if p.requires_grad][-1]
    with torch.no_grad():
        kept = last.clone()
        last.fill_(torch.nan)
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            action(safe_merge=True)
    with torch.no_grad():
        last.copy_(kept)
    assert_untouched(model, before)


def rows(model: Any, count: int) -> dict[str, Tensor]:
    """A batch of texts of several lengths, no two alike."""
    ids = torch.randint(2, 50, (count, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@torch.no_grad()
def each_alone(model: Any, names: list[str], batch: dict[str, Tensor]) -> Tensor:
    """The logits of each row with its own adapter active."""
    made = []
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                made.append(model(**alone).logits)
        else:
            model.set_adapter(name)
            made.append(model(**alone).logits)
    return torch.cat(made)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("bert", None), ("albert-mlm", None), ("gpt2-lm", None), ("t5", None), ("llama-tied", 4)],
)
def test_each_row_of_a_batch_has_the_adapter_named_for_it(name: str, bits: int | None) -> None:
    model = compressed(name)
    if bits:
        mpop.quantize_centres(model, bits)
    task = SEQ_CLS if name == "bert" else {}
    model = get_peft_model(model, LightConfig(**task), adapter_name="a").eval()
    model.add_adapter("b", LightConfig(**task))
    some = {"gpt2-lm": "c_attn", "t5": "wi", "llama-tied": "down_proj"}.get(name, "query")
    model.add_adapter("c", LightConfig(**task, target_modules=[some]))
    batch, names = rows(changed(model), 5), ["b", "c", "__base__", "a", "b"]
    expected = each_alone(model, names, batch)
    for active in ("a", "b"):  # which makes no difference
        model.set_adapter(active)
        with torch.no_grad():
            found = model(**batch, adapter_names=names).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    others = [name for name in ("a", "b", "c") if name != names[0]]
    for other in others:
        assert not torch.allclose(each_alone(model, [other], batch), expected[:1], atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(
            model(**batch, adapter_names=names).logits, each_alone(model, ["__base__"] * 5, batch)
        )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_gradient_reaches_the_adapters_of_a_mixed_batch() -> None:
    model = get_peft_model(compressed(), LightConfig(target_modules=["query"]), adapter_name="a")
    model.add_adapter("b", LightConfig(target_modules=["query"]))
    changed(model).eval().base_model.set_requires_grad(["a", "b"])
    batch = rows(model, 3)
    model(**batch, adapter_names=["b", "a", "b"]).logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in found} == {"a", "b"}
    for name, of in (("a", [1]), ("b", [0, 2])):
        model.zero_grad()
        model.set_adapter(name)
        model(**{key: value[of] for key, value in batch.items()}).logits.square().sum().backward()
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_beams_of_a_row_have_its_adapter(name: str) -> None:
    model = get_peft_model(compressed(name), LightConfig(), adapter_name="a").eval()
    model.add_adapter("b", LightConfig())
    changed(model)
    ids, names = rows(model, 3)["input_ids"], ["b", "__base__", "a"]
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "pad_token_id": 0}
        mixed = model.generate(input_ids=ids, adapter_names=names, **options)
        alone = []
        for row, adapter in zip(ids, names, strict=True):
            with nullcontext() if adapter in model.peft_config else model.disable_adapter():
                model.set_adapter(adapter if adapter in model.peft_config else "a")
                alone.append(model.generate(input_ids=row[None], **options))
        assert torch.equal(mixed, torch.cat(alone))


@pytest.mark.parametrize(
    "config",
    [
        LightConfig(target_modules=["query"]),
        LoraConfig(target_modules=["query"], init_lora_weights=False),
    ],
    ids=["light", "lora"],
)
def test_names_of_rows_that_are_refused_as_lora_refuses_them(config: Any) -> None:
    model = get_peft_model(compressed(), copy.deepcopy(config), adapter_name="one").eval()
    batch = rows(model, 2)
    before = model(**batch).logits
    for names, message in (
        (["one"], "Length of `adapter_names` should be the same .* got 1 and 2"),
        (["one", "two"], r"non-existing adapter\(s\): two"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, adapter_names=names)
        assert torch.equal(model(**batch).logits, before)
        assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(**batch, adapter_names=["one", "one"])
    if isinstance(config, LightConfig):
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
            model(**batch, adapter_names=["one", "one"])
    with pytest.raises(ValueError, match="different peft types"):
        other = LoraConfig if isinstance(config, LightConfig) else LightConfig
        model.add_adapter("other", other(target_modules=["key"]))


def test_rows_of_a_batch_with_adapters_of_two_kinds() -> None:
    light, lora = LightConfig(target_modules=["key"]), LoraConfig(target_modules=["query"])
    model = inject_adapter_in_model(light, compressed(), "light")
    model = changed(get_peft_model(model, lora, "lora").eval())
    batch = rows(model, 3)
    with torch.no_grad():
        found = model(**batch, adapter_names=["lora", "light", "__base__"]).logits
        for row, (kind, config) in enumerate((("lora_", lora), ("light", light), ("", None))):
            alone: Any = compressed()
            if config is not None:
                alone = get_peft_model(alone, copy.deepcopy(config), kind).eval()
                state = {k: v for k, v in model.state_dict().items() if f".{kind}." in k}
                assert not alone.load_state_dict(state, strict=False).unexpected_keys
            expected = alone(**batch).logits[row]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


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


def test_a_model_in_16_bits_has_adapters_in_32() -> None:
    model = get_peft_model(compressed().bfloat16(), LightConfig())
    with model.disable_adapter():
        plain = output(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained = train(model)
    assert trained.dtype == torch.bfloat16 and not torch.equal(trained, plain)
    model.merge_adapter()
    torch.testing.assert_close(output(model), trained)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(output(merged), trained)


def test_an_adapted_layer_compiles_whole() -> None:
    model = get_peft_model(compressed(), LightConfig(target_modules=["query"]))
    train(model)
    layer = next(module for module in model.modules() if isinstance(module, LightLayer))
    x = torch.randn(5, 24, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    cores = list(layer.mpo_light_cores["default"])
    found, expected = (
        torch.autograd.grad(part(x).square().sum(), [x, *cores]) for part in (compiled, layer)
    )
    torch.testing.assert_close(found, expected)


def test_injection_without_a_peft_model() -> None:
    model = compressed()
    light = copy.deepcopy(model).requires_grad_(False)
    mpop.freeze_central(light)
    torch.testing.assert_close(train(inject_adapter_in_model(LightConfig(), model)), train(light))


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


def test_lora_over_an_mpo_is_lora_over_the_dense_layer(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        **SEQ_CLS, r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["query", "pooler.dense"]
    )
    models = build("bert"), mpop.load(base).eval()
    adapted = []
    for model in models:
        torch.manual_seed(7)
        adapted.append(get_peft_model(model, copy.deepcopy(config)))
    dense, model = adapted
    layers = [m for m in model.modules() if isinstance(m, MPOLoraLinear)]
    assert len(layers) == 3
    assert model.get_nb_trainable_parameters()[0] == dense.get_nb_trainable_parameters()[0]
    expected, trained = train(dense), train(model)
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model), output(mpop.load(base).eval()))
    model.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(mpop.load(base), tmp_path / "lora")
    loaded.load_adapter(tmp_path / "lora", "again")
    assert torch.equal(output(loaded), trained)
    loaded.set_adapter("again")
    assert torch.equal(output(loaded), trained)

    before = state_of(loaded)
    for action in (loaded.merge_adapter, loaded.merge_and_unload, layers[0].merge):
        with pytest.raises(ValueError, match=r"LoRA cannot be merged.*mpop\.merge"):
            action()
    assert_untouched(loaded, before)
    # What the error advises.
    advised = PeftModel.from_pretrained(mpop.merge(mpop.load(base)), tmp_path / "lora")
    torch.testing.assert_close(output(advised.merge_and_unload()), trained, rtol=1e-3, atol=1e-4)
    plain = model.unload()
    assert not any(isinstance(m, MPOLoraLinear) for m in plain.modules())
    mpop.save(plain, tmp_path / "plain")


def test_a_merge_of_lora_is_refused_before_a_dense_layer_is_merged() -> None:
    model = compressed(exclude=["*.0.*.query"])
    model = get_peft_model(model, LoraConfig(target_modules=["query"]))
    train(model)
    before = state_of(model)
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="LoRA cannot be merged"):
            action()
        assert_untouched(model, before)


@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_lora_on_all_linear_layers(name: str) -> None:
    config = LoraConfig(
        task_type="SEQ_CLS" if name == "bert" else None, target_modules="all-linear"
    )
    dense = get_peft_model(build(name), copy.deepcopy(config)).targeted_module_names
    model = get_peft_model(compressed(name, exclude=["*.0.*"]), copy.deepcopy(config))
    assert sorted(model.targeted_module_names) == sorted(dense)
    model.add_adapter("second", copy.deepcopy(config))
    assert "base_layer" not in model.peft_config["second"].target_modules
    assert sorted(model.targeted_module_names) == sorted(dense)


def test_a_dense_model_has_the_lora_of_peft() -> None:
    model = get_peft_model(build("gpt2"), LoraConfig(target_modules=["c_attn"]))
    assert not any(isinstance(m, MPOLoraLinear) for m in model.modules())
    trained = train(model)
    torch.testing.assert_close(output(model.merge_and_unload()), trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "query: expected plain LoRA .*, got use_dora"),
        ({"init_lora_weights": "pissa"}, "query: expected plain LoRA .*got init_lora.*pissa"),
        ({"target_modules": ["word_embeddings"]}, "word_embeddings: LoRA takes MPO linears"),
    ],
)
def test_lora_that_needs_the_dense_weight_is_refused(options: Any, message: str) -> None:
    model = compressed()
    before = state_of(model)
    config = LoraConfig(**{"target_modules": ["query"], **options})
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(model, copy.deepcopy(config))
    assert_untouched(model, before)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"]))
    before = state_of(adapted)
    with pytest.raises((ValueError, TypeError), match=message):
        adapted.add_adapter("another", config)
    assert_untouched(adapted, before)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_not_untied_against_what_was_asked(saved: str) -> None:
    options: Any = {"target_modules": ["q_proj"], "modules_to_save": [saved]}
    model = compressed("llama-tied")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"ensure_weight_tying: lm_head shares an embedding's cor"):
        get_peft_model(model, LoraConfig(**options, ensure_weight_tying=True))
    assert_untouched(model, before)
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        get_peft_model(model, LoraConfig(**options))
    model = compressed("llama-tied", embeddings=False)  # whose tie peft sees
    get_peft_model(model, LoraConfig(**options, ensure_weight_tying=True))
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    first, second = (head.modules_to_save["default"].weight for head in heads)
    assert first is second


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: build("bert"), {}, "expected a compressed model, got a dense Bert"),
        (compressed, {"target_modules": ["query", "qery"]}, r"such as 'bert\.\S+', got \['qery'\]"),
        (compressed, {"target_modules": r".*\.qery"}, r"got '\.\*\\\\\.qery', which fits none of"),
        (compressed, {"target_modules": ["LayerNorm"]}, r"\['LayerNorm'\], which fits none"),
        (compressed, {"target_modules": ["query", "classifier"]}, "got classifier, a dense Linear"),
        (
            lambda: compressed(exclude=["*.query"]),
            {"target_modules": ["query", "key"]},
            r"got bert\.\S+\.query, a dense Linear: put it in exclude_modules",
        ),
        (compressed, {"exclude_modules": ".*"}, "leave no MPO layer"),
    ],
)
def test_targets_that_cannot_be_adapted(
    make: Callable[[], Any], options: Any, message: str
) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        get_peft_model(model, LightConfig(**options))
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


def test_a_bias_that_peft_lacks() -> None:
    with pytest.raises(ValueError, match="bias: expected none, all or mpo_light_only, got 'some'"):
        LightConfig(bias="some")


def _with_another_head() -> Any:
    model = compressed()
    model.classifier = torch.nn.Linear(24, 3)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("bert"), "expected a compressed model"),
        (lambda: compressed(ranks=2), r"cores\.1: expected \[.*\] for this base, got \[.*\]"),
        (lambda: compressed(num_cores=3), r"cores\.\d: this adapter is of another base"),
        (lambda: compressed(exclude=["*.query"]), r"query\.mpo_light_cores\.\d: this adapter is"),
        (
            _with_another_head,
            r"classifier\.weight: expected \[3, 24\] for this base, got \[2, 24\]",
        ),
    ],
)
def test_an_adapter_of_another_base(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    get_peft_model(compressed(), LightConfig(**SEQ_CLS)).save_pretrained(tmp_path)
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        PeftModel.from_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("lost", [r".*query\.mpo_light_cores\.2", r".*classifier\.bias"])
def test_an_adapter_that_lacks_a_tensor(lost: str, tmp_path: Path) -> None:
    get_peft_model(compressed(), LightConfig(**SEQ_CLS)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if re.fullmatch(lost, key))
    del tensors[key]
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    message = re.escape(key.removeprefix("base_model.model.")) + ": missing from the adapter"
    model = compressed()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert_untouched(model, before)
    model = get_peft_model(model, LightConfig(**SEQ_CLS))
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "other")
    assert_untouched(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_an_adapter_without_a_whole_file(content: bytes | None, tmp_path: Path) -> None:
    get_peft_model(compressed(), LightConfig()).save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    if content:
        (tmp_path / FILE).write_bytes(content)
    model = compressed()
    before = state_of(model)
    with pytest.raises(OSError, match=FILE.replace(".", r"\.")):
        PeftModel.from_pretrained(model, tmp_path)
    assert_untouched(model, before)


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


def test_a_prompt_is_no_part_of_a_model_that_is_saved(tmp_path: Path) -> None:
    model = prompted(compressed("llama"), "llama", "prompt")
    with pytest.raises(ValueError, match=r"got a PeftModelForCausalLM: .*get_base_model\(\)"):
        mpop.save(model, tmp_path / "saved")
    mpop.save(model.get_base_model(), tmp_path / "saved")
    mpop.load(tmp_path / "saved")


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


TASKS = {"bert": "SEQ_CLS", "gpt2": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
PROMPTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (PromptTuningConfig, {}),
    "sampled": (PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prefix": (PrefixTuningConfig, {}),
    "encoder": (PromptEncoderConfig, {"encoder_hidden_size": 8}),
}


def prompted(model: hf.PreTrainedModel, name: str, kind: str) -> Any:
    """With three virtual tokens in front, the same ones at every call."""
    config, options = PROMPTS[kind]
    torch.manual_seed(7)
    task = TASKS.get(name, "CAUSAL_LM")
    return get_peft_model(model, config(task_type=task, num_virtual_tokens=3, **options)).eval()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in ("prompt", "prefix", "encoder")),
        *(("bert", kind) for kind in ("prompt", "encoder")),
        *(("t5", kind) for kind in ("prompt", "prefix", "encoder")),
        *(("gpt2", "prompt"), ("gpt2-lm", "prompt"), ("llama-tied", "encoder")),
    ],
)
def test_a_prompt_before_a_compressed_model_is_one_before_the_dense(
    name: str, kind: str, tmp_path: Path
) -> None:
    base = compressed(name)
    words = base.get_input_embeddings()
    names = [key for key, _ in words.named_parameters()]
    dense, model = prompted(build(name), name, kind), prompted(base, name, kind)
    assert [key for key, _ in words.named_parameters()] == names
    assert model.get_nb_trainable_parameters()[0] == dense.get_nb_trainable_parameters()[0]
    torch.testing.assert_close(output(model), output(dense), rtol=1e-4, atol=1e-4)
    expected, trained = train(dense, 2), train(model, 2)
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(compressed(name), tmp_path)
    torch.testing.assert_close(output(loaded), trained)
    if name == "llama":
        ids = inputs(base)["input_ids"]
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
        found, wanted = (each.generate(input_ids=ids, **options) for each in (loaded, dense))
        assert torch.equal(found, wanted)


def test_a_prompt_asks_where_the_words_are() -> None:
    """By the device of their weight: what it starts from, and kinds of tokens before a BERT's."""
    for name in ("bert", "llama"):
        dense, model = (prompted(make(name), name, "sampled") for make in (build, compressed))
        batch = rows(model, 3)
        if name == "bert":
            batch["token_type_ids"] = batch["input_ids"] % 2
        torch.testing.assert_close(
            model(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-4
        )


def test_a_prompt_finds_the_words_among_tables_of_as_many_rows() -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_positions=50, n_embd=24, n_layer=1, n_head=2)
    model = hf.GPT2LMHeadModel(config).eval()
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        expected = prompted(copy.deepcopy(model), "gpt2-lm", "prompt")(input_ids=ids).logits
        mpop.compress(model)
        found = prompted(model, "gpt2-lm", "prompt")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_before_centres_in_4_bits_and_before_adapters() -> None:
    model = compressed("llama")
    mpop.quantize_centres(model, 4)
    light = inject_adapter_in_model(LightConfig(), copy.deepcopy(model))
    found = output(prompted(model, "llama", "prompt"))
    mpop.dequantize_centres(model)
    torch.testing.assert_close(found, output(prompted(model, "llama", "prompt")))
    model = prompted(light, "llama", "prompt")
    torch.testing.assert_close(output(model), found)
    assert not torch.allclose(output(changed(model)), found, atol=1e-3)
    words = model.get_base_model().get_input_embeddings()
    assert model.word_embeddings is words and isinstance(words, LightLayer)


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
