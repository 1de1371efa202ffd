"""Small models with random weights, compressed, saved and spoilt, for servers to load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from saved import edit_config
from tokenizers import Tokenizer, models, pre_tokenizers

import mpop
from mpop.models.config import FORMAT_VERSION, INTERPOLATIVE, STORES

VOCABULARY = 150
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 96, "n_layer": 2, "n_head": 2, "n_positions": 128}
_TIED = {"tie_word_embeddings": True}


def _llama(**options: Any) -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, **options))


BUILDERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": _llama,
    "llama-attention-biases": lambda: _llama(attention_bias=True),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: _llama(**_TIED),
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, **_TIED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "bert-classifier": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**_BERT, num_labels=3)
    ),
}


def _low_rank(in_features: int, out_features: int, rank: int) -> dict[str, Any]:
    return {"in_factors": (1, in_features), "out_factors": (out_features, 1), "ranks": rank}


# Fused matrices with cores of other numbers, sizes that are padded, and dense ones among them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "compression": 0.6,
            "include": ["model.*", "lm_head"],
            "exclude": ["*.0.self_attn.k_proj", "*.1.mlp.up_proj"],
            "overrides": {
                "*.v_proj": {"num_cores": 2},
                "*.q_proj": {"in_factors": (9, 11), "out_factors": (10, 13)},
            },
        },
    ),
    "factors chosen": ("llama", {"compression": 0.6, "factors": "auto"}),
    "interpolative form": (
        "llama",
        {
            "form": INTERPOLATIVE,
            "include": ["*.q_proj", "*.k_proj", "*.mlp.*", "lm_head"],
            "overrides": {
                "*.q_proj": _low_rank(96, 128, 30),
                "*.k_proj": _low_rank(96, 32, 20),
                "*.gate_proj": _low_rank(96, 176, 40),
                "*.up_proj": _low_rank(96, 176, 80),
                "lm_head": _low_rank(96, VOCABULARY, 50),
            },
        },
    ),
}
CASES["interpolative form in int8"] = ("llama", CASES["interpolative form"][1] | {"store": "int8"})
CASES |= {
    f"in {store}": ("llama", {"compression": 0.6, "embeddings": False, "store": store})
    for store in STORES
}
# One head of keys and values, which two processes both hold; a head of 150 words, padded to 192.
SPLIT = {
    "compression": 0.7,
    "tensor_parallel": 4,
    "include": ["model.*", "lm_head"],
    "exclude": ["*.0.self_attn.k_proj", "lm_head"],
}


def save(
    path: Path, name: str, form: str | None = None, store: str | None = None, **options: Any
) -> hf.PreTrainedModel:
    """Write a compressed model and a tokenizer; returns the dense model with the same weights."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mpop.compress(model, mpop.CompressionConfig(**options))
    if form == INTERPOLATIVE:
        mpop.interpolate(model)
    if store is not None:
        mpop.quantize(model, STORES[store])
    mpop.save(model, path)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w0"
    ).save_pretrained(path)
    return mpop.merge(copy.deepcopy(model))


def newer(path: Path) -> None:
    """Make a checkpoint one of a version to come."""
    version = {"version": FORMAT_VERSION + 1}
    edit_config(path, lambda config: config["quantization_config"].update(version))
