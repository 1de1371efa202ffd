"""The shape of a matrix product operator: factors, bonds, padding and counts. Pure integers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpo_kernels.cores.factorize import end_factors, paper_factors


def _positive_ints(name: str, values: Iterable[int]) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be integers, got {value!r} in {values}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {values}")
    return values


def _features(name: str, value: int | None, factors: tuple[int, ...]) -> int:
    product = math.prod(factors)
    if value is None:
        return product
    (value,) = _positive_ints(name, (value,))
    if value > product:
        raise ValueError(
            f"the factors {factors} multiply up to {product}, expected at least {name} = {value}"
        )
    return value


def leading_digit(factors: Sequence[int]) -> int:
    """Index of the first factor above 1: the most significant digit that says anything."""
    return next((k for k, factor in enumerate(factors) if factor > 1), 0)


@dataclass(frozen=True)
class MPOShape:
    """Factors and bonds of an MPO that stands for a matrix of ``in_features × out_features``.

    Core k (from 0) has shape ``[D_k, in_factors[k], out_factors[k], D_{k+1}]`` with
    ``D_0 = D_n = 1``; core 0 holds the most significant digit of a row or column number.

    Args:
        in_factors: factors of the input dimension, one a core.
        out_factors: factors of the output dimension, one a core.
        ranks: the n − 1 inner bonds. ``None``: full rank. An int: a cap on every bond. A sequence:
            exactly these bonds, each between 1 and the full rank.
        in_features: true input size where the factors' product is larger (zero padding).
        out_features: true output size, likewise.

    Raises:
        TypeError: a factor, bond or size that is not an integer.
        ValueError: sizes that do not fit each other, or bonds outside 1 … full rank.
    """

    in_factors: tuple[int, ...]
    out_factors: tuple[int, ...]
    ranks: tuple[int, ...]
    in_features: int
    out_features: int

    def __init__(
        self,
        in_factors: Iterable[int],
        out_factors: Iterable[int],
        ranks: int | Iterable[int] | None = None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        ins, outs = (
            _positive_ints("in_factors", in_factors),
            _positive_ints("out_factors", out_factors),
        )
        if len(ins) != len(outs) or not ins:
            raise ValueError(
                f"expected as many in_factors as out_factors, at least one, got {ins} and {outs}"
            )
        for name, value in (
            ("in_factors", ins),
            ("out_factors", outs),
            ("in_features", _features("in_features", in_features, ins)),
            ("out_features", _features("out_features", out_features, outs)),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "ranks", self._checked_ranks(ranks))

    def _checked_ranks(self, ranks: int | Iterable[int] | None) -> tuple[int, ...]:
        if ranks is None:
            return self.full_ranks
        if isinstance(ranks, int):
            (cap,) = _positive_ints("ranks", (ranks,))
            return tuple(min(cap, full) for full in self.full_ranks)
        ranks = _positive_ints("ranks", ranks)
        if len(ranks) != self.num_cores - 1:
            raise ValueError(
                f"expected {self.num_cores - 1} ranks for {self.num_cores} cores, got {ranks}"
            )
        if any(rank > full for rank, full in zip(ranks, self.full_ranks, strict=True)):
            raise ValueError(f"expected ranks of at most the full {self.full_ranks}, got {ranks}")
        return ranks

    @classmethod
    def balanced(
        cls,
        in_features: int,
        out_features: int,
        num_cores: int = 5,
        ranks: int | Iterable[int] | None = None,
        tensor_parallel: int = 1,
    ) -> MPOShape:
        """Factors as even as the sizes allow (the paper's own table where it has one).

        Above 1, ``tensor_parallel`` divides the first factors, and so must divide both sizes: the
        layer can be dealt to so many devices; see :meth:`splits`.
        """
        _positive_ints(
            "in_features, out_features, num_cores, tensor_parallel",
            (in_features, out_features, num_cores, tensor_parallel),
        )
        ins, outs = paper_factors(in_features, out_features, num_cores, tensor_parallel)
        return cls(ins, outs, ranks, in_features=in_features, out_features=out_features)

    @classmethod
    def low_rank(cls, in_features: int, out_features: int, rank: int) -> MPOShape:
        """Plain low rank: two cores, in ``(1, in_features)``, out ``(out_features, 1)``."""
        return cls((1, in_features), (out_features, 1), rank)

    @classmethod
    def skewed(
        cls, in_features: int, out_features: int, in_split: int, out_split: int, rank: int
    ) -> MPOShape:
        """Two cores, in ``(in_split, in_features / in_split)``, out likewise.

        A size that its split does not divide is padded up to the next multiple.
        """
        _positive_ints("in_split, out_split", (in_split, out_split))
        return cls(
            (in_split, -(-in_features // in_split)),
            (out_split, -(-out_features // out_split)),
            rank,
            in_features=in_features,
            out_features=out_features,
        )

    @classmethod
    def light(
        cls,
        in_features: int,
        out_features: int,
        share: float,
        *,
        is_table: bool = False,
        tensor_parallel: int = 1,
    ) -> MPOShape:
        """Two cores at full rank, of which the auxiliary one holds about a share of the matrix.

        The auxiliary core is a d × d matrix at one end, over the most significant digit of the
        input: in ``(d, in_features / d)``, out ``(1, out_features)``, bond d. The centre has as
        many entries as the matrix. Of the divisors of ``in_features`` with ``d ≥ 2`` and
        ``d² < in_features · out_features``, d is the one whose
        ``d² / (in_features · out_features)`` is nearest to ``share`` in ratio; up to 5 % of padding
        is allowed where that brings it nearer by a factor e. Where no d is left it is 1, and
        nothing but a scale is trained.

        No digit of the output is in the auxiliary core, so x W is x times it, then times the
        centre as it lies: no weight is formed, and nothing permuted but x.

        Args:
            in_features, out_features: of the matrix; rows and their length where it is a table.
            share: trained entries over those of the matrix, above 0 and below 1.
            is_table: an embedding's: the centre has the whole vocabulary and the auxiliary core the
                least significant digit of a row, in ``(in_features, 1)``, out
                ``(out_features / d, d)``: a row is picked, then multiplied.
            tensor_parallel: divides d, without padding; see :meth:`splits`.

        Raises:
            ValueError: a share out of range, or sizes that ``tensor_parallel`` does not divide.
        """
        sizes = {"in_features": in_features, "out_features": out_features}
        _positive_ints(
            "in_features, out_features, tensor_parallel", (*sizes.values(), tensor_parallel)
        )
        if not 0 < share < 1:
            raise ValueError(f"expected 0 < share < 1, got {share}")
        if is_table:
            minor, rest = end_factors(out_features, in_features, share)
            return cls((in_features, 1), (rest, minor), **sizes)
        major, rest = end_factors(in_features, out_features, share, tensor_parallel)
        return cls((major, rest), (1, out_features), **sizes)

    @property
    def num_cores(self) -> int:
        return len(self.in_factors)

    @cached_property
    def full_ranks(self) -> tuple[int, ...]:
        """The bonds of an exact decomposition, min(∏_{m≤k} i_m j_m, ∏_{m>k} i_m j_m)."""
        sizes = [i * j for i, j in zip(self.in_factors, self.out_factors, strict=True)]
        return tuple(
            min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, self.num_cores)
        )

    @property
    def is_low_rank(self) -> bool:
        """Whether it is plain low rank: one core has the whole input, the other all the output."""
        if self.num_cores != 2:
            return False
        (i_0, i_1), (j_0, j_1) = self.in_factors, self.out_factors
        return i_0 == j_1 == 1 or i_1 == j_0 == 1

    @cached_property
    def central(self) -> int:
        """Index of the central tensor: the core that is largest at full rank, whatever the ranks.

        Ties go to the core nearest the middle of the chain.
        """
        sizes = [math.prod(shape) for shape in self._core_shapes(self.full_ranks)]
        return max(range(self.num_cores), key=lambda k: (sizes[k], -abs(k - self.num_cores // 2)))

    def _core_shapes(self, ranks: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
        bonds = (1, *ranks, 1)
        return tuple(
            (bonds[k], self.in_factors[k], self.out_factors[k], bonds[k + 1])
            for k in range(self.num_cores)
        )

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape of each core, ``[D_k, i_k, j_k, D_{k+1}]``."""
        return self._core_shapes(self.ranks)

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.core_shapes)

    def splits(self, tensor_parallel: int) -> bool:
        """Whether so many devices can each hold an even share of the inputs, or of the outputs.

        A share is a range of the most significant digit, so one core is cut and the others are
        whole on every device.
        """
        return tensor_parallel == 1 or all(
            features % tensor_parallel == 0
            and features // tensor_parallel % math.prod(factors[leading_digit(factors) + 1 :]) == 0
            for factors, features in (
                (self.in_factors, self.in_features),
                (self.out_factors, self.out_features),
            )
        )

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def compression(self) -> float:
        """Parameters over those of the dense matrix; above 1 at full rank."""
        return self.num_parameters / self.dense_parameters

    def with_ranks(self, ranks: int | Iterable[int] | None) -> MPOShape:
        """The same factors with other bonds."""
        return MPOShape(
            self.in_factors,
            self.out_factors,
            ranks,
            in_features=self.in_features,
            out_features=self.out_features,
        )

    def transpose(self) -> MPOShape:
        """The shape of the transposed matrix: in and out swapped."""
        return MPOShape(
            self.out_factors,
            self.in_factors,
            self.ranks,
            in_features=self.out_features,
            out_features=self.in_features,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; see :meth:`from_dict`."""
        return {
            "in_factors": list(self.in_factors),
            "out_factors": list(self.out_factors),
            "ranks": list(self.ranks),
            "in_features": self.in_features,
            "out_features": self.out_features,
        }

    @classmethod
    def of_cores(
        cls, core_shapes: Iterable[Sequence[int]], in_features: int, out_features: int
    ) -> MPOShape:
        """The shape of a matrix of these sizes with cores ``[D_k, i_k, j_k, D_{k+1}]``."""
        _, ins, outs, bonds = zip(*core_shapes, strict=True)
        sizes = {"in_features": in_features, "out_features": out_features}
        return cls(ins, outs, bonds[:-1], **sizes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MPOShape:
        """The shape that :meth:`to_dict` described, checked anew."""
        expected = {"in_factors", "out_factors", "ranks", "in_features", "out_features"}
        if not isinstance(values, Mapping) or set(values) != expected:
            raise ValueError(f"expected an MPO shape with {sorted(expected)}, got {values!r}")
        return cls(**values)
