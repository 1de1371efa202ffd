"""The methods of the table, and one run of one: `python -m bench.methods '{"method": …}'`.

The last line of stdout is the result, one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

import mpop
from bench import facts
from mpo_kernels import MPOLinear
from mpop.config import MatrixConfig
from mpop.finetune import calibration_batches, evaluate, finetune
from mpop.modules import dense_matrices, module_at, weight_of
from mpop.pretrained import load_as_saved, load_tokenizer
from mpop.squeeze_task import squeeze_on_task

# Of the encoder's linear parameters, for every method that truncates.
KEPT = 0.5
CALIBRATION_ROWS = 1500
MAX_DROP = 0.01
Prepare = Callable[[PreTrainedModel], Any]


@dataclass(frozen=True)
class Method:
    """How a model is made and trained.

    Attributes:
        what: for the table's caption.
        training: of `mpop finetune`.
        compress: of the base model, before it has a head; of the model and calibration batches.
        calibrates: whether `compress` looks at the task's training rows.
        prepare: of the model with its head, just before training.
        squeezes: whether squeezing follows.
    """

    what: str
    training: str = "full"
    compress: Callable[[PreTrainedModel, Any], Any] | None = None
    calibrates: bool = False
    prepare: Prepare | None = None
    squeezes: bool = False


def _frozen_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    model.base_model.embeddings.requires_grad_(False)  # type: ignore[union-attr]
    return model


def _lora(model: PreTrainedModel) -> Any:
    """As many trained parameters as light fine-tuning of the encoder's full-rank MPOs has."""
    matrices = [names[0] for names in dense_matrices(model.base_model)]
    linears = [
        name for name in matrices if isinstance(module_at(model.base_model, name), torch.nn.Linear)
    ]
    light = sum(_auxiliary(module_at(model.base_model, name)) for name in linears)
    a_rank = sum(sum(module_at(model.base_model, name).weight.shape) for name in linears)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=round(light / a_rank),
        lora_alpha=2 * round(light / a_rank),
        target_modules=[f"{model.base_model_prefix}.{name}" for name in linears],
    )
    return get_peft_model(model, config)


def _auxiliary(linear: torch.nn.Linear) -> int:
    shape = MatrixConfig().shape(linear.in_features, linear.out_features)
    with torch.device("meta"):
        layer = MPOLinear(linear.in_features, linear.out_features, shape, bias=False)
    return sum(core.numel() for k, core in enumerate(layer.cores) if k != layer.central)


