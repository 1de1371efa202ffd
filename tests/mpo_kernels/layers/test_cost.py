"""What a layer costs: parameters, memory, predicted seconds."""

from __future__ import annotations

import pytest
import torch

from mpo_kernels import MPOShape
from mpo_kernels.cores.family import choose, low_ranks
from mpo_kernels.layers import cost as costs
from mpo_kernels.layers.cost import LayerCost
from mpo_kernels.planning.figures import default_figures


@pytest.mark.parametrize("objective", ["parameters", "memory", "latency"])
def test_objectives(objective: str) -> None:
    cost = LayerCost(objective, rows=64)
    shapes = list(low_ranks(96, 384, cost))
    costs = [cost.of(shape) for shape in shapes]
    dense = cost.of_dense(96, 384)
    assert costs and max(costs) < dense
    assert costs == sorted(costs)
    weight = torch.randn(384, 96)
    found = choose(weight, 0.6 * dense, cost)
    assert cost.of(found.shape) <= 0.6 * dense
    with pytest.raises(ValueError, match="budget that one rank meets"):
        choose(weight, 0.0, cost)


def test_the_memory_of_a_layer() -> None:
    shape = MPOShape.low_rank(8, 12, 3)
    assert LayerCost("memory", rows=5).of(shape) == 4 * (3 * 20 + 5 * 3)
    assert LayerCost("memory", rows=5).of_dense(8, 12) == 4 * 96
    assert LayerCost("memory", rows=5, interpolative=True).of(shape) == 4 * (3 * 17 + 5 * 3)
    balanced = MPOShape((2, 4), (3, 4), 2)
    assert LayerCost("memory", rows=1).of(balanced) == 4 * (balanced.num_parameters + 2 * 2 * 4)


def test_the_host_counts_for_dense_as_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small layer on a GPU the host is the slower: the geometric mean of the two."""
    figures = default_figures("cuda", torch.bfloat16, 1)
    monkeypatch.setattr(costs, "device_figures", lambda *_: figures)
    found = LayerCost("latency", dtype=torch.bfloat16).of_dense(64, 64)
    assert found == pytest.approx((figures.launch_seconds * figures.host_seconds) ** 0.5, rel=0.05)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"objective: expected one of .*got 'speed'"):
        LayerCost("speed")
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        LayerCost("memory", rows=0)
