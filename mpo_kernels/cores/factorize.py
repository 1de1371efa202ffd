"""Choosing factors: the paper's tables, and a balanced choice for any other dimension."""

from __future__ import annotations

import math
from functools import cache

# Liu et al., ACL 2021 (MPOP), appendix: {(in, out): (in_factors, out_factors)} for five cores.
PAPER_FACTORS: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (1024, 1024): ((4, 4, 4, 4, 4), (4, 4, 4, 4, 4)),
    (1024, 4096): ((4, 4, 4, 4, 4), (4, 4, 8, 8, 4)),
    (4096, 1024): ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4)),
    (30000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2)),
    (30522, 768): ((4, 8, 20, 12, 4), (4, 4, 4, 4, 3)),
}

# Padding is worth at most this much of a dimension, and is searched over at most this many sizes.
_MAX_PADDING = 0.05
_MAX_PADDED_SIZES = 256


def _prime_factors(n: int) -> list[int]:
    primes, p = [], 2
    while p * p <= n:
        while n % p == 0:
            primes.append(p)
            n //= p
        p += 1
    return [*primes, n] if n > 1 else primes


def _partition(n: int, parts: int, first: int = 1) -> list[int]:
    """Spread the primes of ``n`` over ``parts`` factors, the largest prime to the smallest.

    The first factor is a multiple of ``first``, which divides ``n``.
    """
    factors = [first] + [1] * (parts - 1)
    for p in reversed(_prime_factors(n // first)):
        factors[factors.index(min(factors))] *= p
    return factors


def _largest_inside(factors: list[int]) -> tuple[int, ...]:
    """Smallest factors at the two ends, so that the middle core is the largest."""
    ordered = sorted(factors)
    return tuple(ordered[::2] + ordered[1::2][::-1])


@cache
def balanced_factors(dimension: int, num_cores: int) -> tuple[int, ...]:
    """Factors of ``dimension``, or of the nearest larger size that splits evenly.

    Args:
        dimension: size to factor, at least 1.
        num_cores: number of factors, at least 1.

    Returns:
        ``num_cores`` factors, the largest in the middle. Their product is ``dimension`` or, where
        that has a large prime factor, at most about 5 % more (the rest is zero padding).
    """
    even = dimension ** (1 / num_cores)
    sizes = range(dimension, dimension + min(int(dimension * _MAX_PADDING), _MAX_PADDED_SIZES) + 1)

    def cost(size: int) -> float:
        # Any padding is worth 1 %, a largest factor twice the even one 2.8 %.
        uneven = 0.04 * math.log(max(_partition(size, num_cores)) / even)
        return math.log(size) + uneven + 0.01 * (size > dimension)

    return _largest_inside(_partition(min(sizes, key=cost), num_cores))


def split_factors(dimension: int, num_cores: int, tensor_parallel: int) -> tuple[int, ...]:
    """Factors of ``dimension``, never padded, the first a multiple of ``tensor_parallel``.

    Raises:
        ValueError: a dimension that ``tensor_parallel`` does not divide.
    """
    if dimension % tensor_parallel:
        raise ValueError(
            f"expected a size that tensor_parallel = {tensor_parallel} divides, got {dimension}"
        )
    first, *rest = _partition(dimension, num_cores, tensor_parallel)
    return (first, *_largest_inside(rest))


def paper_factors(
    in_features: int, out_features: int, num_cores: int = 5, tensor_parallel: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """In and out factors of the paper's kind: its own table where it has one, else balanced.

    With ``tensor_parallel`` above 1 those of :func:`split_factors`.
    """
    if tensor_parallel > 1:
        ins, outs = (
            split_factors(features, num_cores, tensor_parallel)
            for features in (in_features, out_features)
        )
        return ins, (outs[0], *outs[:0:-1])
    if num_cores == 5 and (in_features, out_features) in PAPER_FACTORS:
        return PAPER_FACTORS[in_features, out_features]
    # One side is mirrored so that i_k * j_k is even along the chain.
    return (
        balanced_factors(in_features, num_cores),
        balanced_factors(out_features, num_cores)[::-1],
    )


def end_factors(
    features: int, others: int, share: float, tensor_parallel: int = 1
) -> tuple[int, int]:
    """``(d, rest)``: a factor of ``features`` whose d × d entries are about a share of the whole.

    See :meth:`mpo_kernels.MPOShape.light`; ``d · rest`` is ``features``, or at most 5 % more.

    Args:
        features, others: of the side that is factored, and of the other one.
        share: of ``features · others``.
        tensor_parallel: divides d, and nothing is padded then.

    Raises:
        ValueError: sizes that ``tensor_parallel`` does not divide.
    """
    if features % tensor_parallel or others % tensor_parallel:
        raise ValueError(
            f"expected sizes that tensor_parallel = {tensor_parallel} divides, "
            f"got {features} and {others}"
        )
    entries = features * others

    def allowed(digits: int, rest: int) -> bool:
        if tensor_parallel > 1 and (digits * rest > features or digits % tensor_parallel):
            return False
        return digits * rest <= (1 + _MAX_PADDING) * features and digits * digits < entries

    def cost(pair: tuple[int, int]) -> float:
        digits, rest = pair
        return abs(math.log(digits * digits / (share * entries))) + (digits * rest > features)

    # Of each rest the smallest d that covers the features.
    pairs = ((-(-features // rest), rest) for rest in range(1, features // 2 + 1))
    return min(filter(lambda pair: allowed(*pair), pairs), key=cost, default=(1, features))
