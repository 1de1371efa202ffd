"""peft's LoRA over MPO layers, against LoRA over the dense ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import SEQ_CLS, assert_untouched, compressed, output, state_of, train
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build

import mpop
from mpop.integrations.peft import MPOLoraLinear


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
