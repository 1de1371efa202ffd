"""The cases: layer sizes × factorisations × rows. Pure data, shared by every suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from mpo_kernels import MPOShape

# in_features × out_features; the first two show what a call costs the host.
SHAPES: dict[str, tuple[int, int]] = {
    "64x64": (64, 64),
    "384x384": (384, 384),
    "768x768": (768, 768),
    "768x3072": (768, 3072),
    "3072x768": (3072, 768),
    "4096x4096": (4096, 4096),
    "4096x11008": (4096, 11008),
    "4096x14336": (4096, 14336),
    "8192x28672": (8192, 28672),
}


def _paper(in_features: int, out_features: int) -> MPOShape:
    return MPOShape.balanced(in_features, out_features, 5)


def _paper_half(in_features: int, out_features: int) -> MPOShape:
    full = _paper(in_features, out_features)
    return full.with_ranks([max(1, rank // 2) for rank in full.full_ranks])


def _balanced(num_cores: int, rank: int) -> Callable[[int, int], MPOShape]:
    return lambda ins, outs: MPOShape.balanced(ins, outs, num_cores, rank)


def _skewed(rank: int) -> Callable[[int, int], MPOShape]:
    """In (16, I/16), out (J/16, 16): the cheapest two-core chain at these parameters."""
    return lambda ins, outs: MPOShape.skewed(ins, outs, 16, outs // 16, rank)


def _low_rank(rank: int) -> Callable[[int, int], MPOShape]:
    return lambda ins, outs: MPOShape.low_rank(ins, outs, rank)


def _times_smaller(
    make: Callable[[int], Callable[[int, int], MPOShape]], times: int
) -> Callable[[int, int], MPOShape]:
    """Dense parameters over those of two factors; bonds in eights, which are read in vectors."""

    def shape(ins: int, outs: int) -> MPOShape:
        rank = ins * outs / times / make(1)(ins, outs).num_parameters
        return make(max(8, round(rank / 8) * 8))(ins, outs)

    return shape


COMPRESSIONS = (16, 64, 4, 2)
# By name: a cap on the bonds to a factorisation into two.
TWO_FACTORS: dict[str, Callable[[int], Callable[[int, int], MPOShape]]] = {
    "lowrank": _low_rank,
    "skew": _skewed,
    "balanced": lambda rank: _balanced(2, rank),
}

FACTORISATIONS: dict[str, Callable[[int, int], MPOShape]] = {
    "n5-full": _paper,
    "n5-half": _paper_half,
    "n3-d64": _balanced(3, 64),
    "n2-d64": _balanced(2, 64),
    "n2-d32": _balanced(2, 32),
    "n2-d16": _balanced(2, 16),
    "n2-d8": _balanced(2, 8),
    "n2-d4": _balanced(2, 4),
    "skew-d64": _skewed(64),
    "skew-d16": _skewed(16),
    "lowrank-64": _low_rank(64),
    **{
        f"{kind}-{times}x": _times_smaller(make, times)
        for times in COMPRESSIONS
        for kind, make in TWO_FACTORS.items()
    },
}

ROWS = (1, 16, 256, 4096)
PASSES = ("forward", "forward+backward", "light")


@dataclass(frozen=True)
class Case:
    """One layer at one number of rows.

    Attributes:
        size: a key of :data:`SHAPES`.
        factorisation: a key of :data:`FACTORISATIONS`.
        rows: product of x's leading dimensions.
    """

    size: str
    factorisation: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.size}/{self.factorisation}/{self.rows}"

    @property
    def shape(self) -> MPOShape:
        return FACTORISATIONS[self.factorisation](*SHAPES[self.size])


# A case, and one of PASSES.
Point = tuple[Case, str]


@dataclass(frozen=True)
class Block:
    """The product of its lists."""

    sizes: Sequence[str]
    factorisations: Sequence[str]
    rows: Sequence[int] = ROWS
    passes: Sequence[str] = PASSES

    def points(self) -> list[Point]:
        cases = product(self.sizes, self.factorisations, self.rows)
        return [(Case(*case), name) for case in cases for name in self.passes]


_MAIN = ("n5-full", "n5-half", "n3-d64", "n2-d64", "n2-d16", "skew-d64", "skew-d16", "lowrank-64")

# What fits twenty minutes on two CPU cores; naming sizes, factorisations or rows gets any other.
STANDARD = (
    Block(("64x64", "384x384"), ("n2-d16",), (1,)),
    Block(("768x3072",), _MAIN, (1, 16, 256)),
    Block(("768x3072",), ("n5-full", "n2-d64", "skew-d16"), (4096,)),
    Block(("768x768", "3072x768"), ("n5-full", "n5-half", "n2-d64", "skew-d16"), (1, 16, 256)),
    Block(("768x768",), ("n5-full",), (4096,)),
    Block(("4096x4096",), ("n5-half", "n2-d32", "n2-d8", "n2-d4", "skew-d16", "lowrank-64"), (1,)),
    Block(("4096x4096",), ("n3-d64", "n2-d64", "n2-d16", "skew-d64"), (1, 16)),
    Block(("4096x4096",), ("n2-d64", "n2-d16", "skew-d64"), (256,)),
    Block(("4096x4096",), ("n2-d64",), (4096,), ("forward",)),
    Block(("4096x11008",), ("n2-d64", "skew-d16"), (1, 16)),
    Block(("4096x11008",), ("n2-d64",), (256,), ("forward",)),
)

QUICK = (Block(("64x64",), ("n2-d16",), (1,)), Block(("768x768",), ("n5-full", "n2-d64"), (1, 256)))

# What fits five minutes on a large GPU, in the order of what is asked first.
GPU_ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
GPU = (
    Block(("768x3072",), ("n5-full",), (4096, 16384), ("forward", "light")),
    Block(("4096x4096",), ("n2-d16", "skew-d64", "lowrank-64"), GPU_ROWS, ("forward",)),
    Block(("4096x4096",), ("n2-d64",), (1, 16, 256, 4096), ("forward",)),
    Block(("4096x4096",), ("skew-d64", "n2-d16"), (256, 4096), ("forward+backward",)),
    Block(("768x3072",), ("skew-d16", "n2-d64", "n3-d64"), (1, 16, 256, 4096), ("forward",)),
    Block(("768x3072",), ("skew-d16", "n2-d64"), (4096,), ("forward+backward",)),
    Block(
        ("4096x11008", "4096x14336", "8192x28672"),
        ("n2-d16", "skew-d16"),
        (1, 16, 4096),
        ("forward",),
    ),
    Block(("768x768", "3072x768"), ("n5-half", "n2-d16"), (16, 4096), PASSES),
)

# Few rows: every kind of two factors, what is asked first first.
DECODING = tuple(
    Block((size,), [f"{kind}-{times}x" for kind in TWO_FACTORS], (rows,), ("forward",))
    for rows in (1, 16, 2, 4, 8)
    for size in ("4096x4096", "4096x14336", "768x3072", "8192x28672")
    for times in COMPRESSIONS
)

# Compiling takes seconds a graph, and a graph a pass: it is measured at these alone.
COMPILED = {("64x64", "n2-d16"), *product(("768x3072",), ("n5-full", "n3-d64", "n2-d64"))}


def select(
    sizes: Iterable[str] = (),
    factorisations: Iterable[str] = (),
    rows: Iterable[int] = (),
    blocks: Iterable[Block] = STANDARD,
) -> list[Point]:
    """Cases and passes by name, from the whole product; those of ``blocks`` if nothing is named.

    Raises:
        ValueError: a name that is not in the registry.
    """
    sizes, factorisations, rows = tuple(sizes), tuple(factorisations), tuple(rows)
    for kind, names, known in (
        ("shapes", sizes, SHAPES),
        ("factorisations", factorisations, FACTORISATIONS),
    ):
        if unknown := set(names) - set(known):
            raise ValueError(f"expected {kind} of {list(known)}, got {sorted(unknown)}")
    if sizes or factorisations or rows:
        blocks = [Block(sizes or tuple(SHAPES), factorisations or _MAIN, rows or ROWS)]
    return [point for block in blocks for point in block.points()]
