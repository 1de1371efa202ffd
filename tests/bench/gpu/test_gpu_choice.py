"""The planner's choices held against what was measured on an H200: it knows five figures of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.layer.cases import FACTORISATIONS, SHAPES
from mpo_kernels.backends.triton.planning import plan_fused
from mpo_kernels.backends.triton.tiles import LIMITS, MatrixTile
from mpo_kernels.planning.candidates import plan_library
from mpo_kernels.planning.figures import default_figures
from mpo_kernels.planning.plan import Call, Gradients, best_of

TIMES = Path(__file__).parents[3] / "bench" / "results" / "gpu" / "times.json"
POINTS = json.loads(TIMES.read_text())["records"]
# What was measured are graphs, which the host's time is no part of.
ORDERS = {"panels": "columns"}
FIGURES = replace(default_figures("cuda", torch.bfloat16, 1), host_seconds=0.0)


@pytest.mark.parametrize("record", POINTS, ids=lambda r: f"{r['case']}, {r['pass']}")
def test_the_choice_is_near_the_fastest_of_what_was_measured(record: dict[str, Any]) -> None:
    shape = FACTORISATIONS[record["factorisation"]](*SHAPES[record["size"]])
    trained = [k != shape.central or record["pass"] != "light" for k in range(shape.num_cores)]
    gradients = None if record["pass"] == "forward" else Gradients(True, tuple(trained))
    features, rows = (shape.in_features, shape.out_features), record["rows"]
    call = Call(shape.core_shapes, features, rows, torch.bfloat16, gradients)
    # The panels measured were the library's, and there was an implicit weight.
    fused = [p for p in plan_fused(call, FIGURES, LIMITS["sm_90"]).candidates if p.launches]
    plan = best_of([*plan_library(call, FIGURES).candidates, *fused])
    measured = {
        (c["algorithm"], ORDERS.get(c["algorithm"], c["order"]), tuple(c["split"])): c["median_us"]
        for c in record["planner"]["candidates"]
    }
    # What was timed there and still is a candidate: rows as matrices have not run on a device.
    times = [
        found
        for p in plan.candidates
        if not any(isinstance(launch.tile, MatrixTile) for launch in p.launches)
        and (found := measured.get((p.algorithm, p.order, p.split))) is not None
    ]
    assert times[0] <= 1.2 * min(times)
