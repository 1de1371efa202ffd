"""Memory that cutting a deep decoder takes: `python -m bench.language.peak`.

A Llama of many narrow blocks, random weights, is cut twice, each time in a process of its own: with
second moments of one block at a time, and with all of them. What is counted is the peak above what
loading the model and one backward pass had taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mpop
from bench.layer.report import table
from mpop.compression.calibration import MEMORY
from mpop.finetuning.trainer import peak_memory

# Texts a batch, their tokens, batches.
_TEXTS = (4, 128, 8)
_RATIO = 0.6


def moments_of_a_block(width: int, inner: int) -> int:
    """Bytes: of inputs twice, to fit to and to judge by, and of gradients; fp32."""
    sizes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    return sum(4 * (2 * ins**2 + outs**2) for ins, outs in sizes)


def measure(layers: int, width: int, inner: int, memory: int) -> dict[str, float]:
    """Bytes and seconds of one cut, in this process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).eval()
    rows, length, count = _TEXTS
    batches = [{"input_ids": torch.randint(256, (rows, length))} for _ in range(count)]
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    model.zero_grad(set_to_none=True)
    cpu = torch.device("cpu")
    before, begun = peak_memory(cpu)["peak_memory_bytes"], time.perf_counter()
    cut = mpop.CompressionConfig(compression=_RATIO, factors="interpolative", embeddings=False)
    mpop.compress(model, cut, batches, calibration_memory=memory)
    taken = peak_memory(cpu)["peak_memory_bytes"] - before
    return {"bytes": taken, "seconds": time.perf_counter() - begun}


def main(argv: Sequence[str]) -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.language.peak", description=__doc__)
    for name, default in {"layers": 24, "width": 192, "inner": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sizes = options.layers, options.width, options.inner
    if options.memory is not None:
        print(json.dumps(measure(*sizes, options.memory)))
        return
    block = moments_of_a_block(*sizes[1:])
    weights = 4 * options.layers * (4 * options.width**2 + 3 * options.width * options.inner)
    lines = []
    for memory, name in ((block, "one block's moments"), (MEMORY, "all")):
        command = [sys.executable, "-m", "bench.language.peak", *argv, "--memory", str(memory)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        held = min(memory, options.layers * block)
        lines.append(
            (name, f"{held / 1e6:.1f}", f"{found['bytes'] / 1e6:.0f}", f"{found['seconds']:.0f}")
        )
    hidden = 2 * 4 * options.width * _TEXTS[0] * _TEXTS[1] * _TEXTS[2]
    print(
        f"{options.layers} blocks, weights {weights / 1e6:.1f} MB, kept to {_RATIO:g}; "
        f"two streams of hidden states {hidden / 1e6:.1f} MB\n"
        + table(("at a time", "their MB", "peak, MB", "seconds"), lines)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
