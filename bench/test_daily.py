"""A few representative steps for the daily eye: ``pytest bench --benchmark-only``."""

from __future__ import annotations

import pytest
import torch

from bench.layer.cases import PASSES, Case
from bench.layer.problem import Problem, Step
from bench.layer.ways import WAYS

CASES = (
    Case("64x64", "n2-d16", 1),
    Case("4096x4096", "n2-d16", 1),
    Case("768x3072", "n2-d64", 16),
    Case("768x3072", "n5-full", 256),
)


@pytest.mark.parametrize("way", ("ours", "dense"))
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark, case: Case, name: str, way: str) -> None:
    problem = Problem(case.shape, case.rows, torch.device("cpu"), torch.float32)
    benchmark.group = f"{case.name} {name}"
    benchmark(Step(WAYS[way], problem, name))
