import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpo_kernels import MPOShape, decompose, mpo_embedding, mpo_linear
from mpo_kernels.cores.factorize import PAPER_FACTORS, balanced_factors

PAPER_BONDS = {
    (30000, 128): (10, 200, 480, 12),
    (30522, 768): (16, 512, 576, 12),
    (768, 3072): (12, 192, 384, 16),
    (768, 768): (12, 192, 192, 12),
}


@pytest.mark.parametrize("sizes", PAPER_BONDS)
def test_the_papers_shapes_have_the_papers_bonds(sizes):
    shape = MPOShape.balanced(*sizes)
    assert (shape.in_factors, shape.out_factors) == PAPER_FACTORS[sizes]
    assert shape.ranks == shape.full_ranks == PAPER_BONDS[sizes]
    assert shape.central == 2


def test_the_papers_compression_at_full_rank():
    assert MPOShape.balanced(768, 3072).compression == pytest.approx(1.078, abs=5e-4)
    assert MPOShape.balanced(768, 768).compression == pytest.approx(1.125, abs=5e-4)


@given(st.integers(1, 60000), st.integers(1, 7))
def test_balanced_factors_pad_by_at_most_a_twentieth(dimension, num_cores):
    factors = balanced_factors(dimension, num_cores)
    assert len(factors) == num_cores
    assert dimension <= math.prod(factors) <= dimension * 1.05


@pytest.mark.parametrize("prime", [2, 7, 101, 5087, 30521, 50257])
def test_primes_are_padded_to_even_factors(prime):
    shape = MPOShape.balanced(prime, 768)
    assert shape.in_features == prime
    assert max(shape.in_factors) <= max(prime if prime < 8 else 0, 3 * prime ** (1 / 5))


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 6), st.none() | st.integers(1, 99)
)
def test_json_round_trip_equality_and_hash(ins, outs, num_cores, ranks):
    shape = MPOShape.balanced(ins, outs, num_cores, ranks)
    again = MPOShape.from_dict(json.loads(json.dumps(shape.to_dict())))
    assert again == shape and hash(again) == hash(shape)
    assert shape.transpose().transpose() == shape
    assert shape.num_parameters == sum(math.prod(core) for core in shape.core_shapes)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 6), st.integers(2, 16))
def test_factors_for_devices_divide_and_are_never_padded(ins, outs, num_cores, devices):
    shape = MPOShape.balanced(devices * ins, devices * outs, num_cores, tensor_parallel=devices)
    assert shape.in_factors[0] % devices == shape.out_factors[0] % devices == 0
    assert math.prod(shape.in_factors) == devices * ins
    assert math.prod(shape.out_factors) == devices * outs
    assert shape.splits(devices)


@pytest.mark.parametrize("sizes", [(30, 64), (64, 30)])
def test_devices_that_do_not_divide_a_size_are_refused(sizes):
    with pytest.raises(ValueError, match="size that tensor_parallel = 8 divides, got 30"):
        MPOShape.balanced(*sizes, tensor_parallel=8)


def test_which_shapes_can_be_dealt_to_devices():
    assert MPOShape.low_rank(12, 20, 3).splits(4)
    assert not MPOShape.low_rank(12, 20, 3).splits(5)
    assert MPOShape((1, 4, 3), (8, 1, 2)).splits(4)
    assert not MPOShape((3, 4), (4, 3)).splits(2)
    assert not MPOShape((4, 3), (3, 4)).splits(2)
    # Eight of ten rows are true: a half would be four, which is no whole digit.
    assert not MPOShape((2, 5), (2, 5), in_features=8, out_features=8).splits(2)
    assert MPOShape((2, 5), (2, 5), in_features=8, out_features=8).splits(1)


def test_low_rank_and_skewed_are_members_of_the_family():
    assert MPOShape.low_rank(30, 20, 4).core_shapes == ((1, 1, 20, 4), (4, 30, 1, 1))
    skewed = MPOShape.skewed(30, 21, 3, 4, 5)
    assert (skewed.in_factors, skewed.out_factors) == ((3, 10), (4, 6))
    assert (skewed.out_features, skewed.ranks) == (21, (5,))


