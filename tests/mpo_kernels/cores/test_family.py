"""The members of the family and the choice between them."""

from __future__ import annotations

import pytest
import torch

from mpo_kernels import MPOShape, decompose, reconstruct
from mpo_kernels.cores.family import choose, members
from mpo_kernels.cores.fitting import output_error
from mpo_kernels.layers.cost import LayerCost


def test_low_rank_comes_first_and_all_hold_the_matrix() -> None:
    shapes = members(24, 36)
    assert shapes[0] == MPOShape.low_rank(24, 36, 24)
    assert {shape.num_cores for shape in shapes} == {2, 3, 5}
    assert {(s.in_features, s.out_features) for s in shapes} == {(24, 36)}
    assert members(1, 1) and members(7, 13)


def test_never_worse_than_low_rank_by_the_judge_and_within_the_budget() -> None:
    weight, x = torch.randn(24, 36), torch.randn(2, 200, 36)
    fit, judge = x.transpose(1, 2) @ x
    cost = LayerCost()
    for ratio in (0.3, 0.7):
        found = choose(weight, ratio * weight.numel(), cost, fit, judge)
        assert cost.of(found.shape) <= ratio * weight.numel()
        rank = int(ratio * weight.numel() / 60)
        low = decompose(weight, MPOShape.low_rank(36, 24, rank), second_moment=fit)
        assert found.output_error <= output_error(weight, reconstruct(low.cores), judge)
        both = fit + judge
        refitted = decompose(weight, found.shape, second_moment=both)
        assert torch.equal(reconstruct(found.cores), reconstruct(refitted.cores))


def test_devices_leave_the_members_that_can_be_dealt_to_them() -> None:
    shapes = members(24, 36, 4)
    assert shapes[0] == MPOShape.low_rank(24, 36, 24)
    assert {shape.num_cores for shape in shapes} == {2, 3, 5}
    assert all(shape.splits(4) for shape in shapes)
    assert not all(shape.splits(4) for shape in members(24, 36))
    kronecker = torch.kron(torch.randn(9, 4), torch.randn(4, 6))
    assert choose(kronecker, 60, LayerCost()).shape.out_factors == (9, 4)
    assert choose(kronecker, 200, LayerCost(), tensor_parallel=4).shape.splits(4)


def test_a_kronecker_product_is_recognised() -> None:
    """Of full rank, but of one two-core MPO with bond 1."""
    weight = torch.kron(torch.randn(6, 4), torch.randn(4, 6))
    found = choose(weight, 60, LayerCost())
    assert found.rel_error < 1e-5 and found.shape.in_factors == (4, 6)


def test_what_it_is_given_is_checked_once_and_for_all() -> None:
    weight, x = torch.randn(6, 4), torch.randn(9, 4)
    moment, budget = x.t() @ x, 0.8 * 24
    with pytest.raises(ValueError, match="expected a positive semidefinite second moment"):
        choose(weight, budget, LayerCost(), 1 - 0.5 * torch.eye(4))
    with pytest.raises(ValueError, match="expected a finite second moment of gradients"):
        choose(weight, budget, LayerCost(), moment, gradient_moment=torch.zeros(6, 6))
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="expected a finite weight"):
        choose(weight, budget, LayerCost(), moment)
