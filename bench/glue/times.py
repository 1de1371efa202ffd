"""What a trained model costs: `python -m bench.glue.times MODEL`, of a file that a run kept.

A step (forward, backward, AdamW) on 32 texts of 64 tokens and the memory that it took, then the
latency of one such text, adapters merged. The last line of stdout is the result, one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from bench import facts
from mpop.benchmark import median_seconds
from mpop.data.lengths import longest
from mpop.finetuning.trainer import peak_memory, reset_peak_memory

BATCH, LENGTH, REPEATS = 32, 64, 7


def measure(model: Any, autocast: torch.dtype | None = None) -> dict[str, Any]:
    """`step_seconds`, `latency_seconds` and `peak_memory_bytes` with its kind.

    Args:
        model: a classifier, trained where its parameters require a gradient.
        autocast: the dtype of the forward pass of a step; None for the parameters' own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    length = min(LENGTH, longest(model) or LENGTH)
    ids = torch.randint(5, model.config.vocab_size, (BATCH, length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def answer() -> None:
        with torch.no_grad():
            model(input_ids=ids[:1], attention_mask=batch["attention_mask"][:1])

    model.train()
    reset_peak_memory(device)
    step_seconds, memory = median_seconds(step, device, REPEATS), peak_memory(device)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()  # as it would be served
    model.eval()
    latency_seconds = median_seconds(answer, device, REPEATS)
    conditions = {"machine": facts.processor(), "threads": torch.get_num_threads()}
    seconds = {"step_seconds": step_seconds, "latency_seconds": latency_seconds}
    return {**seconds, **memory, **conditions}


def main(argv: Sequence[str]) -> None:
    """Measure the model in a file, its steps in the precision that is named after it."""
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[argv[1]]
    print(json.dumps(measure(torch.load(argv[0], weights_only=False), precision)))


if __name__ == "__main__":
    main(sys.argv[1:])
