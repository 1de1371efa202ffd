"""Balanced cores, and gradients carried from one chain of cores to another, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOLinear, MPOShape, reconstruct, round_cores
from mpo_kernels.cores.chain import merge_cores
from mpo_kernels.cores.gauge import balanced, bond_maps, carried
from mpo_kernels.testing import ODD_SHAPES, random_cores


def gradients(cores: list[Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Of <grad, x W> by autograd through an explicit product."""
    leaves = [core.detach().clone().requires_grad_() for core in cores]
    product = leaves[0]
    for core in leaves[1:]:
        product = torch.einsum("aijb,bklc->aikjlc", product, core).flatten(1, 2).flatten(2, 3)
    return list(torch.autograd.grad((x @ product[0, :, :, 0] * grad).sum(), leaves))


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_a_change_of_gauge_loses_nothing(shape: MPOShape) -> None:
    shape = MPOShape(shape.in_factors, shape.out_factors, shape.ranks)
    old = random_cores(shape, torch.float64, torch.device("cpu"))
    rounded = round_cores(old)
    new, central = rounded.cores, shape.central
    x, grad = (
        torch.randn(3, shape.in_features).double(),
        torch.randn(3, shape.out_features).double(),
    )
    maps = bond_maps(old, new, central)
    for k, (before, after) in enumerate(
        zip(gradients(old, x, grad), gradients(new, x, grad), strict=True)
    ):
        torch.testing.assert_close(carried(before, maps[k], maps[k + 1]), after)


def test_a_cut_keeps_what_concerns_the_rest() -> None:
    shape = MPOShape((3, 4, 2), (2, 3, 5), (5, 7))
    old = random_cores(shape, torch.float64, torch.device("cpu"))
    x, grad = torch.randn(3, 24).double(), torch.randn(3, 30).double()
    # Nearly of these smaller bonds, so that the cut takes almost nothing away.
    small = round_cores(old, ranks=(3, 4)).cores
    noise = [1e-7 * core for core in random_cores(shape, torch.float64, torch.device("cpu"))]
    for kept, core in zip(small, noise, strict=True):
        core[tuple(slice(size) for size in kept.shape)] += kept
    cut = round_cores(noise, ranks=(3, 4))
    torch.testing.assert_close(reconstruct(cut.cores), reconstruct(noise), atol=1e-5, rtol=0)
    maps = bond_maps(noise, cut.cores, shape.central)
    exact = gradients(cut.cores, x, grad)
    for k, before in enumerate(gradients(noise, x, grad)):
        found = carried(before, maps[k], maps[k + 1])
        torch.testing.assert_close(found, exact[k], atol=1e-4, rtol=1e-4)
        squares = carried(before.square(), maps[k], maps[k + 1], squared=True)
        assert squares.shape == exact[k].shape and (squares >= 0).all()


def dense(cores: list[Tensor]) -> Tensor:
    return merge_cores([core.double() for core in cores])[0, :, :, 0]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_entries_of_balanced_cores_weigh_alike_in_the_matrix(shape: MPOShape) -> None:
    shape = MPOShape(shape.in_factors, shape.out_factors, shape.ranks)
    cores = random_cores(shape, torch.float64, torch.device("cpu"))
    cores[0] *= 1e3
    found, central = balanced(cores, shape.central), shape.central
    torch.testing.assert_close(dense(found), dense(cores))
    for k in set(range(len(found))) - {central}:
        # By autograd: the mean square over entries of what a step on each changes W by.
        changes = torch.func.jacrev(lambda core, k=k: dense([*found[:k], core, *found[k + 1 :]]))
        effect = changes(found[k]).square().sum() / found[k].numel()
        assert float(effect) == pytest.approx(64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balancing_in_place_keeps_what_the_layer_computes(dtype: torch.dtype) -> None:
    layer = MPOLinear(24, 30, MPOShape((3, 4, 2), (2, 3, 5), (5, 7)), dtype=dtype)
    parameters, x = list(layer.parameters()), torch.randn(5, 24, dtype=dtype)
    before = layer(x)
    layer.balance()
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(before.detach().abs().max())
    torch.testing.assert_close(layer(x), before, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [1e-3, 60.0])
def test_a_dtype_without_room_for_balanced_cores_leaves_the_layer(size: float) -> None:
    linear = torch.nn.Linear(64, 64, dtype=torch.float16)
    torch.nn.init.normal_(linear.weight, std=size)
    layer = MPOLinear.from_linear(linear, MPOShape.balanced(64, 64, 5))
    before = [core.detach().clone() for core in layer.cores]
    with pytest.raises(ValueError, match="expected a dtype with room for balanced cores"):
        layer.balance()
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, before, strict=True))
    layer.float().balance()
    assert all(core.isfinite().all() for core in layer.cores)


def test_nothing_and_bonds_that_are_too_large_can_be_balanced() -> None:
    zero = [torch.zeros(1, 2, 3, 4), torch.zeros(4, 5, 2, 4), torch.zeros(4, 2, 2, 1)]
    assert all(core.isfinite().all() for core in balanced(zero, 1))
    assert not dense(balanced(zero, 1)).any()
    wide = [torch.randn(1, 2, 1, 9), torch.randn(9, 5, 2, 8), torch.randn(8, 1, 3, 1)]
    found = balanced(wide, 1)
    assert [core.shape[3] for core in found] == [2, 3, 1]
    torch.testing.assert_close(dense(found), dense(wide), atol=1e-4, rtol=1e-4)
