"""What cutting a real encoder's matrices costs their outputs: `python -m bench.glue.fit`.

Second moments come from training rows of a GLUE task; every error is measured on other rows of it.
At the same parameters for each matrix: plain SVD, activation-aware SVD, the paper's five balanced
factors, and the member that `mpo_kernels.cores.family.choose` takes. Then the whole encoder at one
budget: the error of its last hidden state with each of them, and with ranks shared by allocation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import mpop
from bench.glue.encoder import say, table
from mpo_kernels import Decomposition, MPOShape, decompose, reconstruct
from mpo_kernels.cores.family import choose
from mpo_kernels.cores.fitting import output_error
from mpo_kernels.layers.cost import LayerCost
from mpop.checkpoints.opening import load_as_saved
from mpop.compression.calibration import Batches, Moments, second_moments
from mpop.compression.permute import sort_hidden_units
from mpop.finetuning.rows import calibration_batches
from mpop.models.matrices import module_at, weight_of
from mpop.models.selection import select

Fit = Callable[[Tensor, float, Moments], Decomposition]


def _cut(kind: Callable[[int, int], MPOShape], aware: bool) -> Fit:
    def fit(weight: Tensor, kept: float, moments: Moments) -> Decomposition:
        shape = kind(weight.shape[1], weight.shape[0])
        moment = _all(moments) if aware else None
        return decompose(weight, shape, compression=kept, second_moment=moment)

    return fit


def _low_rank(in_features: int, out_features: int) -> MPOShape:
    return MPOShape.low_rank(in_features, out_features, min(in_features, out_features))


def _chosen(weight: Tensor, kept: float, moments: Moments) -> Decomposition:
    return choose(weight, kept * weight.numel(), LayerCost(), moments.fit, moments.judge)


FITS: dict[str, Fit] = {
    "SVD": _cut(_low_rank, aware=False),
    "aware SVD": _cut(_low_rank, aware=True),
    "five factors": _cut(MPOShape.balanced, aware=False),
    "five factors, aware": _cut(MPOShape.balanced, aware=True),
    "chosen": _chosen,
}


def last_hidden(model: PreTrainedModel, batches: Batches) -> Tensor:
    """Rows of the last hidden state, without padding."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            hidden = model.eval()(**batch).last_hidden_state
            rows.append(hidden[batch["attention_mask"].bool()])
    return torch.cat(rows)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Errors of every matrix, and of the whole, on the rows after those calibrated with."""
    model = load_as_saved(options.model).float()
    rows = options.samples + options.test_samples
    batches = calibration_batches(model, options.model, options.task, options.data_dir, rows)
    calibration = batches[: options.samples // 32]
    test = batches[len(calibration) :]
    if not test or len(batches) * 32 - rows >= 32:
        raise ValueError(f"expected {rows} training rows of {options.task}, got fewer")
    config = mpop.CompressionConfig(compression=options.kept, factors="auto", embeddings=False)
    selected = select(model, config)
    sort_hidden_units(model, selected)  # as `compress` does; it changes no output
    moments = second_moments(model, calibration, selected)
    unseen = second_moments(model, test, selected)
    exact = last_hidden(model, test)
    whole = (exact - exact.mean(0)).norm()
    matrices: dict[str, dict[str, Any]] = {names[0]: {} for names in selected}
    changed: dict[str, float] = {}
    for fit, make in FITS.items():
        copied = copy.deepcopy(model)
        for names in selected:
            say(f"{fit}: {names[0]}")
            weight = weight_of(module_at(model, names[0])).detach()
            found = make(weight, options.kept, moments[names])
            sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
            new = reconstruct(found.cores, **sizes)
            lost = output_error(weight, new, _all(unseen[names]))
            matrices[names[0]][fit] = {"output_error": lost, "shape": found.shape.to_dict()}
            module_at(copied, names[0]).weight.data = new
        changed[fit] = float((last_hidden(copied, test) - exact).norm() / whole)
    say("ranks shared by allocation")
    low = copy.deepcopy(model)
    report = mpop.compress(model, config, calibration)
    changed["chosen, ranks allocated"] = float((last_hidden(model, test) - exact).norm() / whole)
    for row in report.rows:
        weight = weight_of(module_at(low, row.name))
        kept = row.parameters_after / row.parameters_before
        cut = FITS["aware SVD"](weight.detach(), kept, moments[(row.name,)])
        module_at(low, row.name).weight.data = reconstruct(cut.cores)
    changed["aware SVD, ranks allocated"] = float((last_hidden(low, test) - exact).norm() / whole)

    def ratio(fits: dict[str, Any], fit: str, to: str) -> float:
        return fits[fit]["output_error"] / fits[to]["output_error"]

    each = list(matrices.values())
    return {
        "matrices": matrices,
        "ratio_to_svd": {fit: statistics.fmean(ratio(m, fit, "SVD") for m in each) for fit in FITS},
        "worst_to_aware_svd": max(ratio(m, "chosen", "aware SVD") for m in each),
        "last_hidden_error": changed,
        "allocated": report.to_dict()["rows"],
    }


def _all(moments: Moments) -> Tensor:
    return moments.fit + moments.judge


def markdown(found: dict[str, Any], conditions: dict[str, Any]) -> list[str]:
    """Means over the matrices by role, the whole encoder, and a caption."""

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = ["| matrix | " + " | ".join(FITS) + " |", "|---|" + "---|" * len(FITS)]
    roles: dict[str, list[dict[str, Any]]] = {}
    for name, fits in found["matrices"].items():
        role = ".".join(part for part in name.split(".") if not part.isdigit())
        roles.setdefault(role.removeprefix("encoder.layer."), []).append(fits)
    for role, fits in roles.items():
        means = [statistics.fmean(f[fit]["output_error"] for f in fits) for fit in FITS]
        lines.append(row(f"{role} (mean of {len(fits)})", [f"{mean:.3f}" for mean in means]))
    ratios = [f"{found['ratio_to_svd'][fit]:.2f}" for fit in FITS]
    lines.append(row("**mean ratio to SVD**", ratios))
    whole = found["last_hidden_error"]
    lines.append(row("last hidden state", [f"{whole[fit]:.3f}" for fit in FITS]))
    lines += [
        "",
        f"Relative output errors on held-out rows of {conditions['task']}, "
        f"{conditions['kept']:.0%} of each matrix's parameters; {conditions['model']}, calibrated "
        f"with {conditions['samples']} rows, judged on {conditions['test_samples']} others. With "
        "ranks allocated over the encoder under the same budget, the last hidden state's error is "
        f"{whole['chosen, ranks allocated']:.3f} with the chosen members, and "
        f"{whole['aware SVD, ranks allocated']:.3f} with aware SVD at their sizes. The chosen "
        f"member's error is at most {found['worst_to_aware_svd']:.3f} × aware SVD's on any matrix.",
    ]
    return lines


SETTINGS = {
    "task": ("sst2", "whose training rows"),
    "kept": (0.5, "fraction of the parameters"),
    "samples": (3008, "rows to calibrate with, by 32"),
    "test_samples": (704, "rows to judge by"),
}


def main(argv: Sequence[str]) -> None:
    """Measure and write `fit.json` and `fit.md`."""
    table("fit", __doc__, argv, SETTINGS, measure, markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
