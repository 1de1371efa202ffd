"""The methods of the table, and one run of one: `python -m bench.glue.methods '{"method": …}'`.

The last line of stdout is the result, one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import mpop
from bench import facts
from mpo_kernels import MPOLinear
from mpop.checkpoints.opening import load_as_saved, load_tokenizer
from mpop.finetuning.rows import calibration_batches
from mpop.finetuning.squeeze_task import squeeze_on_task
from mpop.finetuning.task import evaluate, finetune
from mpop.models.config import MatrixConfig
from mpop.models.matrices import dense_matrices, module_at, weight_of
from mpop.models.selection import select

# Of the encoder's linear parameters: what is kept where a method cuts, and where squeezing begins.
KEPT, QUARTER, BEGIN = 0.5, 0.25, 0.75
CALIBRATION_ROWS = 1500
MAX_DROP = 0.01
# Of the steps, those before the cut. What is cut with no regard to the data has longer to heal, or
# as long as the rest: a dense model cut early may not have learnt its task yet.
MOST, LESS = 0.9, 2 / 3
Prepare = Callable[[PreTrainedModel], Any]


@dataclass(frozen=True)
class Method:
    """How a model is made and trained.

    Attributes:
        what: for the table's caption.
        training: of `mpop finetune`.
        compress: of the base model, before it has a head, or of the fine-tuned one where the
            method cuts; of the model and calibration batches.
        before: of the steps, those of a dense model before it is cut; 0 where nothing is.
        calibrates: whether `compress` looks at the task's training rows.
        prepare: of the model with its head, just before training.
        squeezes: whether squeezing takes the place of the training after the cut.
    """

    what: str
    training: str = "full"
    compress: Callable[[PreTrainedModel, Any], Any] | None = None
    before: float = 0.0
    calibrates: bool = False
    prepare: Prepare | None = None
    squeezes: bool = False


def _frozen_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    model.base_model.embeddings.requires_grad_(False)  # type: ignore[union-attr]
    return model


def _frozen_words(model: PreTrainedModel) -> PreTrainedModel:
    model.get_input_embeddings().requires_grad_(False)
    return model


def matched_lora(model: PreTrainedModel, share: float | None = None) -> tuple[list[str], int]:
    """The encoder's linear layers, and LoRA's rank on them that trains as many as light does.

    Args:
        share: of light fine-tuning; None for the exact chain of five balanced cores.
    """
    matrices = [names[0] for names in dense_matrices(model.base_model)]
    linears = {name: module_at(model.base_model, name) for name in matrices}
    linears = {name: found for name, found in linears.items() if isinstance(found, nn.Linear)}
    light = sum(light_parameters(linear, share) for linear in linears.values())
    of_rank = sum(sum(found.weight.shape) for found in linears.values())
    return list(linears), max(1, round(light / of_rank))


def _lora(model: PreTrainedModel, share: float | None = None) -> Any:
    """As many trained parameters as light fine-tuning of the encoder's full-rank MPOs has."""
    linears, rank = matched_lora(model, share)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[f"{model.base_model_prefix}.{name}" for name in linears],
    )
    return get_peft_model(model, config)


def light_parameters(linear: nn.Linear, share: float | None = None) -> int:
    """Auxiliary entries of its exact decomposition, into five balanced factors without a share."""
    shape = MatrixConfig(share=share).shape(linear.in_features, linear.out_features)
    with torch.device("meta"):
        layer = MPOLinear(linear.in_features, linear.out_features, shape, bias=False)
    return sum(core.numel() for k, core in enumerate(layer.cores) if k != layer.central)


