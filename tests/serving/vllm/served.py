"""vLLM serving a small model, and what transformers gives for the same prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

PROMPTS = ("w5 w17 w99 w140 w3", "w7", "w1 w1 w2 w3 w5 w8 w13 w21 w34 w55 w89 w144")
NEW_TOKENS = 12


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