def test_the_centre_does_not_move_when_bonds_shrink():
    for ranks in (None, 40, 3, 1):
        assert MPOShape.balanced(768, 3072, 5, ranks).central == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (((2, 3), (4,)), {}, ValueError, "as many in_factors as out_factors"),
        (((), ()), {}, ValueError, "at least one"),
        (((2, 0), (4, 1)), {}, ValueError, "at least 1"),
        (((2, 2.5), (4, 1)), {}, TypeError, "integers"),
        ((5, (4, 1)), {}, TypeError, "sequence of integers"),
        (((2, 3), (4, 5), 0), {}, ValueError, "at least 1"),
        (((2, 3), (4, 5), (9,)), {}, ValueError, r"full \(8,\), got \(9,\)"),
        (((2, 3), (4, 5), (2, 2)), {}, ValueError, "expected 1 ranks"),
        (((2, 3), (4, 5)), {"in_features": 7}, ValueError, "multiply up to 6"),
        (((2, 3), (4, 5)), {"out_features": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_shapes_say_what_was_expected(arguments, options, error, says):
    with pytest.raises(error, match=says):
        MPOShape(*arguments, **options)


def test_from_dict_refuses_other_keys():
    with pytest.raises(ValueError, match="expected an MPO shape"):
        MPOShape.from_dict({"in_factors": [2], "out_factors": [2]})


@pytest.mark.parametrize("sizes", [(384, 1536), (1536, 384), (30, 6), (1009, 24), (97, 101)])
@pytest.mark.parametrize("is_table", [False, True])
def test_a_share_chooses_the_nearest_exact_factors(sizes, is_table):
    ins, outs = sizes
    for share in (0.2, 0.05, 0.01):
        shape = MPOShape.light(ins, outs, share, is_table=is_table)
        (digits,) = shape.ranks
        # The centre is the core that frees itself of the digits, and is no smaller than W.
        assert shape.ranks == shape.full_ranks and shape.central == 1 - is_table
        assert math.prod(shape.core_shapes[1 - shape.central]) == digits**2
        assert math.prod(shape.core_shapes[shape.central]) >= ins * outs
        factored, features = (shape.out_factors, outs) if is_table else (shape.in_factors, ins)
        assert features <= math.prod(factored) <= 1.05 * features

        def far(d, entries=share * ins * outs):
            return abs(math.log(d * d / entries))

        divisors = [d for d in range(2, features + 1) if features % d == 0 and d * d < ins * outs]
        assert far(digits) <= min(map(far, divisors), default=math.inf)


@pytest.mark.parametrize(("ins", "outs", "share"), [(30, 6, 0.1), (101, 24, 0.02), (7, 3, 0.5)])
@pytest.mark.parametrize("is_table", [False, True])
def test_a_share_is_exact(ins, outs, share, is_table):
    weight = torch.randn(outs, ins, dtype=torch.float64)
    shape = MPOShape.light(ins, outs, share, is_table=is_table)
    cores = decompose(weight, shape).cores
    ids, x = torch.randint(ins, (9,)), torch.randn(5, ins, dtype=torch.float64)
    sizes = {"num_embeddings": ins, "embedding_dim": outs}
    torch.testing.assert_close(mpo_embedding(ids, cores, **sizes), weight.t()[ids])
    y = mpo_linear(x, cores, in_features=ins, out_features=outs)
    torch.testing.assert_close(y, x @ weight.t())


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="expected 0 < share < 1"):
        MPOShape.light(8, 8, share)


def test_a_share_for_several_devices():
    shape = MPOShape.light(384, 1536, 0.01, tensor_parallel=8)
    assert shape.splits(8) and shape.in_factors == (64, 6)
    with pytest.raises(ValueError, match="tensor_parallel = 5 divides"):
        MPOShape.light(384, 1536, 0.01, tensor_parallel=5)
