"""Each kernel against fp64, over random sizes, tiles, strides and dtypes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guards import Guards
from torch import Tensor

from mpo_kernels.backends.triton import tiles
from mpo_kernels.backends.triton.chain import chain
from mpo_kernels.backends.triton.device import interpreted, launch
from mpo_kernels.backends.triton.gather import gather, gather_gradient
from mpo_kernels.backends.triton.matrix import matrix_chain, matrix_gradient
from mpo_kernels.backends.triton.product import sum_splits
from mpo_kernels.backends.triton.tiles import FEW_ROWS, LIMITS, Chain, TwoParts, power_of_two
from mpo_kernels.testing import relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest of each direction; primes and ones among what is drawn.
SIZE = 20
TARGET = LIMITS["sm_90"]


def of_large(problem: Any) -> Any:
    """Of a small layer sums over splits, or a copy of a part, would be more than half of W."""
    return problem._replace(in_features=2**20, out_features=2**20)


@dataclass
class Draw:
    """Random sizes, parts ``[in, out, D]``, x, dy and bias of one problem."""

    seed: int
    dtype: torch.dtype
    guards: Guards

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.a_in, self.a_out, self.b_in, self.b_out, self.rank = (
            self.rng.choice((1, self.rng.randint(1, SIZE), self.rng.randint(1, SIZE)))
            for _ in range(5)
        )
        self.rows = self.rng.choice((1, 2, 7, 16, 37, 70))
        ins, outs = self.a_in * self.b_in, self.a_out * self.b_out
        self.in_features = ins - self.rng.randint(0, min(3, ins - 1))
        self.out_features = outs - self.rng.randint(0, min(3, outs - 1))
        self.a = self.part(self.a_in, self.a_out)
        self.b = self.part(self.b_in, self.b_out)
        self.x = self.matrix(self.rows, self.in_features)
        self.dy = self.matrix(self.rows, self.out_features)
        self.bias = self.guards.copy(torch.randn(self.out_features).to(self.dtype))

    def part(self, ins: int, outs: int) -> Tensor:
        """``[in, out, D]`` in one of the layouts that cores and merged parts have."""
        order = self.rng.choice(((0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)))
        sizes = (ins, outs, self.rank)
        values = torch.randn([sizes[axis] for axis in order]).to(self.dtype)
        inverse = [order.index(axis) for axis in range(3)]
        return self.guards.copy(values.permute(inverse))

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Contiguous, transposed, every other column of a wider one, or one row for all."""
        kind = self.rng.randrange(4)
        if kind == 0:
            values = torch.randn(columns, rows).t()
        elif kind == 1:
            values = torch.randn(rows, 2 * columns + 3)[:, 1 : 2 * columns + 1 : 2]
        elif kind == 2:
            values = torch.randn(1, columns).expand(rows, columns)
            return values.to(self.guards.device, self.dtype)
        else:
            values = torch.randn(rows, columns)
        return self.guards.copy(values.to(self.dtype))

    def weight(self) -> Tensor:
        """W ``[in, out]`` in fp64, the digit of ``a`` the major one."""
        w = torch.einsum("ijd,kld->ikjl", self.a.double(), self.b.double())
        w = w.reshape(self.a_in * self.b_in, self.a_out * self.b_out)
        return w[: self.in_features, : self.out_features]

    def weight_gradient(self, of_w: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the parts from that of W."""
        padded = of_w.new_zeros(self.a_in * self.b_in, self.a_out * self.b_out)
        padded[: self.in_features, : self.out_features] = of_w
        g = padded.view(self.a_in, self.b_in, self.a_out, self.b_out)
        of_a = torch.einsum("ikjl,kld->ijd", g, self.b.double())
        return of_a, torch.einsum("ikjl,ijd->kld", g, self.a.double())

    def tile(
        self, kernel_tiles: object, problem: object, least: int = 1, **options: bool
    ) -> object:
        """Any of the tiles that would be tried, of a bucket that there are some for."""
        bucket = max(least, min(power_of_two(self.rows), FEW_ROWS))
        problem = of_large(problem)
        found = kernel_tiles(  # type: ignore[operator]
            problem, bucket, self.dtype.itemsize, TARGET, **options
        )
        return self.rng.choice(found)[1]

    def check(self, got: Tensor, exact: Tensor) -> None:
        # The intermediate is rounded once to the operands' dtype, the result once more.
        eps = torch.finfo(self.dtype).eps
        assert got.isfinite().all()
        assert relative_error(got, exact) <= 2 * eps + 1e-6


# On a device each draw compiles kernels of its own, at a quarter of a second each.
@pytest.fixture(params=range(14 if interpreted() else 6))
def seed(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def draw(request: pytest.FixtureRequest, seed: int, guards: Guards) -> Draw:
    return Draw(1000 * DTYPES.index(request.param) + seed, request.param, guards)


@pytest.mark.parametrize("first", ["left", "right"])
def test_chain_in_both_orders(draw: Draw, first: str) -> None:
    d = draw
    parts = (d.a, d.b) if first == "left" else (d.b, d.a)
    (a_in, a_out, _), (b_in, b_out, _) = (part.shape for part in parts)
    p = Chain(a_in, a_out, b_in, b_out, d.rank, d.in_features, d.out_features, first == "right")
    exact = d.x.double() @ d.weight()
    y = chain(d.x, *parts, d.bias, p, d.tile(tiles.chain_tiles, p))
    d.check(y, exact + d.bias.double())
    assert y.dtype == d.dtype and y.shape == exact.shape
    d.check(chain(d.x, *parts, None, p, d.tile(tiles.chain_tiles, p)), exact)


@pytest.mark.parametrize("first", ["left", "right"])
@pytest.mark.parametrize("draw", DTYPES[1:], ids=str, indirect=True)
def test_rows_as_matrices(draw: Draw, first: str) -> None:
    d = draw
    x, dy, exchanged = d.x[:9], d.dy[:9], d.rng.random() < 0.5
    one, other = (d.a, d.b) if first == "left" else (d.b, d.a)
    features = (d.in_features, d.out_features)
    p = Chain(*one.shape[:2], *other.shape[:2], d.rank, *features, first == "right", exchanged)
    exact = x.double() @ d.weight()
    y = matrix_chain(x, one, other, d.bias, p, d.tile(tiles.matrix_tiles, p, FEW_ROWS))
    d.check(y, exact + d.bias.double())
    assert y.dtype == d.dtype and y.shape == exact.shape
    y = matrix_chain(x, one, other, None, p, d.tile(tiles.matrix_tiles, p, FEW_ROWS))
    d.check(y, exact)
    got = matrix_gradient(x, dy, one, p, d.tile(tiles.matrix_tiles, p, gradient=True))
    assert got.dtype == torch.float32
    of_a, of_b = d.weight_gradient(x.double().t() @ dy.double())
    d.check(got, of_b if first == "left" else of_a)


def matrices(rows: Tensor, first: int, second: int, p: Chain) -> Tensor:
    """Each row as ``[first, second]`` in fp64, what is padded zero."""
    padded = torch.nn.functional.pad(rows.double(), (0, first * second - rows.shape[1]))
    return padded.view(-1, second, first).mT if p.first_minor else padded.view(-1, first, second)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_gather_and_its_gradients(draw: Draw, ids_dtype: torch.dtype) -> None:
    d = draw
    p = TwoParts(*d.a.shape[:2], *d.b.shape[:2], d.rank, d.in_features, d.out_features)
    ids = torch.randint(d.in_features, (d.rows,), device=d.x.device).to(ids_dtype)
    d.check(gather(ids, d.a, d.b, p, d.tile(tiles.gather_tiles, p)), d.weight()[ids.long()])
    of_w = d.weight().new_zeros(d.in_features, d.out_features)
    of_w.index_add_(0, ids.long(), d.dy.double())
    for of_left, other, exact in zip(
        (True, False), (d.b, d.a), d.weight_gradient(of_w), strict=True
    ):
        tile = d.tile(tiles.gather_tiles, p, gradient=True)
        d.check(gather_gradient(d.dy, ids, other, of_left, p, tile), exact)


def test_every_tile_of_a_problem_agrees(guards: Guards) -> None:
    d = Draw(5, torch.float32, guards)
    p = Chain(6, 5, 7, 9, 3, 42, 45, True)
    x, first, second = (guards.copy(torch.randn(size)) for size in ((9, 42), (6, 5, 3), (7, 9, 3)))
    exact = torch.einsum(
        "bsf,fjd,snd->bnj", x.view(9, 7, 6).double(), first.double(), second.double()
    )
    found = tiles.chain_tiles(of_large(p), 16, 4, TARGET)
    assert {tile.splits for _, tile in found} > {1} and len(found) == 64
    for _, tile in found[::4]:
        d.check(chain(x, first, second, None, p, tile), exact.reshape(9, 45))


@pytest.mark.parametrize("first_minor", [False, True])
def test_rows_as_matrices_in_every_tile(guards: Guards, first_minor: bool) -> None:
    d = Draw(5, torch.float16, guards)
    p = Chain(23, 70, 37, 40, 3, 23 * 37 - 2, 70 * 40 - 5, first_minor)

    def operand(*size: int) -> Tensor:
        return guards.copy(torch.randn(size).to(torch.float16))

    x, dy, bias = operand(5, p.in_features), operand(5, p.out_features), operand(p.out_features)
    first, second = operand(23, 70, 3), operand(37, 40, 3)
    of_x, of_dy = matrices(x, 23, 37, p), matrices(dy, 70, 40, p)
    y = torch.einsum("bfs,fjd,snd->bjn", of_x, first.double(), second.double())
    y = (y.mT if first_minor else y).reshape(5, -1)[:, : p.out_features] + bias.double()
    of_second = torch.einsum("bfs,fjd,bjn->snd", of_x, first.double(), of_dy)
    forward = [tile for _, tile in tiles.matrix_tiles(p, 64, 2, TARGET)]
    backward = [tile for _, tile in tiles.matrix_tiles(p, 64, 2, TARGET, gradient=True)]
    for found in (forward, backward):
        for field in ("matrices", "block_j", "block_n", "splits"):
            assert len({getattr(tile, field) for tile in found}) > 1, field
    for tile in forward[::13]:
        d.check(matrix_chain(x, first, second, bias, p, tile), y)
    for tile in backward[::13]:
        d.check(matrix_gradient(x, dy, first, p, tile), of_second)


def test_sum_of_splits_is_in_a_fixed_order(guards: Guards) -> None:
    splits, bias = guards.copy(torch.randn(5, 3, 700)), guards.copy(torch.randn(700))
    total = sum_splits(splits, bias, guards.empty((3, 700), torch.float32))
    expected = torch.zeros_like(total)
    for split in splits:
        expected = expected + split
    assert torch.equal(total, expected + bias)


def test_a_failing_launch_names_the_kernel_and_its_configuration() -> None:
    class Broken:
        __name__ = "chain_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            raise ValueError("out of resources")

    tile = tiles.ChainTile(16, 1, 1, 16, 16, 16, 1, 4, 2)
    with pytest.raises(
        RuntimeError, match=r"chain_kernel failed on grid \(3,\).*block_b=16.*out of"
    ):
        launch(Broken(), (3,), tile, torch.zeros(2, 2), tile)
