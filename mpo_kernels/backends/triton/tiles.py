"""Tiles of the kernels as data: what a problem is, which tiles fit a device, and which is best.

Nothing here needs a device or triton. A tile is rejected where its accumulators would not fit the
registers or its operands the shared memory; those left are ordered by a model of their time, whose
first is the default. Measured choices (`tuning.py`) come before the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple


@dataclass(frozen=True)
class Limits:
    """A device as far as the choice of tiles needs it.

    Attributes:
        name: of the architecture.
        multiprocessors: programs that run side by side, at one a multiprocessor.
        shared_memory: bytes a program may use.
        accumulators: fp32 values a thread can hold without spilling, operands aside.
        matrix_rows: rows that its widest matrix instruction wants.
        macs_per_second: of 16-bit matrix instructions, all multiprocessors.
        fp32_macs_per_second: without them.
        cache_bytes_per_second: from the second-level cache, all multiprocessors.
        warp: threads of a warp.
        waits: whether each load of a step was measured to wait for the one before.
    """

    name: str
    multiprocessors: int
    shared_memory: int
    accumulators: int
    matrix_rows: int
    macs_per_second: float
    fp32_macs_per_second: float
    cache_bytes_per_second: float
    warp: int = 32
    waits: bool = False


# By the vendors' data sheets, but for what an H200 was measured to do; only ratios matter here.
LIMITS = {
    "sm_80": Limits("sm_80", 108, 163 << 10, 96, 16, 156e12, 9.7e12, 4e12),
    "sm_90": Limits("sm_90", 132, 227 << 10, 160, 64, 495e12, 30e12, 5.5e12, waits=True),
    "sm_100": Limits("sm_100", 148, 227 << 10, 119, 64, 1100e12, 37e12, 8e12),
    "gfx942": Limits("gfx942", 304, 64 << 10, 128, 16, 650e12, 80e12, 8e12, 64),
}


class Strides(NamedTuple):
    """Of two parts ``[in, out, rank]``, in elements: the chain's first and second, or L and R."""

    a_in: int
    a_out: int
    a_rank: int
    b_in: int
    b_out: int
    b_rank: int


class Chain(NamedTuple):
    """Parts ``first [first_in, first_out, rank]`` and ``second [second_in, second_out, rank]``.

    The first part holds the minor digit of the columns of x and y where `first_minor`, else the
    major one. `in_features` and `out_features` are the columns that are not padding. `exchanged`:
    in and out are those of the layer exchanged, so that parts are read transposed.
    """

    first_in: int
    first_out: int
    second_in: int
    second_out: int
    rank: int
    in_features: int
    out_features: int
    first_minor: bool
    exchanged: bool = False


class ChainTile(NamedTuple):
    """Rows, i_S, j_F, i_F, D and j_S of a program; `columns` blocks of j_S where s is complete.

    In the kernel of the gradient `splits` divides the rows, in the forward kernel (i_S, D).
    """

    block_b: int
    group_in: int
    group_out: int
    block_k: int
    block_d: int
    block_n: int
    columns: int
    splits: int
    num_warps: int
    num_stages: int


class TwoParts(NamedTuple):
    """Parts ``left [left_in, left_out, rank]`` and ``right [right_in, right_out, rank]``."""

    left_in: int
    left_out: int
    right_in: int
    right_out: int
    rank: int
    in_features: int
    out_features: int


class GatherTile(NamedTuple):
    """j of either part and D of a program; `block_b` ids in turn where gradients are summed."""

    block_b: int
    block_left: int
    block_right: int
    block_d: int
    num_warps: int
    num_stages: int


