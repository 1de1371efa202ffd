"""A training step of a whole encoder: ``python -m bench.train_step --output train_step.json``.

An encoder of BERT-base's size with random weights, a batch of 32 × 128, AdamW, the forward pass in
bf16 by autocast: dense, LoRA of as many trained parameters as light has, light (the exact five
cores, centres frozen), and light with centres in 8 and 4 bits. Each eagerly, compiled and, on a
GPU, captured in a graph: milliseconds a step, peak memory, and the kernels that a step launches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import mpop
from bench import facts
from bench.layer.measure import captured
from bench.results import Record, Results
from mpo_kernels import MPOLinear, MPOShape
from mpop.benchmark import median_seconds
from mpop.cli.options.values import positive_int
from mpop.finetuning.trainer import peak_memory, reset_peak_memory

METHODS = ("dense", "lora", "light", "light-8bit", "light-4bit")
MODES = ("eager", "compiled", "captured")
REPEATS = 20


def dense(config: BertConfig) -> BertForSequenceClassification:
    return BertForSequenceClassification(config)


def light(config: BertConfig, bits: int | None = None) -> BertForSequenceClassification:
    """Random cores in place of every matrix of the encoder; the rest but the head is frozen."""
    model = dense(config)
    model.bert.requires_grad_(False)
    for block in model.bert.encoder.layer:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    ins, outs = child.in_features, child.out_features
                    layer = MPOLinear(ins, outs, MPOShape.balanced(ins, outs, 5))
                    layer.cores[layer.central].requires_grad_(False)
                    setattr(parent, name, layer)
    if bits is not None:
        mpop.quantize_centres(model, bits)
    return model


def lora(config: BertConfig) -> nn.Module:
    """Of every matrix of the encoder, at the rank that trains about as much as light does."""
    model = dense(config)
    matrices = [m for m in model.bert.encoder.modules() if isinstance(m, nn.Linear)]
    each = sum(m.in_features + m.out_features for m in matrices)
    rank = max(1, round(trained(light(config)) / each))
    target = r".*encoder\.layer\..*\.(query|key|value|dense)"
    return get_peft_model(
        model, LoraConfig(r=rank, target_modules=target, modules_to_save=["classifier"])
    )


MAKE: dict[str, Callable[[BertConfig], nn.Module]] = {
    "dense": dense,
    "lora": lora,
    "light": light,
    "light-8bit": partial(light, bits=8),
    "light-4bit": partial(light, bits=4),
}


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_of(
    method: str, mode: str, config: BertConfig, size: tuple[int, int], device: torch.device
) -> tuple[nn.Module, Callable[[], None]]:
    """A model, and a step that trains it at a batch of ``size`` texts and tokens.

    Compiled it is one graph forward and one backward, or an error.
    """
    torch.manual_seed(0)
    model = MAKE[method](config).to(device).train()
    ids = torch.randint(5, config.vocab_size, size, device=device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros(size[0], dtype=torch.int64, device=device),
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, capturable=mode == "captured")
    run = torch.compile(model, fullgraph=True) if mode == "compiled" else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(**batch).loss
        loss.backward()
        optimizer.step()

    return model, step


def measure(
    method: str, mode: str, config: BertConfig, size: tuple[int, int], device: torch.device
) -> Record:
    """One method in one mode; see :func:`step_of`."""
    model, step = step_of(method, mode, config, size, device)
    call: Callable[[], Any] = step
    step()
    launches = _launches(step) if device.type == "cuda" and mode != "captured" else None
    if mode == "captured":
        if (graph := captured(step)) is None:
            raise RuntimeError("a step cannot be captured in a graph")
        call = graph.replay
    reset_peak_memory(device)
    seconds = median_seconds(call, device, REPEATS)
    return {
        "method": method,
        "mode": mode,
        "trained": trained(model),
        "step_ms": 1e3 * seconds,
        "launches": launches,
        **peak_memory(device),
    }


def _launches(step: Callable[[], None]) -> int:
    """Kernels that a step starts."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kinds = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == kinds for event in profile.events())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code, 1 where a method failed in some mode."""
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON, written after each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=None)
    sizes = {"type": positive_int}
    parser.add_argument("--batch", nargs=2, default=[32, 128], help="texts, tokens", **sizes)
    parser.add_argument("--layers", default=12, **sizes)
    parser.add_argument("--hidden", default=768, help="a multiple of 64", **sizes)
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = options.modes or [m for m in MODES if m != "captured" or device.type == "cuda"]
    if "captured" in modes and device.type != "cuda":
        parser.error("captured: expected a GPU, whose graphs they are")
    if options.hidden % 64:
        parser.error(f"--hidden: expected a multiple of 64, got {options.hidden}")
    config = BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_attention_heads=options.hidden // 64,
    )
    if options.batch[1] > config.max_position_embeddings:
        parser.error(
            f"--batch: expected at most {config.max_position_embeddings} tokens, "
            f"got {options.batch[1]}"
        )
    conditions = facts.conditions(
        "bench.train_step", argv, device, "transformers", "peft", batch=options.batch
    )
    try:
        results = Results(options.output, conditions, resume=False)
    except ValueError as error:
        parser.error(str(error))
    failed = False
    for method in options.methods:
        for mode in modes:
            try:
                record = measure(method, mode, config, tuple(options.batch), device)
            except Exception as error:  # one method's failure is a result, not the end
                record, failed = {"method": method, "mode": mode, "error": repr(error)}, True
            results.add(record)
            print(record, file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
