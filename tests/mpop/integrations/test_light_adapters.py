"""Light fine-tuning as an adapter of peft: trained, saved, merged, several on one base."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import FILE, SEQ_CLS, assert_untouched, changed, compressed, output, state_of, train
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import build

import mpop
from mpo_kernels import MPOLinear
from mpop.integrations.peft import LightConfig, LightLayer


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
