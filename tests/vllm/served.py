"""Small models with random weights, compressed and saved, and vLLM serving them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import mpop

VOCABULARY = 150
PROMPTS = ("w5 w17 w99 w140 w3", "w7", "w1 w1 w2 w3 w5 w8 w13 w21 w34 w55 w89 w144")
NEW_TOKENS = 12

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

BUILDERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "llama-biases": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_DECODER, attention_bias=True, mlp_bias=True)
    ),
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, **_TIED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "bert-classifier": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**_BERT, num_labels=3)
    ),
}


def save(path: Path, name: str, **options: Any) -> hf.PreTrainedModel:
    """Write a compressed model and a tokenizer; returns the dense model with the same weights."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mpop.compress(model, mpop.CompressionConfig(**options))
    mpop.save(model, path)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w0"
    ).save_pretrained(path)
    return mpop.merge(copy.deepcopy(model))


@contextmanager
def served(path: Path, **options: Any) -> Iterator[LLM]:
    """vLLM with a model, in this process unless it is served by several."""
    options.setdefault("distributed_executor_backend", "uni")
    options.setdefault("dtype", "float32")
    llm = LLM(str(path), max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=2**24, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ids_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def generated(llm: LLM) -> list[tuple[list[int], list[float]]]:
    """For each prompt, the greedy tokens and the log-probabilities of its own from the second."""
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0
    )
    outputs, results = llm.generate(PROMPTS, sampling, use_tqdm=False), []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        positions = zip(output.prompt_logprobs[1:], ids_of(prompt)[1:], strict=True)
        results.append(
            (list(output.outputs[0].token_ids), [found[i].logprob for found, i in positions])
        )
    return results


@torch.no_grad()
def expected(model: hf.PreTrainedModel) -> list[tuple[list[int], list[float]]]:
    """The same by transformers."""
    results = []
    for prompt in PROMPTS:
        ids = torch.tensor([ids_of(prompt)])
        tokens = model.generate(
            ids, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        own = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        results.append((tokens[0, ids.shape[1] :].tolist(), own.tolist()))
    return results
