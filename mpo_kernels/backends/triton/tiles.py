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
        renames: whether triton makes accumulators the operand of a next product by renaming
            registers; where not they take a way through memory.
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
    renames: bool = False


# By the vendors' data sheets, but for what an H200 was measured to do; only ratios matter here.
LIMITS = {
    "sm_80": Limits("sm_80", 108, 163 << 10, 96, 16, 156e12, 9.7e12, 4e12, renames=True),
    "sm_90": Limits(
        "sm_90", 132, 227 << 10, 160, 64, 495e12, 30e12, 5.5e12, waits=True, renames=True
    ),
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
    """Rows, i_S, j_F, i_F, D and j_S of a program; `splits` divides (i_S, D)."""

    block_b: int
    group_in: int
    group_out: int
    block_k: int
    block_d: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


class MatrixTile(NamedTuple):
    """Of ``matrix.py``: B_q of a program, j at a time, n; `splits` divide the walk over t.

    All of k is one block, and ``MATRIX_ROWS`` are of m.
    """

    matrices: int
    block_j: int
    block_n: int
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


# Up to here the kernel of ``chain.py`` gives y.
FEW_ROWS = 64
# m of a program of ``matrix.py``: rows of the widest matrix instruction, which four warps issue.
MATRIX_ROWS = 64

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


def _multiplying(limits: Limits, itemsize: int, *products: tuple[int, int, int]) -> float:
    """Time of a step's products ``[m, k] × [k, n]``, of a multiprocessor's share of the rate."""
    rate = limits.macs_per_second if itemsize == 2 else limits.fp32_macs_per_second
    return sum(
        m * n * k / (min(1, m / limits.matrix_rows) * n / (n + 16) * rate) for m, n, k in products
    )


def _seconds(
    limits: Limits,
    itemsize: int,
    *,
    programs: int,
    steps: int,
    loads: int,
    compute: float,
    step_bytes: float,
    end_bytes: float,
    shared_memory: int,
) -> float:
    """Time of `programs` programs of `steps` steps, of `compute` each; see `_multiplying`.

    `loads` are a step's, one after the other.
    """
    waves = ceil_div(programs, limits.multiprocessors)
    together = max(1, min(4, limits.shared_memory // max(shared_memory, 1)))
    # Loads, products and the barrier between, where no other program hides them; products of fp32
    # take as long as the loads.
    waits = loads if limits.waits and itemsize == 2 else 1
    latency = LATENCY * waits * ceil_div(programs, limits.multiprocessors * together)
    moved = (steps * step_bytes + end_bytes) / limits.cache_bytes_per_second
    each = max(steps * compute, moved) * limits.multiprocessors
    return waves * each + steps * latency


def _most_splits(p: Chain, size: int) -> int:
    """How many sums of ``size`` elements each take no more than half of W."""
    return max(1, p.in_features * p.out_features // 2 // size)


def _copies_much(p: Chain, size: int) -> bool:
    """Whether a copy of a part would take more than that."""
    return 2 * size > p.in_features * p.out_features


def _run_waste(run: int, itemsize: int) -> float:
    """Bytes moved for each one used where only `run` elements in a row are wanted."""
    return max(1.0, 32 / (run * itemsize))


def _copied(p: Chain, t: ChainTile, itemsize: int) -> int:
    """Elements of the part that holds the minor digit, where a tile would read short runs of it.

    As cores and merged parts lie, that part is contiguous in its out digit; see `device.readable`.
    """
    if p.first_minor:
        run, size = t.block_k if p.exchanged else t.group_out, p.first_in * p.first_out * p.rank
    else:
        run, size = t.group_in if p.exchanged else t.block_n, p.second_in * p.second_out * p.rank
    return size if run * itemsize < 16 else 0


def _copy(size: int, itemsize: int, limits: Limits) -> float:
    """Seconds of a kernel that reads and writes so many elements, if any."""
    return 0.0 if size == 0 else 2.5e-6 + 2 * size * itemsize / limits.cache_bytes_per_second


def _chain_costs(
    problem: Chain, tile: ChainTile, rows: int, itemsize: int, limits: Limits, most: int
) -> Iterator[tuple[int, Cost]]:
    """The tile's with splits, at most so many."""
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
    out_groups = ceil_div(p.first_out, t.group_out)
    n_blocks = ceil_div(p.second_out, t.block_n)
    in_blocks = ceil_div(p.second_in, t.group_in) * ceil_div(p.rank, t.block_d)
    s_bytes = m_second * k_second * itemsize
    tiles = (m_first * t.block_k + t.block_k * n_first) * itemsize
    accumulators = m_second * t.block_n + m_first * n_first
    shared = t.num_stages * (tiles + second_bytes) + s_bytes
    products = (m_first, n_first, k_loop * t.block_k), (m_second, t.block_n, k_second)
    compute = _multiplying(limits, itemsize, *products)
    copy = _copy(_copied(p, t, itemsize), itemsize, limits)
    operands = 0
    if itemsize == 2 and m_second < limits.matrix_rows:
        # Each warp has all of s, and the program one step of the first part.
        threads = t.num_warps * limits.warp
        operands = m_second * k_second // limits.warp + t.block_k * n_first // threads
    for splits in _sizes(1, 4096, in_blocks):
        if splits > most:
            return
        seconds = _seconds(
            limits,
            itemsize,
            programs=b_blocks * out_groups * n_blocks * splits,
            steps=ceil_div(in_blocks, splits),
            loads=k_loop + 1,
            compute=compute,
            step_bytes=x_bytes + first_bytes + second_bytes,
            end_bytes=y_bytes * (5 if splits > 1 else 1),
            shared_memory=shared,
        )
        # The sum over splits is a kernel of its own.
        yield splits, Cost(accumulators, shared, seconds + 2e-6 * (splits > 1) + copy, operands)


def _chain_tiles(problem: Chain, rows: int, itemsize: int) -> Iterator[ChainTile]:
    p = problem
    # Up to 16 rows or values of D are padding where nothing else fills a matrix instruction.
    b_sizes = _sizes(1, FEW_ROWS, max(16, rows))
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
            yield ChainTile(b, g_in, g_out, k, d, n, 1, warps, stages)


@lru_cache(maxsize=4096)
def chain_tiles(
    problem: Chain, rows: int, itemsize: int, limits: Limits
) -> tuple[tuple[float, ChainTile], ...]:
    """(seconds, tile) of the tiles that fit, the fastest by the model first.

    Args:
        problem: the two parts.
        rows: a bucket, a power of two; there are none above ``FEW_ROWS``.
        itemsize: of an element, 2 or 4 bytes.
        limits: of the device.
    """
    if rows > FEW_ROWS:
        return ()
    priced, most = [], _most_splits(problem, rows * problem.out_features)
    for tile in _chain_tiles(problem, rows, itemsize):
        if _copies_much(problem, _copied(problem, tile, itemsize)):
            continue
        for splits, cost in _chain_costs(problem, tile, rows, itemsize, limits, most):
            if not cost.fits(tile.num_warps, limits, itemsize):
                break
            priced.append((cost.seconds, cost.shared_memory, tile._replace(splits=splits)))
    # Of equals the one that needs the least shared memory.
    return tuple((seconds, tile) for seconds, _, tile in sorted(priced)[:64])


# Of the tensor cores' peak rate; chained products of attention reach 0.40 to 0.65 of it.
TENSOR_SHARE = 0.65
# Columns of the narrowest product that takes no longer than its operands from shared memory.
FULL_COLUMNS = 64
# Of a step that another program of the multiprocessor does not hide: two barriers, a conversion.
STEP_LATENCY = 0.35e-6
# Of a program: its first loads and its last stores.
ENDS_LATENCY = 1.5e-6
# Of a thread, beside accumulators, as compiled; a multiprocessor has 64 K of them.
OTHER_REGISTERS = 42
# With more of B_q than so many values of k in all the compiler spills.
RESIDENT = 256


class _Walk(NamedTuple):
    """Sizes of ``out_q [m, n] = Σ_t (A_t [m, k] · B_q [k, j]) · C_t [j, n]``."""

    m: int
    k: int
    j: int
    n: int
    matrices: int
    steps: int


def _matrix_cost(w: _Walk, t: MatrixTile, out_bytes: int, limits: Limits) -> Cost:
    block_k = max(16, power_of_two(w.k))
    walks, units = ceil_div(w.j, t.block_j), limits.multiprocessors
    programs = ceil_div(w.m, MATRIX_ROWS) * ceil_div(w.n, t.block_n)
    programs *= ceil_div(w.matrices, t.matrices) * t.splits
    steps = walks * ceil_div(w.steps, t.splits)
    macs = block_k * max(t.block_j, FULL_COLUMNS) + t.block_j * max(t.block_n, FULL_COLUMNS)
    macs *= t.matrices * MATRIX_ROWS
    step_bytes = 2 * (MATRIX_ROWS * block_k + t.block_j * t.block_n)
    b_bytes = 2 * t.matrices * block_k * t.block_j
    end_bytes = t.matrices * MATRIX_ROWS * t.block_n * (4 if t.splits > 1 else out_bytes)
    shared = t.num_stages * step_bytes + b_bytes
    accumulators = MATRIX_ROWS * (t.matrices * t.block_n + t.block_j)
    registers = accumulators // (32 * t.num_warps) + OTHER_REGISTERS
    together = max(1, min(limits.shared_memory // shared, 2**16 // (32 * t.num_warps * registers)))
    # Of the busiest multiprocessor, whose programs share its rates and hide each other's waits.
    own = ceil_div(programs, units)
    compute = own * steps * macs / (TENSOR_SHARE * limits.macs_per_second / units)
    moved = own * (steps * step_bytes + walks * b_bytes + end_bytes)
    waits = ceil_div(own, together) * steps * STEP_LATENCY
    seconds = max(compute, moved * units / limits.cache_bytes_per_second, waits) + ENDS_LATENCY
    if t.splits > 1:
        size = t.splits * w.matrices * w.m * w.n
        seconds += 2e-6 + 4 * size / limits.cache_bytes_per_second
    # Without the widest instruction B_q comes through registers as well.
    operands = t.matrices * block_k * t.block_j // limits.warp
    return Cost(accumulators, shared, seconds, operands if limits.matrix_rows < 64 else 0)


@lru_cache(maxsize=4096)
def matrix_tiles(
    problem: Chain, rows: int, itemsize: int, limits: Limits, gradient: bool = False
) -> tuple[tuple[float, MatrixTile], ...]:
    """As :func:`chain_tiles`, for the kernel that takes a row of x as a matrix.

    None fits in fp32, or where triton does not rename registers.

    Args:
        gradient: of `second`, instead of y.
    """
    p, priced = problem, []
    if not limits.renames or itemsize != 2:
        return ()
    if gradient:
        walk = _Walk(p.second_in, p.first_in, p.first_out, p.second_out, p.rank, rows)
        most = _most_splits(p, p.second_in * p.second_out * p.rank)
    else:
        walk = _Walk(p.first_out, p.first_in, p.second_in, p.second_out, rows, p.rank)
        most = _most_splits(p, rows * p.out_features)
    # The left part is copied bond by bond.
    first, second = p.first_in * p.first_out, p.second_in * p.second_out
    copied = 0 if gradient and p.first_minor else (second if p.first_minor else first) * p.rank
    if _copies_much(p, copied):
        return ()
    copy = _copy(copied, itemsize, limits)
    # Wider ones than four instructions are shared out so that the state would have to move.
    n_sizes = _sizes(16, 4 * limits.matrix_rows, walk.n)
    for matrices, j, n in product(_sizes(1, 4, walk.matrices), _sizes(16, 128, walk.j), n_sizes):
        if matrices * power_of_two(walk.k) > RESIDENT:
            continue
        whole = MatrixTile(matrices, j, n, 1, 4, 3)
        groups = ceil_div(walk.m, MATRIX_ROWS) * ceil_div(walk.n, n)
        groups *= ceil_div(walk.matrices, matrices)
        # As many splits as give each multiprocessor one, two or four programs.
        fills = {times * limits.multiprocessors // groups for times in (1, 2, 4)}
        for splits in sorted({max(1, min(fill, walk.steps, most)) for fill in fills} | {1}):
            tile = whole._replace(splits=splits)
            cost = _matrix_cost(walk, tile, 4 if gradient else itemsize, limits)
            if cost.fits(tile.num_warps, limits, itemsize):
                priced.append((cost.seconds + copy, tile))
    # Of equals the one whose A_t and C_t serve the most B_q.
    return tuple(sorted(priced, key=lambda c: (c[0], -c[1].matrices, c[1]))[:64])


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
            compute=_multiplying(limits, itemsize, (left, right, d)),
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
