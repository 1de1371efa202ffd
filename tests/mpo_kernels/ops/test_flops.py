"""Counted operations: those of the same products by einsum, of plans, and of dense layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpo_kernels import MPOEmbedding, MPOLinear, MPOShape
from mpo_kernels.layers.blockwise import BlockwiseLinear
from mpo_kernels.testing import ODD_SHAPES


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [1, 7, 10])
def test_two_factors_count_as_two_products(rows: int) -> None:
    layer = MPOLinear(64, 48, MPOShape.low_rank(64, 48, 4))
    a, b = layer.cores[1].detach().view(4, 64).t(), layer.cores[0].detach().view(48, 4).t()

    def factors(x: Tensor) -> Tensor:
        return x @ a @ b

    a.requires_grad_()
    b.requires_grad_()
    x = torch.randn(rows, 64, requires_grad=True)
    forward = counted(lambda: factors(x))
    assert counted(lambda: layer(x)) == forward
    assert counted(lambda: layer.quantized()(x.detach())) == forward
    y, again = layer(x).sum(), factors(x).sum()
    # x A is formed anew in backward.
    recomputed = counted(lambda: x @ a)
    assert counted(y.backward) == counted(again.backward) + recomputed


def test_one_core_counts_as_dense() -> None:
    layer, dense = MPOLinear(7, 5, MPOShape((7,), (5,))), torch.nn.Linear(7, 5)
    x = torch.randn(2, 3, 7, requires_grad=True)
    assert counted(lambda: layer(x)) == counted(lambda: dense(x))
    assert counted(layer(x).sum().backward) == counted(dense(x).sum().backward)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_twice_the_plans_multiply_adds(shape: MPOShape) -> None:
    layer = MPOLinear(shape.in_features, shape.out_features, shape)
    for rows in (1, 8, 64):
        x = torch.randn(rows, shape.in_features, requires_grad=True)
        assert counted(lambda x=x: layer(x)) == 2 * layer.plan(rows).macs
        loss = layer(x).sum()
        assert counted(loss.backward) == 2 * layer.plan(rows, backward=True).macs
    between = torch.randn(37, shape.in_features)
    assert layer.plan(64).fixed_macs * 2 <= counted(lambda: layer(between))
    assert counted(lambda: layer(between)) <= 2 * layer.plan(64).macs
    assert counted(lambda: layer(between[:0])) == 0


def test_frozen_centres_cost_less_and_panels_are_all_counted() -> None:
    layer = MPOLinear.from_linear(torch.nn.Linear(60, 48))
    x = torch.randn(16, 60, requires_grad=True)
    whole = counted(layer(x).sum().backward)
    layer.freeze_central()
    assert counted(layer(x).sum().backward) < whole
    assert counted(lambda: BlockwiseLinear(layer, 8)(x)) > 0


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_a_table(count: int) -> None:
    layer = MPOEmbedding(11, 10, MPOShape((3, 4), (2, 5), 4, in_features=11))
    first, second = (core.detach().requires_grad_() for core in layer.cores)
    ids = torch.tensor([1, 6, 9])[:count]  # of different leading digits

    def rows() -> Tensor:
        left = first[0, ids // 4]  # [n, 2, 4]
        return torch.bmm(left, second[:, ids % 4, :, 0].transpose(0, 1))

    forward = counted(rows)
    assert counted(lambda: layer(ids)) == forward
    total, again = layer(ids).sum(), rows().sum()
    assert counted(total.backward) == forward + counted(again.backward)


def test_nothing_is_computed_on_meta() -> None:
    with torch.device("meta"):
        layer = MPOLinear(64, 64, MPOShape.low_rank(64, 64, 4))
        x = torch.randn(10, 64)
    assert counted(lambda: layer(x)) == 2 * 10 * (64 * 4 + 4 * 64)
