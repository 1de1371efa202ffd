"""Few rows as thin products, a launch a core: sizes, strides, tiles and predicted time.

Nothing here needs a device or the extension. In the order of contraction (from the left or from the
right) step t consumes the digit i_t of x and the bond before it, and makes the digit j_t of y and
the next bond:

    out [row, done, to come; j, next] = Σ_{i, bond} core [j, next; i, bond] · state [.. ; i, bond]

A core is read as ``[m, k]`` with k minor, that is with its consumed bond as its minor index and i
beside it, which :func:`laid_out` makes. States are laid out so as well, whatever the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple, TypeAlias

from torch import Tensor

from mpo_kernels.planning.figures import DeviceFigures
from mpo_kernels.planning.plan import CoreShape

MAX_PARTS = 3
MAX_ROWS = 16
WARPS = 8  # of a block
GROUP = 32  # k of a warp's step
GRID = 65535  # blocks of a launch in all but its first direction

# Sizes and strides [D_in, i, j, D_out] of a core.
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

# Assumed of a launch on Hopper, by published latencies: the release of the one before, its result
# from the second-level cache, sums over warps, and the store.
LAUNCH_SECONDS = 0.9e-6 + 0.7e-6 + 0.5e-6 + 0.5e-6
# Of the sum over shares of k, a launch of its own: the same without sums over warps.
SUM_SECONDS = LAUNCH_SECONDS - 0.5e-6
# Of one more round of blocks on a multiprocessor, which holds two.
ROUND_SECONDS = 1.2e-6
# Of one more step along k: its loads, from memory.
STEP_SECONDS = 0.9e-6
# A multiprocessor reads cores while it waits for x: so much of the shorter of both is hidden.
HIDDEN = 0.7
# A read alone, and one from the second-level cache, beside a copy's rate.
READ_TIMES, CACHE_TIMES = 1.3, 1.8
# A multiprocessor's share of the second-level cache's rate, at most.
UNIT_SHARE = 1 / 70
# Read one element at a time where sizes, strides or addresses are no multiples of a vector.
SCALAR_TIMES = 8.0
# No limit: past every position in a row, and a multiple of a vector.
UNLIMITED = 2**31 - 16


class Product(NamedTuple):
    """``out [c, m] = Σ_k weight [m, k] · state [c, k]``; see ``mpo::Product`` in csrc/thin.hpp."""

    m: int
    k: int
    columns: int
    c1: int
    c2: int
    m_minor: int
    weight_major: int
    weight_minor: int
    state_c0: int
    state_c1: int
    state_c2: int
    state_k: int
    out_c0: int
    out_c1: int
    out_c2: int
    out_major: int
    out_minor: int
    state_limit: int
    out_limit: int
    state_share: int = 0
    out_share: int = 0
    shares: int = 0
    splits: int = 1
    groups: int = 2
    column_tiles: int = 1
    warps_k: int = 1
    steps: int = 1

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Tiles of m, of columns and of k."""
        m_tile, c_tile = 16 * WARPS // self.warps_k, 8 * self.column_tiles
        return -(-self.m // m_tile), -(-self.columns // c_tile), self.splits


@dataclass(frozen=True, eq=False)
class Chain:
    """The products in the order of contraction, and the workspace between them.

    Attributes:
        from_left: which core is contracted first.
        offsets: bytes into the workspace of what each product makes; of the last, its shares.
        workspace: bytes.
        seconds: predicted, captured in a graph.
    """

    products: tuple[Product, ...]
    from_left: bool
    out_features: int
    offsets: tuple[int, ...]
    workspace: int
    seconds: float

    def __str__(self) -> str:
        launches = []
        for p in self.products:
            m, c, k = p.blocks
            launches.append(f"[{p.m}, {p.k}] × {p.columns} in {m} × {c} × {k} blocks")
        return ", then ".join(launches)


def laid_out(core: Tensor, from_left: bool) -> Tensor:
    """The core ``[D, i, j, D']`` as the products of that order read it; a view of a copy."""
    order, back = ((2, 3, 1, 0), (3, 2, 0, 1)) if from_left else ((2, 0, 1, 3), (1, 2, 0, 3))
    return core.permute(order).contiguous().permute(back)


def laid_out_strides(shape: CoreShape, from_left: bool) -> tuple[int, ...]:
    """Those of :func:`laid_out`."""
    d, i, _, r = shape
    return (1, d, r * i * d, i * d) if from_left else (i * r, r, d * i * r, 1)


@lru_cache(maxsize=4096)
def chain_of(
    layouts: tuple[Layout, ...],
    rows: int,
    features: tuple[int, int],
    from_left: bool,
    itemsize: int,
    multiprocessors: int,
    figures: DeviceFigures,
) -> Chain | None:
    """The fastest tiles for a problem; None where the kernels do not read cores that lie so.

    Args:
        layouts: of each core; there are kernels for two or three.
        rows: a few.
        features: true in and out.
        from_left: which core is contracted first.
        itemsize: bytes of a core's element, 2 or 1.
        multiprocessors, figures: of the device.
    """
    if not 2 <= len(layouts) <= MAX_PARTS:
        return None
    bare = _products(layouts, rows, features, from_left)
    if bare is None:
        return None
    made: list[Product] = []
    offsets, workspace, seconds, shares = [], 0, 0.0, 0
    for t, p in enumerate(bare):
        last = t == len(bare) - 1
        p = p._replace(shares=shares, state_share=made[-1].out_share if shares else 0)
        # Elements of what it makes.
        size = p.out_c0 * rows
        tiles = (
            _tiled(p, groups, column_tiles, *walk)._replace(out_share=size)
            for groups, column_tiles, *walk in _TILES
            if not shares or column_tiles == 1
        )
        priced = [
            (_seconds(tile, last, itemsize, multiprocessors, figures), tile)
            for tile in tiles
            if max(-(-tile.columns // 8), tile.splits) <= GRID
        ]
        if not priced:
            return None
        each, best = min(priced)
        shares = best.splits if best.splits > 1 else 0
        if not shares:
            best = best._replace(out_share=0)
        made.append(best)
        seconds += each
        offsets.append(workspace)
        if shares or not last:
            workspace += -(-size * (4 * shares or 2) // 16) * 16
    return Chain(tuple(made), from_left, features[1], tuple(offsets), workspace, seconds)


def laid_out_chain(
    shapes: Sequence[CoreShape],
    rows: int,
    features: tuple[int, int],
    itemsize: int,
    multiprocessors: int,
    figures: DeviceFigures,
) -> Chain | None:
    """The faster of both orders for cores that are laid out for it, as :func:`chain_of`."""
    chains = [
        chain_of(
            tuple((shape, laid_out_strides(shape, from_left)) for shape in shapes),
            *(rows, features, from_left, itemsize, multiprocessors, figures),
        )
        for from_left in (True, False)
    ]
    return min((c for c in chains if c), key=lambda c: c.seconds, default=None)


# Groups of 32 k of a warp, column tiles of eight, warps side by side along k, steps along k.
_TILES = [
    (*tile, *walk)
    for tile, *walk in product(((2, 1), (4, 1), (2, 4)), (1, 2, 4, 8), (1, 2, 4, 8, 16))
]


def _tiled(p: Product, groups: int, column_tiles: int, warps_k: int, steps: int) -> Product:
    splits = -(-p.k // (GROUP * groups * warps_k * steps))
    return p._replace(
        splits=splits, groups=groups, column_tiles=column_tiles, warps_k=warps_k, steps=steps
    )


def _seconds(
    p: Product, last: bool, itemsize: int, multiprocessors: int, figures: DeviceFigures
) -> float:
    of_m, of_c, of_k = p.blocks
    blocks = of_m * of_c * of_k
    weight, state = p.m * p.k * itemsize, p.columns * p.k * (4 * p.shares or 2)
    out = p.columns * p.m * (4 * of_k if of_k > 1 else 2)
    cached = weight * of_c + state * of_m + out
    cache = CACHE_TIMES * figures.bytes_per_second
    moved = max(
        weight / (READ_TIMES * figures.bytes_per_second),
        cached / cache,
        -(-blocks // multiprocessors) * cached / blocks / (UNIT_SHARE * cache),
    )
    if p.k % 8 or p.state_k != 1 or p.state_limit % 8:
        moved *= SCALAR_TIMES
    rounds = -(-blocks // (2 * multiprocessors)) - 1
    seconds = LAUNCH_SECONDS + moved - HIDDEN * min(LAUNCH_SECONDS, moved)
    seconds += rounds * ROUND_SECONDS + (p.steps - 1) * STEP_SECONDS
    if of_k > 1:
        # The shares are read by a launch of their own, or by all blocks of the next product.
        seconds += out / cache + SUM_SECONDS if last else 8 * out / cache
    return seconds


def _products(
    layouts: Sequence[Layout], rows: int, features: tuple[int, int], from_left: bool
) -> list[Product] | None:
    """One for each core, in order, without tiles; None where one does not lie as it is read."""
    # Of sizes and strides: the bond that is consumed, i, j, the bond that is made.
    steps = [
        [(d, i, j, r) if from_left else (r, i, j, d) for d, i, j, r in layout]
        for layout in (layouts if from_left else reversed(layouts))
    ]
    ins = [sizes[1] for sizes, _ in steps]
    made: list[Product] = []
    done = 1  # digits of y
    for t, ((bond, i, j, next_bond), (of_bond, of_i, of_j, of_next)) in enumerate(steps):
        of_j, of_next = of_j * (j > 1), of_next * (next_bond > 1)
        if (bond > 1 and of_bond != 1) or (i > 1 and of_i != bond):
            return None
        if of_j * (j - 1) + of_next * (next_bond - 1) + bond * i >= UNLIMITED:
            return None
        following, later = (*ins[t + 1 :], 1, 1)[:2]
        # A state is [row, done, later, following, k], k up to whole vectors; x is [row, digits].
        depth = _whole(bond * i)
        c1, state = done, (done * following * depth, following * depth, depth, 1)
        if t == 0:
            c1, of_left = later, (following * later, 1, later)
            of_k, of_later, of_following = of_left if from_left else (1, i * following, i)
            state = (features[0], of_later, of_following, of_k)
        if t < len(steps) - 1:
            unit = later * _whole(following * next_bond)
            of_done, of_made = (j * unit, unit) if from_left else (unit, done * unit)
            of_c1 = unit // later if t == 0 else of_done
            out = (done * j * unit, of_c1, next_bond, of_made, 1)
        else:
            out = (features[1], *((j, 0, 1) if from_left else (1, 0, done)), 0)
        if max(rows * out[0], rows * c1 * following, j * next_bond) >= UNLIMITED:
            return None
        made.append(
            Product(
                m=j * next_bond,
                k=bond * i,
                columns=rows * c1 * following,
                c1=c1,
                c2=following,
                m_minor=next_bond,
                weight_major=of_j,
                weight_minor=of_next,
                state_c0=state[0],
                state_c1=state[1],
                state_c2=state[2],
                state_k=state[3],
                out_c0=out[0],
                out_c1=out[1],
                out_c2=out[2],
                out_major=out[3],
                out_minor=out[4],
                state_limit=features[0] if t == 0 else UNLIMITED,
                out_limit=features[1] if t == len(steps) - 1 else UNLIMITED,
            )
        )
        done *= j
    return made


def _whole(depth: int) -> int:
    return -(-depth // 8) * 8