class ProductTile(NamedTuple):
    """Sizes of a program's block of m, n and k; `splits` share k out."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def power_of_two(n: int) -> int:
    """The smallest one that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _sizes(low: int, high: int, limit: int) -> list[int]:
    """Powers of two from `low` to `high`, none but `low` above the one that covers `limit`."""
    sizes = [low << k for k in range((high // low).bit_length())]
    return [size for size in sizes if size == low or size <= power_of_two(limit)]


# Of a thread, without what addresses take.
REGISTERS = 240


class Cost(NamedTuple):
    """What a tile needs, and the time the model gives it.

    `accumulators` are fp32 values of a program, `shared_memory` bytes, `seconds` of the whole call;
    `operands` are 16-bit values that each thread holds where products are too small for the widest
    matrix instruction, which reads them from shared memory.
    """

    accumulators: int
    shared_memory: int
    seconds: float
    operands: int = 0

    def fits(self, num_warps: int, limits: Limits, itemsize: int) -> bool:
        # Without matrix instructions the operands of fp32 products are in registers as well.
        share = 5 if itemsize == 4 else 1
        threads = num_warps * limits.warp
        return (
            share * self.accumulators <= limits.accumulators * threads
            and self.accumulators // threads + self.operands // 2 <= REGISTERS
            and self.shared_memory <= limits.shared_memory
        )


# Of a load that the next one waits for, from the second-level cache or beyond.
LATENCY = 0.7e-6


def _seconds(
    limits: Limits,
    itemsize: int,
    *,
    programs: int,
    steps: int,
    loads: int,
    products: list[tuple[int, int, int]],
    step_bytes: float,
    end_bytes: float,
    shared_memory: int,
) -> float:
    """Time of `programs` programs of `steps` steps, each of some products ``[m, k] × [k, n]``.

    `loads` are a step's, one after the other.
    """
    rate = limits.macs_per_second if itemsize == 2 else limits.fp32_macs_per_second
    compute = sum(
        m * n * k / (min(1, m / limits.matrix_rows) * n / (n + 16) * rate) for m, n, k in products
    )
    waves = ceil_div(programs, limits.multiprocessors)
    together = max(1, min(4, limits.shared_memory // max(shared_memory, 1)))
    # Loads, products and the barrier between, where no other program hides them; products of fp32
    # take as long as the loads.
    waits = loads if limits.waits and itemsize == 2 else 1
    latency = LATENCY * waits * ceil_div(programs, limits.multiprocessors * together)
    moved = (steps * step_bytes + end_bytes) / limits.cache_bytes_per_second
    each = max(steps * compute, moved) * limits.multiprocessors
    return waves * each + steps * latency


def _run_waste(run: int, itemsize: int) -> float:
    """Bytes moved for each one used where only `run` elements in a row are wanted."""
    return max(1.0, 32 / (run * itemsize))


def _copy_seconds(p: Chain, t: ChainTile, itemsize: int, limits: Limits, gradient: bool) -> float:
    """Time to copy the part that holds the minor digit, where a tile would read short runs of it.

    As cores and merged parts lie, that part is contiguous in its out digit; see `launch.readable`.
    """
    if p.first_minor:
        run, size = t.block_k if p.exchanged else t.group_out, p.first_in * p.first_out * p.rank
    else:
        run, size = t.group_in if p.exchanged else t.block_n, p.second_in * p.second_out * p.rank
        if gradient:
            return 0.0
    if run * itemsize >= 16:
        return 0.0
    return 2.5e-6 + 2 * size * itemsize / limits.cache_bytes_per_second


def _chain_cost(
    problem: Chain, tile: ChainTile, rows: int, itemsize: int, limits: Limits, gradient: bool
) -> Cost:
    p, t = problem, tile
    b_blocks = ceil_div(rows, t.block_b)
    k_loop = ceil_div(p.first_in, t.block_k)
    m_first, n_first = t.block_b * t.group_in, t.group_out * t.block_d
    m_second, k_second = t.block_b * t.group_out, t.group_in * t.block_d
    x_run = t.block_k if p.first_minor else t.group_in
    y_run = t.group_out if p.first_minor else t.block_n
    x_bytes = m_first * p.first_in * itemsize * _run_waste(min(x_run, p.first_in), itemsize)
    first_bytes = p.first_in * n_first * itemsize
    second_bytes = k_second * t.block_n * itemsize
    y_bytes = m_second * t.block_n * itemsize * _run_waste(y_run, itemsize)
    first = (m_first, n_first, k_loop * t.block_k)
    out_groups = ceil_div(p.first_out, t.group_out)
    n_blocks = ceil_div(p.second_out, t.block_n)
    in_blocks = ceil_div(p.second_in, t.group_in) * ceil_div(p.rank, t.block_d)
    s_bytes = m_second * k_second * itemsize
    tiles = (m_first * t.block_k + t.block_k * n_first) * itemsize
    if gradient:
        accumulators = t.block_n * k_second + m_first * n_first
        shared = t.num_stages * (tiles + m_second * t.block_n * itemsize) + s_bytes
        steps = ceil_div(b_blocks, t.splits) * out_groups
        seconds = _seconds(
            limits,
            itemsize,
            programs=in_blocks * n_blocks * t.splits,
            steps=steps,
            loads=k_loop + 1,
            products=[first, (t.block_n, k_second, m_second)],
            step_bytes=x_bytes + first_bytes + y_bytes,
            end_bytes=8 * t.block_n * k_second,
            shared_memory=shared,
        )
    else:
        accumulators = m_second * t.block_n + m_first * n_first
        shared = t.num_stages * (tiles + second_bytes) + s_bytes
        columns = t.columns if in_blocks == 1 else 1
        steps = max(ceil_div(in_blocks, t.splits), columns)
        share = (first[0], first[1], ceil_div(first[2], columns))
        seconds = _seconds(
            limits,
            itemsize,
            programs=b_blocks * out_groups * ceil_div(n_blocks, columns) * t.splits,
            steps=steps,
            loads=ceil_div(k_loop, columns) + 1,
            products=[share, (m_second, t.block_n, k_second)],
            step_bytes=(x_bytes + first_bytes) / columns + second_bytes,
            end_bytes=columns * y_bytes * (5 if t.splits > 1 else 1),
            shared_memory=shared,
        )
        # The sum over splits is a kernel of its own.
        seconds += 2e-6 * (t.splits > 1)
    seconds += _copy_seconds(p, t, itemsize, limits, gradient)
    operands = 0
    if itemsize == 2 and m_second < limits.matrix_rows:
        # Each warp has all of s, and the program one step of the first part.
        threads = t.num_warps * limits.warp
        operands = m_second * k_second // limits.warp + t.block_k * n_first // threads
    return Cost(accumulators, shared, seconds, operands)


def _chain_tiles(
    problem: Chain, rows: int, itemsize: int, limits: Limits, gradient: bool
) -> Iterator[ChainTile]:
    p = problem
    # Up to 16 rows or values of D are padding where nothing else fills a matrix instruction.
    b_sizes = _sizes(1, 128, max(16, rows))
    in_sizes, out_sizes = _sizes(1, 32, p.second_in), _sizes(1, 32, p.first_out)
    d_sizes = _sizes(16, 128, p.rank)
    if p.rank <= 8:
        d_sizes = [power_of_two(p.rank), *d_sizes]
    n_sizes, k_sizes = _sizes(16, 256, p.second_out), _sizes(16, 128, p.first_in)[-2:]
    for b, g_in, g_out, d in product(b_sizes, in_sizes, out_sizes, d_sizes):
        m_first, m_second, k_second = b * g_in, b * g_out, g_in * d
        # Matrix instructions want 16 in each direction that is summed over or tall.
        if m_first < 16 or m_second < 16 or k_second < 16 or g_out * d < 16:
            continue
        if max(m_first, m_second) > 256 or m_first * g_out * d > 2**15:
            continue
        for n, k in product(n_sizes, k_sizes):
            warps = 8 if max(m_second * n, m_first * g_out * d) >= 2**14 else 4
            stages = 2 if itemsize == 4 else 3
            if gradient:
                for splits in _sizes(1, 64, ceil_div(rows, b)):
                    yield ChainTile(b, g_in, g_out, k, d, n, 1, splits, warps, stages)
                continue
            in_blocks = ceil_div(p.second_in, g_in) * ceil_div(p.rank, d)
            if in_blocks == 1:
                for columns in _sizes(1, 4096, ceil_div(p.second_out, n)):
                    yield ChainTile(b, g_in, g_out, k, d, n, columns, 1, warps, stages)
            else:
                for splits in _sizes(1, 4096, in_blocks if rows <= 64 else 1):
                    yield ChainTile(b, g_in, g_out, k, d, n, 1, splits, warps, stages)


@lru_cache(maxsize=4096)
def chain_tiles(
    problem: Chain, rows: int, itemsize: int, limits: Limits, gradient: bool = False
) -> tuple[tuple[float, ChainTile], ...]:
    """(seconds, tile) of the tiles that fit, the fastest by the model first.

    Args:
        problem: the two parts; for a gradient, `second` is the one asked for.
        rows: a bucket, a power of two.
        itemsize: of an element, 2 or 4 bytes.
        limits: of the device.
        gradient: tiles of the gradient's kernel instead of the forward one.
    """
    priced = []
    for tile in _chain_tiles(problem, rows, itemsize, limits, gradient):
        cost = _chain_cost(problem, tile, rows, itemsize, limits, gradient)
        if cost.fits(tile.num_warps, limits, itemsize):
            priced.append((cost.seconds, tile))
    return tuple(sorted(priced)[:64])


@lru_cache(maxsize=4096)
def gather_tiles(
    problem: TwoParts, rows: int, itemsize: int, limits: Limits, gradient: bool = False
) -> tuple[tuple[float, GatherTile], ...]:
    """As :func:`chain_tiles`, for the rows of a table."""
    p, priced = problem, []
    # In the gradient's kernel either part is the one whose sums are held.
    lefts, rights, ranks = (_sizes(16, 64, n) for n in (p.left_out, p.right_out, p.rank))
    for left, right, d, b in product(lefts, rights, ranks, (1, 8, 32) if gradient else (1,)):
        tile = GatherTile(b, left, right, d, 4, 2)
        d_loop = ceil_div(p.rank, d)
        blocks = ceil_div(p.left_out, left) * ceil_div(p.right_out, right)
        operands = (left + right) * d * itemsize
        shared = 2 * operands + left * right * itemsize
        seconds = _seconds(
            limits,
            itemsize,
            programs=ceil_div(rows, b) * blocks,
            steps=d_loop * b,
            loads=1,
            products=[(left, right, d)],
            step_bytes=operands,
            end_bytes=left * right * itemsize,
            shared_memory=shared,
        )
        cost = Cost(left * right + (left + right) * d * gradient, shared, seconds)
        if cost.fits(tile.num_warps, limits, itemsize):
            priced.append((cost.seconds, tile))
    return tuple(sorted(priced))


def product_tile(
    m: int, n: int, k: int, itemsize: int, limits: Limits, most_splits: int = 1
) -> ProductTile:
    """The tile of a product: smaller, or k shared out, until all multiprocessors have work."""
    m_block, n_block = (min(128, max(16, power_of_two(size))) for size in (m, n))
    k_block = min(64 if itemsize == 2 else 16, max(16, power_of_two(k)))

    def programs() -> int:
        return ceil_div(m, m_block) * ceil_div(n, n_block)

    if m_block == 128 == n_block and programs() >= 4 * limits.multiprocessors and itemsize == 2:
        n_block = 256
    splits = 1
    if most_splits > 1:
        # A share has a few steps, so that its loads overlap.
        shares = min(ceil_div(k, 4 * k_block), limits.multiprocessors // programs())
        splits = max(1, min(most_splits, shares))
    while splits == 1 and programs() < limits.multiprocessors and max(m_block, n_block) > 32:
        if m_block >= n_block:
            m_block //= 2
        else:
            n_block //= 2
    warps = 8 if m_block * n_block >= 2**14 else 4
    return ProductTile(m_block, n_block, k_block, splits, warps, 3 if itemsize == 2 else 2)
