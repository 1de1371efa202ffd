"""How much of a fine-tuning gradient each way to train few numbers can follow.

`python -m bench.glue.gradient --output O`. A dense encoder is fine-tuned for a few steps, so that
its head means something; then the mean gradient of the loss over other training rows is taken for
every linear layer. What a method follows at first is the gradient's projection on the directions in
which its trained tensors can move W: of light fine-tuning those of the auxiliary tensors, of LoRA
those of B beside A as drawn. LoRA's A turns as well; the best that any A of its rank can do is the
gradient's leading singular vectors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, lsqr
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from bench.glue.encoder import say, table
from bench.glue.methods import light_parameters, matched_lora
from mpo_kernels import MPOShape, decompose
from mpo_kernels.cores.chain import merge_cores
from mpop.data.glue import get_task
from mpop.finetuning.classifier import load_for_training
from mpop.finetuning.rows import encoded, fitting, load_data, padding_tokenizer
from mpop.finetuning.task import finetune
from mpop.finetuning.trainer import Collator
from mpop.models.config import MatrixConfig
from mpop.models.light import SHARE
from mpop.models.matrices import module_at

_BATCH = 32


def followed(gradient: Tensor, weight: Tensor, shape: MPOShape) -> float:
    """The share of the squared norm that auxiliary tensors of an exact decomposition can follow.

    Args:
        gradient, weight: ``[out_features, in_features]``, float64.
        shape: of full rank.
    """
    cores, central = decompose(weight, shape).cores, shape.central
    trained = [core for k, core in enumerate(cores) if k != central]
    sizes = [core.numel() for core in trained]
    out_features, in_features = weight.shape

    def matrix(*auxiliary: Tensor) -> Tensor:
        chain = [*auxiliary[:central], cores[central], *auxiliary[central:]]
        return merge_cores(chain)[0, :in_features, :out_features, 0].t()

    def push(step: Any) -> Any:
        parts = torch.as_tensor(step).ravel().split(sizes)
        tangents = tuple(part.view_as(core) for part, core in zip(parts, trained, strict=True))
        return torch.func.jvp(matrix, tuple(trained), tangents)[1].ravel().numpy()

    pull = torch.func.vjp(matrix, *trained)[1]

    def back(change: Any) -> Any:
        parts = pull(torch.as_tensor(change).view_as(weight))
        return torch.cat([part.ravel() for part in parts]).numpy()

    operator = LinearOperator((weight.numel(), sum(sizes)), push, back, dtype=float)
    unfollowed = lsqr(operator, gradient.ravel().numpy(), atol=1e-6, btol=1e-6)[3]
    return 1 - (unfollowed / float(gradient.norm())) ** 2


def gradients(model: PreTrainedModel, batches: DataLoader[Any]) -> None:
    """Leave the mean gradient of the loss over all batches in the model, without dropout."""
    model.eval().zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """For every linear layer the gradient's squared norm, and the share of it each way follows."""
    torch.manual_seed(0)
    task = get_task(options.task)
    rows, split = options.steps * _BATCH, "train-holdout"
    with tempfile.TemporaryDirectory() as folder:
        finetune(
            *(options.model, options.task, folder, "dense"),
            data_dir=options.data_dir,
            learning_rate=1e-4,
            epochs=1,
            batch_size=_BATCH,
            max_train_samples=rows,
            eval_split=split,
        )
        model = load_for_training(folder, task, "dense", None)
    tokenizer = padding_tokenizer(options.model, model)
    unseen = load_data(task, options.data_dir, split, rows, None)[1][split]
    unseen = encoded(unseen, tokenizer, fitting(128, model, tokenizer))
    gradients(model, DataLoader(unseen, _BATCH, collate_fn=Collator(tokenizer)))
    linears, rank = matched_lora(model)
    found = {}
    for name in linears:
        say(name)
        linear = module_at(model.base_model, name)
        weight, gradient = linear.weight.detach().double(), linear.weight.grad.double()
        energy = gradient.square().sum()
        drawn = torch.empty(rank, weight.shape[1]).double().uniform_(-1, 1)
        rows_of_a = torch.linalg.qr(drawn.T).Q
        sizes = weight.shape[1], weight.shape[0]
        found[name] = {
            "squared_norm": float(energy),
            "light": followed(gradient, weight, MatrixConfig().shape(*sizes)),
            "share": followed(gradient, weight, MatrixConfig(share=SHARE).shape(*sizes)),
            "drawn": float((gradient @ rows_of_a).square().sum() / energy),
            "best": float(torch.linalg.svdvals(gradient)[:rank].square().sum() / energy),
            "trained": light_parameters(linear) / weight.numel(),
            "trained_share": light_parameters(linear, SHARE) / weight.numel(),
            "parameters": weight.numel(),
        }
    return {"rank": rank, "rows": len(unseen), "matrices": found}


def markdown(found: dict[str, Any], conditions: dict[str, Any]) -> list[str]:
    """Shares of each layer's gradient: their mean, least and most; of all of it; a caption."""
    matrices = list(found["matrices"].values())
    energy = sum(row["squared_norm"] for row in matrices)
    numbers = sum(row["parameters"] for row in matrices)
    trained, shared = (
        sum(row[kind] * row["parameters"] for row in matrices) / numbers
        for kind in ("trained", "trained_share")
    )
    lines = ["| | mean of the layers | least, most | of the whole |", "|---|---:|---:|---:|"]
    for name, key in (
        ("light fine-tuning, five balanced factors", "light"),
        (f"light fine-tuning, a share of {SHARE:.0%}", "share"),
        (f"LoRA of rank {found['rank']}, B beside A as drawn", "drawn"),
        (f"the best directions of rank {found['rank']}", "best"),
    ):
        shares = [row[key] for row in matrices]
        whole = sum(row[key] * row["squared_norm"] for row in matrices) / energy
        mean, extremes = statistics.fmean(shares), f"{min(shares):.1%}, {max(shares):.1%}"
        lines.append(f"| {name} | {mean:.1%} | {extremes} | {whole:.1%} |")
    largest = max(found["matrices"], key=lambda name: found["matrices"][name]["squared_norm"])
    of_largest = found["matrices"][largest]["squared_norm"] / energy
    lines += [
        "",
        f"Of the squared norm of the mean gradient over {found['rows']} held-out training rows of "
        f"{conditions['task']}, in {len(matrices)} linear layers of {conditions['model']} after "
        f"{conditions['steps']} steps of dense fine-tuning; of the whole {largest} has "
        f"{of_largest:.0%}. Light trains {trained:.1%} of their parameters, the share "
        f"{shared:.1%}.",
    ]
    return lines


SETTINGS = {"task": ("cola", "whose training rows"), "steps": (15, "of 32 rows, before")}


def main(argv: Sequence[str]) -> None:
    """Measure and write `gradient.json` and `gradient.md`."""
    table("gradient", __doc__, argv, SETTINGS, measure, markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