def _biases(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        in_head = not name.startswith(f"{model.base_model_prefix}.")
        parameter.requires_grad_(name.endswith("bias") or in_head)
    return model


def _compress(
    model: PreTrainedModel, batches: Any, embeddings: bool = False, **options: Any
) -> None:
    mpop.compress(model, mpop.CompressionConfig(embeddings=embeddings, **options), batches)


def _low_rank(model: PreTrainedModel, batches: Any, kept: float = KEPT) -> None:
    """Plain SVD, or activation-aware with batches, the same fraction of every matrix."""
    overrides = {}
    for names in select(model, mpop.CompressionConfig(embeddings=False)):
        out_features, in_features = weight_of(module_at(model, names[0])).shape
        overrides[names[0]] = {
            "in_factors": (1, in_features),
            "out_factors": (out_features, 1),
            "compression": kept,
        }
    _compress(model, batches, overrides=overrides)


def _chosen(model: PreTrainedModel, batches: Any, kept: float = KEPT) -> None:
    _compress(model, batches, compression=kept, factors="auto")


def _exact(model: PreTrainedModel, _: Any, **options: Any) -> None:
    _compress(model, None, **options)
    mpop.balance(model)


def _direct(model: PreTrainedModel, _: Any) -> None:
    _compress(model, None, compression=KEPT)


def _svd(model: PreTrainedModel, _: Any) -> None:
    _low_rank(model, None)


def _light(share: float) -> Method:
    return Method(
        f"light fine-tuning of a share of {share:.1%}, two factors at full rank, the embeddings "
        "dense and frozen",
        "light",
        partial(_exact, share=share),
        prepare=_frozen_embeddings,
    )


def _lora_beside(share: float) -> Method:
    return Method(
        f"LoRA on the same matrices, as many trained as by a share of {share:.1%}",
        "dense",
        prepare=partial(_lora, share=share),
    )


# How light light fine-tuning can be.
SHARES = {"10": 0.1, "5": 0.05, "2.5": 0.025, "1": 0.01, "0.5": 0.005}

METHODS = {
    "dense": Method("ordinary fine-tuning", "dense"),
    "full": Method("MPOP_full: full rank, every tensor trained"),
    "light": Method(
        "MPOP_full+LFA: five factors at full rank, centres frozen",
        "light",
        partial(_exact, embeddings=True),
    ),
    "light-encoder": Method(
        "the same with the embeddings dense and frozen", "light", _exact, prepare=_frozen_embeddings
    ),
    "lora": Method("LoRA on the same matrices, as many trained", "dense", prepare=_lora),
    "biases": Method("only biases and head trained", "dense", prepare=_biases),
    "svd": Method("plain SVD to half, then all trained", compress=_svd, before=LESS),
    "svd-late": Method("the same, cut later, at the same cost", compress=_svd, before=MOST),
    "aware-svd": Method(
        "activation-aware SVD to half, then all trained",
        compress=_low_rank,
        before=MOST,
        calibrates=True,
    ),
    "dir": Method(
        "MPOP_dir: five balanced factors cut to half at once, then all trained",
        compress=_direct,
        before=LESS,
    ),
    "dir-late": Method("the same, cut later, at the same cost", compress=_direct, before=MOST),
    "chosen": Method(
        "factors and ranks chosen within half by the model's loss, then all trained",
        compress=_chosen,
        before=MOST,
        calibrates=True,
    ),
    "chosen-light": Method(
        "the same, then centres and embeddings frozen",
        "light",
        compress=_chosen,
        before=MOST,
        calibrates=True,
        prepare=_frozen_embeddings,
    ),
    "aware-svd-quarter": Method(
        "activation-aware SVD to a quarter, then all trained",
        compress=partial(_low_rank, kept=QUARTER),
        before=MOST,
        calibrates=True,
    ),
    "chosen-quarter": Method(
        "factors and ranks chosen within a quarter, then all trained",
        compress=partial(_chosen, kept=QUARTER),
        before=MOST,
        calibrates=True,
    ),
    "squeezed": Method(
        f"MPOP: from activation-aware low rank at three quarters, squeezed within "
        f"{100 * MAX_DROP:g} point on held-out rows, centres and embeddings frozen",
        "light",
        compress=partial(_low_rank, kept=BEGIN),
        before=MOST,
        calibrates=True,
        prepare=_frozen_embeddings,
        squeezes=True,
    ),
    **{f"light-{name}": _light(share) for name, share in SHARES.items()},
    **{f"lora-{name}": _lora_beside(share) for name, share in SHARES.items()},
    "light-10-tables": Method(
        "a share of 10 % with the vocabulary in a centre, and all other embeddings trained",
        "light",
        partial(_exact, share=0.1, embeddings=True),
    ),
    "light-10-words": Method(
        "a share of 10 % with the word embeddings dense and frozen, all others trained",
        "light",
        partial(_exact, share=0.1),
        prepare=_frozen_words,
    ),
}
# Methods that are cut alike.
_AS = {"chosen-light": "chosen", "svd-late": "svd", "dir-late": "dir"}


def _made_once(cache: Path, name: str, made_of: Any, make: Callable[[Path], Any]) -> Path:
    """The folder that `make` writes, unless an earlier run did."""
    key = json.dumps([made_of, facts.commit()["commit"]], default=str)
    folder = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        new = folder.with_suffix(f".{os.getpid()}")  # a run may be stopped in the midst of it
        make(new)
        try:
            new.rename(folder)
        except OSError:  # a run beside this one has made it meanwhile
            if not folder.is_dir():
                raise
            shutil.rmtree(new)
    return folder


def fine_tuned(options: dict[str, Any], share: float, cache: Path) -> Path:
    """The folder with the dense model after its share of the steps."""
    options = {**options, "epochs": share * options["epochs"]}
    del options["output"], options["mpo_learning_rate"]
    model = options.pop("model")

    def make(folder: Path) -> None:
        finetune(model, output=folder, method="dense", **options)

    return _made_once(cache, f"dense-{options['task']}", [model, options], make)


def compressed(method: str, source: Path, options: dict[str, Any], cache: Path) -> Path:
    """The folder with the model at `source` as the method compresses it."""
    chosen = METHODS[method]
    compress = chosen.compress
    if compress is None:
        return source

    def make(folder: Path) -> None:
        model, batches = load_as_saved(source).float(), None
        if chosen.calibrates:
            data = options["task"], options["data_dir"], CALIBRATION_ROWS
            batches = calibration_batches(model, source, *data)
        compress(model, batches)
        mpop.save(model, folder)
        load_tokenizer(source).save_pretrained(folder)

    kind = _AS.get(method, method)
    return _made_once(cache, kind, [kind, source, chosen.calibrates and options["task"]], make)


def run(
    method: str, options: dict[str, Any], cache: Path, keep: Path | None = None
) -> dict[str, Any]:
    """Make, train, perhaps squeeze, and evaluate.

    Args:
        method: a name in `METHODS`.
        options: of `mpop.finetune.finetune`, with `model` and without a method.
        cache: folder for models made before, which seeds, rates and methods share.
        keep: a file for the trained model, pickled whole; see `bench.glue.times`.

    Returns:
        What `finetune` does, with `disk_bytes` of all that has to be kept.
    """
    chosen, trained = METHODS[method], []

    def prepare(model: PreTrainedModel) -> Any:
        trained.append(model if chosen.prepare is None else chosen.prepare(model))
        return trained[-1]

    split = options["eval_split"]
    if chosen.squeezes:
        # Its rows judge the cuts, so they are not trained on.
        options = {**options, "eval_split": "train-holdout"}
    source, base = Path(options["model"]), options["model"]
    if chosen.before:
        source = fine_tuned(options, chosen.before, cache)
        # What has been trained to the end of its schedule goes on at a low rate, all of it.
        rate, epochs = options["mpo_learning_rate"], (1 - chosen.before) * options["epochs"]
        options = {**options, "epochs": epochs, "learning_rate": rate}
    source = compressed(method, source, options, cache)
    del options["model"]
    output = Path(options["output"])
    if chosen.squeezes:
        result = _squeezed(source, options, split)
        model: Any = _frozen_embeddings(mpop.load(output))
    else:
        result = finetune(source, **options, method=chosen.training, prepare=prepare)
        model = trained[-1]
    kept = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if isinstance(model, PeftModel):
        kept += sum(4 * parameter.numel() for parameter in load_as_saved(base).parameters())
    if keep is not None:
        torch.save(model, keep)
    return {**result, "disk_bytes": kept}


def _squeezed(source: Path, options: dict[str, Any], split: str) -> dict[str, Any]:
    passed = ("output", "task", "data_dir", "batch_size", "max_length", "max_train_samples", "seed")
    squeezed = squeeze_on_task(
        source,
        max_drop=MAX_DROP,
        max_rounds=10,
        step=0.15,
        settle_steps=20,
        window=5,
        eval_split="train-holdout",
        learning_rate=options["mpo_learning_rate"],
        calibration_samples=1000,
        precision=options["precision"],
        prepare=_frozen_embeddings,
        **{name: options[name] for name in passed},
    )
    found: dict[str, Any] = {
        "value": squeezed["metric"],
        "metrics": {},
        "eval_samples": squeezed["eval_samples"],
    }
    if split == "dev":
        of_task = ("task", "data_dir", "batch_size", "max_length", "precision")
        found = evaluate(options["output"], **{name: options[name] for name in of_task})
    return {
        **{name: found[name] for name in ("value", "metrics", "eval_samples")},
        "metric": squeezed["metric_name"],
        "trainable_parameters": squeezed["trainable_parameters"],
        "total_parameters": squeezed["parameters"],
        "train_samples": squeezed["train_samples"],
        "rounds": squeezed["rounds"],
        "losses": [],
    }


def main(argv: Sequence[str]) -> None:
    """Do the run that the one argument, a JSON object, describes."""
    options = json.loads(argv[0])
    method, cache = options.pop("method"), Path(options.pop("cache"))
    keep = options.pop("keep", None)
    with redirect_stdout(sys.stderr):
        result = run(method, options, cache, keep and Path(keep))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
