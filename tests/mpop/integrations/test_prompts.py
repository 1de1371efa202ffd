"""peft's prompts before compressed models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from adapted import changed, compressed, output, rows, train
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny_models import build, inputs

import mpop
from mpop.integrations.peft import LightConfig, LightLayer


def test_a_prompt_is_no_part_of_a_model_that_is_saved(tmp_path: Path) -> None:
    model = prompted(compressed("llama"), "llama", "prompt")
    with pytest.raises(ValueError, match=r"got a PeftModelForCausalLM: .*get_base_model\(\)"):
        mpop.save(model, tmp_path / "saved")
    mpop.save(model.get_base_model(), tmp_path / "saved")
    mpop.load(tmp_path / "saved")


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
