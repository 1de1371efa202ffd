"""Cores fitted under a second moment, against whitening in fp64 and against autograd."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOShape, decompose, reconstruct
from mpo_kernels.cores.fitting import (
    GRADIENT_RIDGE,
    RIDGE,
    fit,
    output_error,
    padded_moment,
    regularised,
    weighted_spectrum,
)


def moment_of(features: int, rows: int = 1000) -> Tensor:
    """Of inputs with a few strong directions."""
    scales = torch.logspace(1, -1, features, dtype=torch.float64)
    x = (torch.randn(rows, features, dtype=torch.float64) * scales) @ torch.linalg.qr(
        torch.randn(features, features, dtype=torch.float64)
    )[0]
    return x.t() @ x


def whitened_svd(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The best weight of this rank: W S^½ cut by an SVD and unwhitened by a triangular solve."""
    moment = moment / moment.diagonal().mean() + RIDGE * torch.eye(len(moment)).double()
    lower = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(weight @ lower, full_matrices=False)
    cut = left[:, :rank] * values[:rank] @ right[:rank]
    return torch.linalg.solve_triangular(lower.t(), cut.t(), upper=True).t()


@pytest.mark.parametrize(("features", "out"), [(12, 20), (20, 12), (7, 7)])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_is_whitened_svd(features: int, out: int, rank: int, transposed: bool) -> None:
    weight, moment = torch.randn(out, features).double(), moment_of(features)
    shape = MPOShape.low_rank(features, out, rank)
    if transposed:
        shape = MPOShape((features, 1), (1, out), rank)
    fitted = decompose(weight, shape, second_moment=moment)
    best = whitened_svd(weight, moment, rank)
    torch.testing.assert_close(reconstruct(fitted.cores), best, rtol=1e-6, atol=1e-8)
    assert fitted.output_error == pytest.approx(output_error(weight, best, moment), rel=1e-9)
    tail = weighted_spectrum(weight, moment)
    told = float(tail[rank:].square().sum().sqrt() / tail.square().sum().sqrt())
    held = output_error(weight, best, regularised(moment))
    assert told == pytest.approx(held, rel=1e-6)


@pytest.mark.parametrize(("features", "out"), [(12, 20), (20, 12), (7, 7)])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_under_gradients_both_sides_are_whitened(
    features: int, out: int, rank: int, transposed: bool
) -> None:
    weight, moment, gradients = (
        torch.randn(out, features).double(),
        moment_of(features),
        moment_of(out),
    )
    shape = MPOShape.low_rank(features, out, rank)
    if transposed:
        shape = MPOShape((features, 1), (1, out), rank)
    fitted = decompose(weight, shape, second_moment=moment, gradient_moment=gradients)
    held = gradients / gradients.diagonal().mean() + GRADIENT_RIDGE * torch.eye(out).double()
    lower = torch.linalg.cholesky(held)
    best = whitened_svd(lower.t() @ weight, moment, rank)
    best = torch.linalg.solve_triangular(lower.t(), best, upper=True)
    torch.testing.assert_close(reconstruct(fitted.cores), best, rtol=1e-6, atol=1e-8)
    lost = output_error(weight, best, moment, gradients)
    assert fitted.output_error == pytest.approx(lost, rel=1e-9)
    alone = decompose(weight, shape, second_moment=moment)
    assert lost < output_error(weight, reconstruct(alone.cores), moment, gradients)
    tail = weighted_spectrum(weight, moment, gradients)
    told = float(tail[rank:].square().sum().sqrt() / tail.square().sum().sqrt())
    held_error = output_error(weight, best, regularised(moment), held)
    assert told == pytest.approx(held_error, rel=1e-6)


def test_under_gradients_padded_outputs_stay_zero() -> None:
    weight = torch.randn(13, 7).double()
    shape = MPOShape((1, 8), (15, 1), 4, in_features=7, out_features=13)
    moments = {"second_moment": moment_of(7), "gradient_moment": moment_of(13)}
    padded = decompose(weight, shape, **moments)
    tight = decompose(weight, MPOShape.low_rank(7, 13, 4), **moments)
    whole = reconstruct(padded.cores)
    torch.testing.assert_close(whole[:13, :7], reconstruct(tight.cores), rtol=1e-9, atol=1e-9)
    assert whole[13:].abs().max() < 1e-12 and whole[:, 7:].abs().max() < 1e-12