def _biases(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        in_head = not name.startswith(f"{model.base_model_prefix}.")
        parameter.requires_grad_(name.endswith("bias") or in_head)
    return model


def _compress(model: PreTrainedModel, batches: Any, **options: Any) -> None:
    mpop.compress(model, mpop.CompressionConfig(embeddings=False, **options), batches)


def _low_rank(model: PreTrainedModel, batches: Any) -> None:
    """Plain SVD, or activation-aware with batches, the same fraction of every matrix."""
    overrides = {}
    for names in dense_matrices(model):
        out_features, in_features = weight_of(module_at(model, names[0])).shape
        overrides[names[0]] = {
            "in_factors": (1, in_features),
            "out_factors": (out_features, 1),
            "compression": KEPT,
        }
    words = next(name for name in overrides if name.endswith("word_embeddings"))
    del overrides[words]
    _compress(model, batches, overrides=overrides)


METHODS = {
    "dense": Method("ordinary fine-tuning", "dense"),
    "full": Method("MPOP_full: full rank, every tensor trained"),
    "light": Method("MPOP_full+LFA: full rank, centres frozen", "light"),
    "light-encoder": Method(
        "the same with the embeddings dense and frozen",
        "light",
        lambda model, _: _compress(model, None),
        prepare=_frozen_embeddings,
    ),
    "lora": Method("LoRA on the same matrices, as many trained", "dense", prepare=_lora),
    "biases": Method("only biases and head trained", "dense", prepare=_biases),
    "svd": Method("plain SVD, then all trained", compress=lambda model, _: _low_rank(model, None)),
    "aware-svd": Method(
        "activation-aware SVD, then all trained", compress=_low_rank, calibrates=True
    ),
    "dir": Method(
        "MPOP_dir: five balanced factors cut at once, then all trained",
        compress=lambda model, _: _compress(model, None, compression=KEPT),
    ),
    "chosen": Method(
        "factors and ranks chosen by the model's loss, then all trained",
        compress=lambda model, batches: _compress(model, batches, compression=KEPT, factors="auto"),
        calibrates=True,
    ),
    "chosen-light": Method(
        "the same, centres and embeddings frozen",
        "light",
        lambda model, batches: _compress(model, batches, compression=KEPT, factors="auto"),
        calibrates=True,
        prepare=_frozen_embeddings,
    ),
    "squeezed": Method(
        f"MPOP: light-encoder, then squeezed within {100 * MAX_DROP:g} point on held-out rows",
        "light",
        lambda model, _: _compress(model, None),
        prepare=_frozen_embeddings,
        squeezes=True,
    ),
}


def compressed(method: str, options: dict[str, Any], cache: Path) -> str:
    """The folder with the base model as the method compresses it, made once."""
    made = METHODS[method].compress
    if made is None:
        return str(options["model"])
    task = options["task"] if METHODS[method].calibrates else None
    kind = {"chosen-light": "chosen", "squeezed": "light-encoder"}.get(method, method)
    made_of = [kind, task, str(options["model"]), str(options["data_dir"]), KEPT, CALIBRATION_ROWS]
    key = hashlib.sha256(json.dumps([*made_of, facts.commit()["commit"]]).encode()).hexdigest()
    folder = cache / f"{kind}-{task or 'any'}-{key[:8]}"
    if not folder.is_dir():
        batches = None
        if task is not None:
            source = options["model"], task, options["data_dir"], CALIBRATION_ROWS
            batches = calibration_batches(*source)
        model = load_as_saved(options["model"]).float()
        made(model, batches)
        new = folder.with_suffix(f".{os.getpid()}")  # a run may be stopped in the midst of it
        mpop.save(model, new)
        load_tokenizer(options["model"]).save_pretrained(new)
        new.rename(folder)
    return str(folder)


def run(method: str, options: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Make, train, perhaps squeeze, and evaluate.

    Args:
        method: a name in `METHODS`.
        options: of `mpop.finetune.finetune`, with `model` and without a method.
        cache: folder for models that were compressed before, which seeds and rates share.

    Returns:
        What `finetune` does, with `disk_bytes` of all that has to be kept, and `latency_seconds`
        of one text of 64 tokens, a median.
    """
    chosen, trained = METHODS[method], []

    def prepare(model: PreTrainedModel) -> Any:
        trained.append(model if chosen.prepare is None else chosen.prepare(model))
        return trained[-1]

    options = {**options, "model_name_or_path": compressed(method, options, cache)}
    base = options.pop("model")
    if chosen.squeezes:
        # Its rows judge the cuts, so they are not trained on.
        split, options["eval_split"] = options["eval_split"], "train-holdout"
    result = finetune(**options, method=chosen.training, prepare=prepare)
    model, output = trained[-1], Path(options["output"])
    if chosen.squeezes:
        result |= _squeezed(options, split)
        model, output = mpop.load(f"{output}-squeezed"), Path(f"{output}-squeezed")
    kept = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()  # as it would be served
        kept += sum(4 * parameter.numel() for parameter in load_as_saved(base).parameters())
    return {**result, "disk_bytes": kept, "latency_seconds": _latency(model)}


def _squeezed(options: dict[str, Any], split: str) -> dict[str, Any]:
    passed = ("task", "data_dir", "batch_size", "max_length", "max_train_samples", "seed")
    shared = {name: options[name] for name in passed}
    output = f"{options['output']}-squeezed"
    squeezed = squeeze_on_task(
        options["output"],
        output=output,
        max_drop=MAX_DROP,
        max_rounds=12,
        step=0.1,
        settle_steps=40,
        window=10,
        eval_split="train-holdout",
        learning_rate=options["mpo_learning_rate"] / 10,
        prepare=METHODS["squeezed"].prepare,
        **shared,
    )
    found: dict[str, Any] = {"value": squeezed["metric"], "metrics": {}, "eval_samples": 0}
    if split == "dev":
        of_task = ("task", "data_dir", "batch_size", "max_length")
        found = evaluate(output, **{name: options[name] for name in of_task})
    return {
        **{name: found[name] for name in ("value", "metrics", "eval_samples")},
        "trainable_parameters": squeezed["trainable_parameters"],
        "total_parameters": squeezed["parameters"],
        "rounds": squeezed["rounds"],
    }


@torch.no_grad()
def _latency(model: Any) -> float:
    device = next(model.parameters()).device
    ids = torch.ones(1, min(64, model.config.max_position_embeddings), dtype=int, device=device)
    model.eval()
    times = []
    for _ in range(23):
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main(argv: Sequence[str]) -> None:
    """Do the run that the one argument, a JSON object, describes."""
    options = json.loads(argv[0])
    method, cache = options.pop("method"), Path(options.pop("cache"))
    with redirect_stdout(sys.stderr):
        result = run(method, options, cache)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
