import math
import re
import warnings

import pytest
import torch

from mpo_kernels import MPOShape, decompose, reconstruct, round_cores
from mpo_kernels.testing import ODD_SHAPES, random_cores, relative_error


def restored(decomposition):
    shape = decomposition.shape
    return reconstruct(
        decomposition.cores, in_features=shape.in_features, out_features=shape.out_features
    )


def einsum_dense(cores):
    """An independent reconstruction: one einsum over all cores, in fp64."""
    n = len(cores)
    letters = [chr(97 + k) for k in range(3 * n + 1)]
    bonds, ins, outs = letters[: n + 1], letters[n + 1 : 2 * n + 1], letters[2 * n + 1 :]
    terms = ",".join(bonds[k] + ins[k] + outs[k] + bonds[k + 1] for k in range(n))
    equation = f"{terms}->{''.join(outs)}{''.join(ins)}"
    whole = torch.einsum(equation, *[core.double() for core in cores])
    return whole.reshape(math.prod(c.shape[2] for c in cores), -1)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_reconstruct_agrees_with_one_einsum(shape):
    cores = random_cores(shape, torch.float64)
    got = reconstruct(cores, in_features=shape.in_features, out_features=shape.out_features)
    want = einsum_dense(cores)[: shape.out_features, : shape.in_features]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_full_rank_is_exact(shape, dtype):
    weight = torch.randn(shape.out_features, shape.in_features).to(dtype)
    got = decompose(weight, shape.with_ranks(None))
    assert all(core.dtype == dtype and core.is_contiguous() for core in got.cores)
    lost = {torch.float64: 1e-12, torch.float32: 3e-6}
    assert got.rel_error < lost.get(dtype, shape.num_cores * torch.finfo(dtype).eps)
    # Each SVD, and each rounding of a core to its dtype, costs a few units in the last place.
    assert (
        relative_error(restored(got), weight) < 4 * (shape.num_cores + 1) * torch.finfo(dtype).eps
    )


def test_the_centre_carries_the_norm_and_the_others_are_orthogonal():
    weight = torch.randn(30, 24, dtype=torch.float64)
    got = decompose(weight, MPOShape((2, 3, 4), (5, 3, 2), 6))
    left, centre, right = got.cores
    assert got.shape.central == 1
    eye = torch.eye(left.shape[3], dtype=torch.float64)
    torch.testing.assert_close(torch.tensordot(left, left, ([0, 1, 2], [0, 1, 2])), eye)
    eye = torch.eye(right.shape[0], dtype=torch.float64)
    torch.testing.assert_close(torch.tensordot(right, right, ([1, 2, 3], [1, 2, 3])), eye)
    assert torch.linalg.norm(centre) == pytest.approx(float(torch.linalg.norm(restored(got))))


def test_two_cores_are_the_truncated_svd_of_the_permuted_matrix():
    weight = torch.randn(12, 20, dtype=torch.float64)
    got = decompose(weight, MPOShape((4, 5), (3, 4)), max_rank=5)
    permuted = weight.t().reshape(4, 5, 3, 4).permute(0, 2, 1, 3).reshape(12, 20)
    values = torch.linalg.svdvals(permuted)
    torch.testing.assert_close(got.spectra[0], values)
    want = float(values[5:].norm() / values.norm())
    assert got.rel_error == pytest.approx(want, rel=1e-9)
    v = values**2 / (values**2).sum()
    assert got.entropies[0] == pytest.approx(float(-(v * v.log()).sum()))


def test_low_rank_is_plain_svd():
    weight = torch.randn(20, 31, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    got = decompose(weight, MPOShape.low_rank(31, 20, 6))
    assert got.rel_error == pytest.approx(float(values[6:].norm() / values.norm()), rel=1e-9)


@pytest.mark.parametrize("rel_error", [0.0, 0.03, 0.3, 0.8])
@pytest.mark.parametrize("num_cores", [2, 3, 5])
def test_rel_error_is_a_bound_split_over_the_bonds(rel_error, num_cores):
    weight = (
        torch.randn(64, 48, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(48.0)).double()
    )
    got = decompose(weight, MPOShape.balanced(48, 64, num_cores), rel_error=rel_error)
    true = relative_error(restored(got), weight)
    assert true <= max(rel_error, 1e-12)
    assert got.rel_error == pytest.approx(true, rel=1e-6, abs=1e-12)
    if rel_error >= 0.3:
        assert true > 0.3 * rel_error, "the bound is far from used"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [1e-5, 3e-3, 6e-3, 0.01, 0.2])