def test_gradients_count_only_beside_inputs() -> None:
    shape = MPOShape.low_rank(7, 13, 4)
    with pytest.raises(ValueError, match="inputs beside one of gradients"):
        decompose(torch.randn(13, 7), shape, gradient_moment=moment_of(13))
    with pytest.raises(ValueError, match=r"\[13, 13\] of gradients, got its diagonal"):
        decompose(
            torch.randn(13, 7),
            shape,
            second_moment=moment_of(7),
            gradient_moment=moment_of(13).diagonal(),
        )
    with pytest.raises(ValueError, match=r"\[13, 13\]"):
        decompose(
            torch.randn(13, 7), shape, second_moment=moment_of(7), gradient_moment=moment_of(7)
        )


@pytest.mark.parametrize("split", [((1, 12), (4, 5)), ((12, 1), (4, 5))])
def test_one_core_with_the_whole_input_is_exact(split: tuple) -> None:
    """A chain whose weights are whitened on that core alone is an SVD of that."""
    ins, outs = split
    weight, moment = torch.randn(20, 12).double(), moment_of(12)
    fitted = decompose(weight, MPOShape(ins, outs, 3), second_moment=moment)
    lower = torch.linalg.cholesky(moment)
    cube = (weight @ lower).view(*outs, 12)
    matrix = cube.reshape(4, -1) if ins[0] == 1 else cube.transpose(0, 1).reshape(5, -1)
    tail = torch.linalg.svdvals(matrix)
    best = float(tail[3:].square().sum().sqrt() / tail.square().sum().sqrt())
    assert fitted.output_error == pytest.approx(best, rel=1e-3)


SHAPES = [
    MPOShape((3, 4), (4, 5), 4),
    MPOShape((5, 3), (2, 11), 3, in_features=13, out_features=21),
    MPOShape((2, 3, 2), (3, 2, 3), 3),
    MPOShape((2, 1, 3, 2), (1, 3, 2, 3), 2),
    MPOShape.balanced(32, 24, 5, 4),
]


