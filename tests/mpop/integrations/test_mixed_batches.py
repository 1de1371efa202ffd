"""Rows of one batch with adapters of their own."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from adapted import SEQ_CLS, changed, compressed, rows
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor

import mpop
from mpop.integrations.peft import LightConfig


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