def test_a_bound_and_the_report_hold_for_the_cores_that_are_kept(dtype, bound):
    shape = MPOShape.balanced(60, 48)
    weight = (torch.randn(48, 60) @ torch.diag(torch.linspace(0.1, 1, 60) ** 4)).to(dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = decompose(weight, shape, rel_error=bound)
        rounded = round_cores(found.cores, rel_error=bound)
    of_cores = einsum_dense(found.cores)
    error = relative_error(of_cores, weight)
    assert found.rel_error == pytest.approx(error, rel=1e-3)
    again = relative_error(einsum_dense(rounded.cores), of_cores)
    assert rounded.rel_error == pytest.approx(again, rel=1e-3)
    over = [each > bound for each in (error, again)]
    said = f"{dtype} is too coarse for a relative error of {bound:g}"
    assert [said in str(w.message) for w in told] == [True] * sum(over)
    assert over == [bound < torch.finfo(dtype).eps / 2] * 2


@pytest.mark.parametrize("compression", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("num_cores", [2, 3, 5])
def test_compression_is_a_budget_and_is_used(compression, num_cores):
    weight = torch.randn(64, 48)
    got = decompose(weight, MPOShape.balanced(48, 64, num_cores), compression=compression)
    assert got.shape.compression <= compression
    assert got.shape.compression > 0.75 * compression
    assert relative_error(restored(got), weight) == pytest.approx(got.rel_error, rel=1e-3)


def test_more_parameters_never_fit_worse():
    weight = torch.randn(48, 64, dtype=torch.float64)
    shape = MPOShape.balanced(64, 48, 3)
    errors = [decompose(weight, shape, compression=c).rel_error for c in (0.1, 0.3, 0.6, 0.9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_rounding_trained_cores_matches_decomposing_what_they_stand_for(shape):
    """Truncating cores that are no longer canonical by slicing would fail this."""
    cores = random_cores(shape, torch.float64)
    dense = reconstruct(cores)
    padded = MPOShape(shape.in_factors, shape.out_factors)
    cap = max(1, max((1, *shape.ranks)) // 2)
    want = decompose(dense, padded, max_rank=cap)
    got = round_cores(cores, max_rank=cap)
    assert got.shape.ranks == tuple(
        min(a, b) for a, b in zip(want.shape.ranks, got.shape.ranks, strict=True)
    )
    assert relative_error(reconstruct(got.cores), dense) == pytest.approx(
        want.rel_error, rel=1e-6, abs=1e-12
    )


def test_rounding_leaves_its_input_and_bounds_its_error():
    shape = MPOShape.balanced(60, 84, 3)
    cores = random_cores(shape, torch.float64)
    before = [core.clone() for core in cores]
    got = round_cores(cores, rel_error=0.2)
    assert all(torch.equal(a, b) for a, b in zip(cores, before, strict=True))
    true = relative_error(reconstruct(got.cores), reconstruct(cores))
    assert 0.05 < true <= 0.2 and got.rel_error == pytest.approx(true, rel=1e-6)


def test_rounding_removes_bonds_above_the_full_rank():
    cores = [torch.randn(1, 2, 2, 9), torch.randn(9, 3, 3, 1)]
    got = round_cores(cores)
    assert got.shape.ranks == (4,)
    assert relative_error(reconstruct(got.cores), reconstruct(cores)) < 1e-5


@pytest.mark.parametrize("size", [(12, 20), (1, 20), (12, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["zero", "rank one", "random"])
def test_degenerate_matrices_work(size, kind):
    """λ^(−1/2), which the released code takes, is NaN on a zero or rank-deficient matrix."""
    weight = {
        "zero": torch.zeros(size),
        "rank one": torch.randn(size[0], 1) @ torch.randn(1, size[1]),
        "random": torch.randn(size),
    }[kind]
    got = decompose(weight, MPOShape.balanced(size[1], size[0], 3))
    assert all(torch.isfinite(core).all() for core in got.cores)
    torch.testing.assert_close(restored(got), weight, rtol=1e-4, atol=1e-5)
    assert all(math.isfinite(entropy) for entropy in got.entropies)
    tight = decompose(weight, MPOShape.balanced(size[1], size[0], 3), rel_error=1e-3)
    if kind == "zero":
        assert tight.shape.ranks == (1, 1) and tight.rel_error == 0


SHAPE = MPOShape((2, 3), (4, 5))


@pytest.mark.parametrize(
    ("weight", "options", "error", "says"),
    [
        (torch.zeros(20, 6, dtype=torch.int64), {}, TypeError, "floating-point"),
        ([[1.0]], {}, TypeError, "floating-point weight, got list"),
        (torch.zeros(6, 20), {}, ValueError, r"\[20, 6\], got \[6, 20\]"),
        (torch.full((20, 6), torch.nan), {}, ValueError, "NaN or Inf"),
        (torch.full((20, 6), torch.inf), {}, ValueError, "NaN or Inf"),
        (torch.ones(20, 6), {"max_rank": 0}, ValueError, "max_rank"),
        (torch.ones(20, 6), {"rel_error": 1.5}, ValueError, "rel_error"),
        (torch.ones(20, 6), {"compression": -1}, ValueError, "0 < compression <= 1"),
        (torch.ones(20, 6), {"compression": 50}, ValueError, "0 < compression <= 1"),
        (torch.ones(20, 6), {"compression": 0.01}, ValueError, "compression of at least 0.19"),
        (torch.ones(20, 6), {"compression": 0.5, "rel_error": 0.1}, ValueError, "got both"),
    ],
)
def test_bad_input_says_what_was_expected(weight, options, error, says):
    with pytest.raises(error, match=says):
        decompose(weight, SHAPE, **options)


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 48), (96, 48), (30, 77)])
def test_the_least_compression_that_is_told_is_enough(out_features, in_features):
    weight, shape = (
        torch.randn(out_features, in_features),
        MPOShape.balanced(in_features, out_features, 5),
    )
    with pytest.raises(ValueError, match="compression of at least") as error:
        decompose(weight, shape, compression=1e-6)
    least = float(re.search(r"at least ([\d.e-]+)", str(error.value))[1])
    assert decompose(weight, shape, compression=least).shape.ranks == (1, 1, 1, 1)
    assert least == pytest.approx(shape.with_ranks(1).compression, rel=1e-3)


def test_cores_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match="chain from 1 to 1"):
        reconstruct([torch.ones(1, 2, 2, 3), torch.ones(2, 2, 2, 1)])
    with pytest.raises(ValueError, match="at most the present"):
        round_cores([torch.ones(1, 2, 2, 2), torch.ones(2, 2, 2, 1)], ranks=(3,))