@pytest.mark.parametrize(
    ("shape", "with_gradients"), [*((shape, False) for shape in SHAPES), (SHAPES[1], True)], ids=str
)
def test_no_core_alone_can_do_better(shape: MPOShape, with_gradients: bool) -> None:
    weight = torch.randn(shape.out_features, shape.in_features).double()
    moment = moment_of(shape.in_features)
    start = decompose(weight, shape)
    ins, outs = (torch.tensor(f).prod().item() for f in (shape.in_factors, shape.out_factors))
    padded = torch.zeros(ins, outs).double()
    padded[: shape.in_features, : shape.out_features] = weight.t()
    full, gradients, alike = padded_moment(moment, ins), None, torch.eye(outs).double()
    if with_gradients:
        gradients = alike = padded_moment(moment_of(shape.out_features), outs, GRADIENT_RIDGE)
    cores = fit(start.cores, padded, full, gradients, max_sweeps=3000, tolerance=1e-9)
    variables = [core.clone().requires_grad_() for core in cores]
    product = variables[0]
    for core in variables[1:]:
        product = torch.einsum("aijb,bklc->aikjlc", product, core).flatten(1, 2).flatten(2, 3)
    lost = padded - product[0, :, :, 0]
    whole = (padded * (full @ padded @ alike)).sum()
    loss = (lost * (full @ lost @ alike)).sum() / whole
    for gradient in torch.autograd.grad(loss, variables):
        assert gradient.abs().max() < 2e-4
    plain = reconstruct(start.cores, in_features=weight.shape[1], out_features=len(weight))
    held = None if gradients is None else alike[: len(weight), : len(weight)]
    assert float(loss.detach().sqrt()) < 0.9 * output_error(weight, plain, moment, held)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAlternatingLeastSquares:
    def test_the_error_never_rises(self, shape: MPOShape) -> None:
        weight = torch.randn(shape.out_features, shape.in_features)
        ins, outs = (torch.tensor(f).prod().item() for f in (shape.in_factors, shape.out_factors))
        padded = torch.zeros(ins, outs)
        padded[: shape.in_features, : shape.out_features] = weight.t()
        moment = padded_moment(moment_of(shape.in_features).float(), ins)
        cores = decompose(weight, shape).cores
        errors = []
        for _ in range(8):
            errors.append(output_error(padded.t(), reconstruct(cores), moment))
            cores = fit(cores, padded, moment, max_sweeps=1)
        assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
        assert errors[-1] < errors[0]

    def test_the_result_is_canonical_with_the_bonds_asked_for(self, shape: MPOShape) -> None:
        weight = torch.randn(shape.out_features, shape.in_features)
        fitted = decompose(weight, shape, second_moment=moment_of(shape.in_features))
        assert fitted.shape == shape and fitted.cores[0].dtype == weight.dtype
        for k, core in enumerate(fitted.cores):
            d, i, j, r = core.shape
            if k < shape.central:
                q = core.reshape(d * i * j, r)
            elif k > shape.central:
                q = core.reshape(d, i * j * r).t()
            else:
                continue
            torch.testing.assert_close(q.t() @ q, torch.eye(q.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [MPOShape.low_rank(12, 20, 3), *SHAPES[:1]], ids=str)
class TestSecondMoments:
    def test_a_diagonal_one_may_be_a_vector(self, shape: MPOShape) -> None:
        weight, counts = torch.randn(20, 12), torch.rand(12) + 0.1
        both = [decompose(weight, shape, second_moment=s).cores for s in (counts, counts.diag())]
        torch.testing.assert_close(*map(reconstruct, both), rtol=1e-4, atol=1e-5)

    def test_the_scale_does_not_matter(self, shape: MPOShape) -> None:
        weight, moment = torch.randn(20, 12).double(), moment_of(12)
        one, other = (decompose(weight, shape, second_moment=s) for s in (moment, 1e9 * moment))
        assert one.output_error == pytest.approx(other.output_error, rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_weights(self, shape: MPOShape, dtype: torch.dtype) -> None:
        weight = torch.randn(20, 12).to(dtype)
        moment = moment_of(12)
        fitted = decompose(weight, shape, second_moment=moment)
        assert all(core.dtype == dtype for core in fitted.cores)
        exact = decompose(weight.double(), shape, second_moment=moment)
        assert fitted.output_error == pytest.approx(exact.output_error, rel=1e-2)

    @pytest.mark.parametrize("scale", [1e38, 1e-37])
    def test_of_any_range(self, shape: MPOShape, scale: float) -> None:
        weight, moment = torch.randn(20, 12), moment_of(12)
        moment = moment / moment.diagonal().max()
        exact = decompose(weight, shape, second_moment=moment)
        found = decompose(weight, shape, second_moment=(scale * moment).float())
        assert found.output_error == pytest.approx(exact.output_error, rel=1e-3)

    def test_of_fewer_rows_than_features(self, shape: MPOShape) -> None:
        """Nothing is known of most directions: there the weight stays near what it was."""
        weight, x = torch.randn(20, 12), torch.randn(4, 12)
        moment = x.t() @ x
        fitted, plain = decompose(weight, shape, second_moment=moment), decompose(weight, shape)
        assert fitted.output_error < 0.8 * output_error(weight, reconstruct(plain.cores), moment)
        assert fitted.rel_error < 1.2

    def test_refusals(self, shape: MPOShape) -> None:
        weight, eye = torch.randn(20, 12), torch.eye(12)
        for bad, message in [
            (torch.eye(11), r"second moment \[12, 12\], or \[12\] .*got \[11, 11\]"),
            (torch.zeros(12), "inputs that are not all zero"),
            (-eye, "inputs that are not all zero"),
            (eye * torch.nan, "finite second moment"),
            (torch.randn(12, 12).abs() + eye, "symmetric second moment"),
            (eye - 0.5 * torch.ones(12, 12), "positive semidefinite"),
        ]:
            with pytest.raises(ValueError, match=message):
                decompose(weight, shape, second_moment=bad)
        with pytest.raises(TypeError, match="floating-point second moment"):
            decompose(weight, shape, second_moment=torch.ones(12, dtype=torch.int64))


def test_a_zero_weight() -> None:
    fitted = decompose(
        torch.zeros(20, 12), MPOShape((3, 4), (4, 5), 2), second_moment=torch.eye(12)
    )
    assert fitted.output_error == 0 and not reconstruct(fitted.cores).any()
