"""What a compressed model gains on this machine, beside its dense self: `mpop bench`."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import mpop
from mpop.checkpoints.opening import is_compressed, load_as_saved
from mpop.data.lengths import longest
from mpop.finetuning.trainer import peak_memory, reset_peak_memory
from mpop.models.light import count_parameters

_WARM_UP = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def benchmark(
    model_name_or_path: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    length: int = 128,
    new_tokens: int = 32,
    precision: str = "fp32",
    repeats: int = 10,
) -> dict[str, Any]:
    """Measure a compressed model, and the dense model of the same weights, on this machine.

    Each runs in a process of its own, from a checkpoint, on the accelerator where there is one.

    Args:
        model_name_or_path: a folder or hub name of an MPO model.
        batch_sizes: texts at a time.
        length: tokens of each text, at most what the model takes.
        new_tokens: tokens to generate where the model generates, with its cache.
        precision: of the weights: `"fp32"`, `"bf16"` or `"fp16"`.
        repeats: calls timed, after a warm-up; medians are reported.

    Returns:
        `"dense"` and `"mpo"`, each with `parameters`, `disk_bytes`, `peak_memory_bytes` and its
        kind, `seconds` `{batch size as a string: of one forward pass}` and `tokens_per_second`
        likewise; of one that generates `new_tokens_per_second` at the smallest batch. Beside them
        the `conditions`.

    Raises:
        ValueError: a dense model, or a bad argument.
        ChildProcessError: a measurement that failed, such as for want of memory.
    """
    sizes = tuple(dict.fromkeys(batch_sizes))
    if not sizes or min(*sizes, length, new_tokens, repeats) < 1:
        raise ValueError("expected batch sizes, a length, new tokens and repeats of at least 1")
    if precision not in DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(DTYPES)}, got {precision!r}")
    if not is_compressed(model_name_or_path):
        raise ValueError(f"{model_name_or_path} is dense; compress it first: mpop compress")
    options = {
        "batch_sizes": sizes,
        "length": length,
        "new_tokens": new_tokens,
        "precision": precision,
        "repeats": repeats,
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mpop-bench-") as folder:
        for name in ("mpo", "dense"):
            saved = Path(folder) / name
            model = load_as_saved(model_name_or_path).to(DTYPES[precision])  # type: ignore[arg-type]
            (model if name == "mpo" else mpop.merge(model)).save_pretrained(saved)
            del model
            found[name] = _measured_apart(saved, options)
    conditions = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **options,
        "length": found["mpo"]["length"],  # no more than the model takes
    }
    return {"model": str(model_name_or_path), **found, "conditions": conditions}


def _measured_apart(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "mpop.benchmark", str(folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ChildProcessError(f"measuring {folder.name} failed: {reason}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def median_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Of `repeats` calls after a warm-up, the device waited for."""
    times = []
    for _ in range(_WARM_UP + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])


@torch.no_grad()
def measure(folder: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """One model of `benchmark`, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    disk_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    model: Any = load_as_saved(folder).to(device).eval()  # type: ignore[arg-type]
    length = min(options["length"], longest(model) or options["length"])
    reset_peak_memory(device)
    seconds, rates = {}, {}
    repeats = options["repeats"]
    for size in tqdm(options["batch_sizes"], Path(folder).name, disable=None):
        batch = _batch(model, size, length, device)
        seconds[size] = median_seconds(partial(model, **batch), device, repeats)
        rates[size] = size * length / seconds[size]
    memory = peak_memory(device)
    result = {
        "parameters": count_parameters(model).total,
        "disk_bytes": disk_bytes,
        **memory,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": rates,
    }
    if model.can_generate():
        batch = _batch(model, min(options["batch_sizes"]), min(length, 16), device)
        count = options["new_tokens"]
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        generate = partial(model.generate, **prompts, **settings)
        elapsed = median_seconds(generate, device, max(1, repeats // 5))
        result["new_tokens_per_second"] = min(options["batch_sizes"]) * count / elapsed
    return result


def _batch(
    model: PreTrainedModel, rows: int, length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    ids = torch.randint(2, vocabulary, (rows, length), dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        # BART and T5 classify by where a text ends: once, as a tokenizer ends it.
        if (end := model.config.eos_token_id) in range(vocabulary):
            ids[ids == end] = (end + 1) % vocabulary
            ids[:, -1] = end
        batch["decoder_input_ids"] = ids
    return batch


def format_benchmark(found: dict[str, Any]) -> str:
    """Dense beside MPO as a table that a person can read."""
    from mpop.compression.report import table

    dense, mpo = found["dense"], found["mpo"]

    def line(name: str, unit: str, value: Callable[[dict[str, Any]], float]) -> tuple[str, ...]:
        a, b = value(dense), value(mpo)
        return name, f"{a:,.4g} {unit}".strip(), f"{b:,.4g} {unit}".strip(), f"{b / a:.2f}"

    lines = [
        line("parameters", "M", lambda m: m["parameters"] / 1e6),
        line("on disk", "MB", lambda m: m["disk_bytes"] / 1e6),
        line("peak memory", "MB", lambda m: m["peak_memory_bytes"] / 1e6),
    ]
    for size in map(str, found["conditions"]["batch_sizes"]):
        texts = "text" if size == "1" else "texts"
        lines += [
            line(f"latency of {size} {texts}", "ms", partial(_of, "seconds", size, 1e3)),
            line(f"tokens/s, {size} {texts}", "", partial(_of, "tokens_per_second", size, 1.0)),
        ]
    if "new_tokens_per_second" in mpo:
        lines.append(line("new tokens/s", "", lambda m: m["new_tokens_per_second"]))
    conditions = found["conditions"]
    return "\n".join(
        (
            table(("", "dense", "MPO", "MPO / dense"), lines, ()),
            f"{conditions['device']}, {conditions['threads']} threads, {conditions['precision']}, "
            f"{conditions['length']} tokens a text, torch {conditions['torch']}; memory: "
            f"{mpo['peak_memory_kind']}",
        )
    )


def _of(name: str, size: str, scale: float, measured: dict[str, Any]) -> float:
    return scale * measured[name][size]


def plot_benchmark(found: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw tokens per second against the batch size, dense beside MPO."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    draw_benchmark(found, figure.subplots())
    figure.savefig(path)


def draw_benchmark(found: dict[str, Any], axes: Any) -> None:
    """The same on axes of matplotlib."""
    for name in ("dense", "mpo"):
        rates = found[name]["tokens_per_second"]
        axes.plot(list(map(int, rates)), list(rates.values()), "o-", label=name)
    axes.set(xlabel="texts at a time", ylabel="tokens per second", xscale="log", ylim=(0, None))
    axes.set_xticks(list(map(int, rates)), list(rates))
    axes.minorticks_off()
    axes.legend()


def main(argv: Sequence[str]) -> None:
    """Measure the checkpoint in a folder; the last line of stdout is the result as JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(argv[0], json.loads(argv[1]))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
