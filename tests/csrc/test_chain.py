"""The kernel on a device or, its own source, on an emulated one, against fp64.

The emulation stops at accesses outside a buffer, misaligned ones, missing barriers and elements of
y stored twice; shared memory and workspaces start as NaN.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOShape
from mpo_kernels.backends.cuda import extension
from mpo_kernels.testing import dense_linear, random_cores, relative_error

DEVICE = torch.device("cpu" if extension.unavailable() else "cuda")
H200 = (90, 132, 227 << 10)
A100 = (80, 108, 163 << 10)
SMALL = (86, 84, 99 << 10)

SHAPES = {
    "odd": MPOShape((7, 5), (3, 11), 6),
    "primes": MPOShape((13, 3), (5, 17), 11),
    "aligned": MPOShape((8, 16), (16, 8), 24),
    "balanced": MPOShape((24, 32), (64, 48), 40),
    "bond 1": MPOShape((6, 8), (8, 7), 1),
    "padded": MPOShape((5, 8), (8, 6), 8, in_features=37, out_features=41),
    "low rank": MPOShape.low_rank(96, 88, 24),
    "low rank, odd": MPOShape.low_rank(67, 45, 5),
    "low rank, mirrored": MPOShape((96, 1), (1, 88), 24),
    "skewed": MPOShape.skewed(256, 512, 16, 32, 24),
    "one digit": MPOShape((1, 1), (1, 9), 1),
    "three": MPOShape((4, 8, 4), (8, 4, 8), (8, 16)),
    "three, odd": MPOShape((3, 5, 7), (2, 5, 3), (5, 4)),
    "three, padded": MPOShape((3, 6, 8), (4, 5, 8), (10, 12), in_features=140, out_features=157),
}


def operands(shape: MPOShape, rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    cores = random_cores(shape, dtype, torch.device("cpu"))
    x = torch.randn(rows, shape.in_features).to(dtype)
    return x, cores, torch.randn(shape.out_features).to(dtype)


def moved(tensor: Tensor) -> Tensor:
    """On the device, with the strides and the alignment that it has."""
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    return whole.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Call:
    """One launch, its workspaces poisoned."""

    def __init__(
        self,
        module: ModuleType,
        x: Tensor,
        cores: list[Tensor],
        shape: MPOShape,
        *,
        from_left: bool = True,
        scales: tuple[Tensor, ...] = (),
        limits: tuple[int, int, int] = H200,
    ) -> None:
        layouts = [(c.shape, c.stride(), c.data_ptr() % 16 == 0) for c in cores]
        element, stored = (str(t.dtype).removeprefix("torch.") for t in (x, cores[0]))
        features = (shape.in_features, shape.out_features)
        self.chain = module.Chain(layouts, len(x), *features, from_left, element, stored, limits)
        # To another device without a change of strides or alignment.
        self.x, self.cores = moved(x), [moved(core) for core in cores]
        self.scales = [scale.to(DEVICE) for scale in scales]
        self.y = torch.full((len(x), shape.out_features), torch.nan, dtype=x.dtype, device=DEVICE)
        self.partials = torch.full((self.chain.partials + 4,), torch.nan, device=DEVICE)
        self.counters = torch.zeros(self.chain.counters, dtype=torch.int32, device=DEVICE)

    def __call__(self, bias: Tensor | None, **changed: int | list[int]) -> Tensor:
        arguments = {
            "x": self.x.data_ptr(),
            "x_row": self.x.stride(0),
            "x_column": self.x.stride(1),
            "cores": [core.data_ptr() for core in self.cores],
            "scales": [scale.data_ptr() for scale in self.scales],
            "bias": 0 if bias is None else (bias := bias.to(DEVICE)).data_ptr(),
            "y": self.y.data_ptr(),
            "partials": self.partials.data_ptr(),
            "counters": self.counters.data_ptr(),
            "device": 0,
            "stream": 0,
        }
        self.chain.launch(**{**arguments, **changed})
        assert not self.counters.any(), "the next launch finds no zeros"
        return self.y.cpu()


def exact(x: Tensor, cores: list[Tensor], bias: Tensor | None, shape: MPOShape) -> Tensor:
    bias = torch.zeros(shape.out_features) if bias is None else bias
    return dense_linear(x.double(), [c.double() for c in cores], bias.double(), shape)


def bound(dtype: torch.dtype) -> float:
    """A state and y are rounded once each, the former in every bond."""
    return 1.2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("from_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", SHAPES)
def test_chain(kernels: ModuleType, name: str, from_left: bool, rows: int) -> None:
    shape, dtype = SHAPES[name], torch.bfloat16 if rows == 3 else torch.float16
    x, cores, bias = operands(shape, rows, dtype)
    y = Call(kernels, x, cores, shape, from_left=from_left)(bias)
    assert relative_error(y, exact(x, cores, bias, shape)) < bound(dtype)


@pytest.mark.parametrize("limits", [A100, SMALL], ids=["sm_80", "sm_86"])
@pytest.mark.parametrize("name", ["balanced", "low rank", "three"])
def test_other_devices(kernels: ModuleType, name: str, limits: tuple[int, int, int]) -> None:
    shape = SHAPES[name]
    x, cores, bias = operands(shape, 5, torch.bfloat16)
    y = Call(kernels, x, cores, shape, limits=limits)(bias)
    assert relative_error(y, exact(x, cores, bias, shape)) < bound(torch.bfloat16)


@pytest.mark.parametrize(("outs", "rank"), [(1000, 40), (1000, 37), (1152, 320)])
def test_clusters(kernels: ModuleType, outs: int, rank: int) -> None:
    """Blocks that share the first product, the last ones with nothing of y."""
    shape = MPOShape.low_rank(1024, outs, rank)
    x, cores, bias = operands(shape, 2, torch.bfloat16)
    call = Call(kernels, x, cores, shape, from_left=False)
    assert "clusters of" in repr(call.chain) and (rank < 320 or call.chain.splits > 1)
    assert relative_error(call(bias), exact(x, cores, bias, shape)) < bound(torch.bfloat16)


def test_every_way_to_read_a_core_is_among_the_shapes(kernels: ModuleType) -> None:
    found = set()
    for shape in SHAPES.values():
        x, cores, _ = operands(shape, 1, torch.float16)
        for from_left in (True, False):
            text = repr(Call(kernels, x, cores, shape, from_left=from_left).chain)
            found |= {way for way in ("along m", "along k", "one at a time") if way in text}
    assert len(found) == 3


@pytest.mark.parametrize("from_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", ["aligned", "primes", "three"])
def test_strides(kernels: ModuleType, name: str, from_left: bool) -> None:
    """In and out exchanged, as a tied head has them; every second column of wider rows of x."""
    shape = SHAPES[name]
    x, cores, _ = operands(shape, 3, torch.float16)
    cores = [core.transpose(1, 2).contiguous().transpose(1, 2) for core in cores]
    x = torch.randn(3, 2 * shape.in_features + 3).half()[:, 1 : 2 * shape.in_features : 2]
    y = Call(kernels, x, cores, shape, from_left=from_left)(None)
    assert relative_error(y, exact(x, cores, None, shape)) < bound(torch.float16)


def test_cores_at_any_address(kernels: ModuleType) -> None:
    shape = SHAPES["aligned"]
    x, cores, bias = operands(shape, 4, torch.bfloat16)
    cores = [torch.cat([c.new_zeros(1), c.flatten()])[1:].view(c.shape) for c in cores]
    assert all(core.data_ptr() % 16 for core in cores)
    y = Call(kernels, x, cores, shape)(bias)
    assert relative_error(y, exact(x, cores, bias, shape)) < bound(torch.bfloat16)


@pytest.mark.parametrize("from_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["aligned", "odd", "low rank", "three, odd"])
def test_bytes(
    kernels: ModuleType, name: str, dtype: torch.dtype, stored: torch.dtype, from_left: bool
) -> None:
    """Every value that a byte has, NaN aside, and a scale for each slice of a bond."""
    shape = SHAPES[name]
    x, cores, bias = operands(shape, 3, dtype)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes.view(stored).float().isfinite()]
    quantised = [codes[torch.randint(len(codes), c.shape)].view(stored) for c in cores]
    scales = tuple(torch.rand(core.shape[3]) * 1e-2 for core in cores[:-1])
    values = [
        core.double() * scale.double()
        for core, scale in zip(quantised, (*scales, torch.full((1,), 1e-2)), strict=True)
    ]
    values[-1] = quantised[-1].double()
    call = Call(kernels, x, quantised, shape, scales=scales, from_left=from_left)
    assert relative_error(call(bias), exact(x, values, bias, shape)) < bound(dtype)


def test_sums_do_not_depend_on_the_order_of_blocks(kernels: ModuleType) -> None:
    shape = SHAPES["balanced"]
    x, cores, bias = operands(shape, 2, torch.bfloat16)
    call = Call(kernels, x, cores, shape)
    assert call.chain.splits > 1
    # The emulation takes blocks in another order at every launch.
    first = call(bias).clone()
    assert all(torch.equal(call(bias), first) for _ in range(3))


def test_nothing_is_written_where_an_argument_is_wrong(kernels: ModuleType) -> None:
    shape = SHAPES["aligned"]
    x, cores, bias = operands(shape, 2, torch.bfloat16)
    call = Call(kernels, x, cores, shape)
    address, other = (core.data_ptr() for core in call.cores)
    for changed, message in (
        ({"x": call.x.data_ptr() + 1}, r"^x: expected an address divisible by 2, got 0x"),
        ({"y": 0}, r"^y: expected an address, got null"),
        ({"cores": [address + 2, other]}, r"^core 0: expected an address divisible"),
        ({"cores": [address]}, r"^cores, scales: expected 2 and 1 or 0, got 1 and 0"),
        ({"x_row": -1}, r"^x: expected strides from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(bias, **changed)
        assert call.y.isnan().all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows: expected 1 to 16, got 0"),
        ({"rows": 17}, ValueError, "rows: expected 1 to 16, got 17"),
        ({"in_features": 65}, ValueError, "in_features: expected 1 to 64, got 65"),
        ({"out_features": 0}, ValueError, "out_features: expected 1 to 64, got 0"),
        ({"element": "float32"}, ValueError, "element: expected one of float16, bfloat16"),
        ({"stored": "int4"}, ValueError, "stored: expected one of float16, float8_e4m3fn, int8"),
        ({"limits": (75, 40, 64 << 10)}, RuntimeError, "architecture: expected sm_80 or later"),
        (
            {"limits": (80, 40, 1 << 10)},
            RuntimeError,
            "shared memory: no schedule fits 1024 bytes and",
        ),
        ({"cores": 1}, ValueError, "cores: expected 2 or 3, got 1"),
        ({"cores": 4}, ValueError, "cores: expected 2 or 3, got 4"),
        ({"bond": 3}, ValueError, "core 1: expected bonds that fit its neighbours"),
        ({"stride": 1 << 31}, ValueError, r"core 0: expected it to span fewer than 2\^31 elements"),
        ({"digit": 1 << 30}, ValueError, r"2\^31"),
        ({"digit": (1 << 30) + 1}, ValueError, r"core 1: expected sizes of 1 to 2\^30"),
        ({"digit": 1 << 31}, ValueError, r"core 1: expected it below 2\^31"),
        ({"rows": 1 << 40}, ValueError, r"rows: expected it below 2\^31, got 1099511627776"),
    ],
)
def test_refusals(kernels: ModuleType, changed: dict, error: type[Exception], message: str) -> None:
    digit, bond = changed.pop("digit", 8), changed.pop("bond", 4)
    stride = changed.pop("stride", 32)
    left = ((1, 8, 8, 4), (0, stride, 4, 1), True)
    middle = ((4, 1, 1, 4), (4, 4, 4, 1), True)
    right = ((bond, digit, 8, 1), (64, 8, 1, 1), True)
    cores = [left, right]
    if (count := changed.pop("cores", 2)) != 2:
        cores = [left, middle, middle, right][:count] if count > 2 else [left]
    arguments = {
        "rows": 1,
        "in_features": 64,
        "out_features": 64,
        "from_left": True,
        "element": "float16",
        "stored": "float16",
        "limits": H200,
    }
    with pytest.raises(error, match=message):
        kernels.Chain(cores, **{**arguments, **changed})


def test_every_schedule_covers_its_problem_once(build: Path) -> None:
    done = subprocess.run([build / "schedules"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    served, unserved = map(int, re.findall(r"\d+", done.stdout))
    assert served > 300_000 and unserved < served / 200
