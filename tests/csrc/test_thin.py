"""Thin products on a device or, their own source, on an emulated one, against fp64.

The emulation stops where a kernel reads an input or writes before it has waited, at misaligned
vectors and at barriers that not all reach; shared memory and workspaces start as NaN.
"""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOShape
from mpo_kernels.backends.cuda import decode, extension, thin
from mpo_kernels.cores.quantize import dequantize, quantize
from mpo_kernels.planning.figures import default_figures
from mpo_kernels.testing import dense_linear, random_cores, relative_error

DEVICE = torch.device("cpu" if extension.unavailable() else "cuda")
FIGURES = default_figures("cuda", torch.bfloat16, 1)
BF16, FP16 = torch.bfloat16, torch.float16

SHAPES = {
    "odd": MPOShape((7, 5), (3, 11), 6),
    "primes": MPOShape((13, 3), (5, 17), 11),
    "aligned": MPOShape((8, 16), (16, 8), 24),
    "balanced": MPOShape((24, 32), (64, 48), 40),
    "bond 1": MPOShape((6, 8), (8, 7), 1),
    "padded": MPOShape((5, 8), (8, 6), 8, in_features=37, out_features=41),
    "padded by vectors": MPOShape((4, 16), (8, 8), 8, in_features=56, out_features=61),
    "mostly padded": MPOShape((3, 8), (4, 6), 4, in_features=6, out_features=5),
    "low rank": MPOShape.low_rank(96, 88, 24),
    "low rank, odd": MPOShape.low_rank(67, 45, 5),
    "low rank, mirrored": MPOShape((96, 1), (1, 88), 24),
    "skewed": MPOShape.skewed(256, 512, 16, 32, 24),
    "one digit": MPOShape((1, 1), (1, 9), 1),
    "three": MPOShape((4, 8, 4), (8, 4, 8), (8, 16)),
    "three, odd": MPOShape((3, 5, 7), (2, 5, 3), (5, 4)),
    "three, padded": MPOShape((3, 6, 8), (4, 5, 8), (10, 12), in_features=140, out_features=157),
}


def guarded(tensor: Tensor) -> Tensor:
    """A copy on the device with its strides, NaN (or the largest bytes) before and behind it."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    filler = torch.nan if tensor.is_floating_point() else 127
    around = torch.full((size + 128,), 0, dtype=torch.float32).fill_(filler).to(tensor.dtype)
    copy = around.to(DEVICE).as_strided(tensor.shape, tensor.stride(), 64)
    return copy.copy_(tensor.to(DEVICE))


def chain_for(cores: list[Tensor], rows: int, shape: MPOShape, from_left: bool) -> thin.Chain:
    layouts = tuple((tuple(core.shape), core.stride()) for core in cores)
    features = (shape.in_features, shape.out_features)
    found = thin.chain_of(layouts, rows, features, from_left, cores[0].itemsize, 132, FIGURES)
    assert found is not None
    return found


class Call:
    """Random operands, laid out for one order, and what is right."""

    def __init__(
        self, shape: MPOShape, rows: int, dtype: torch.dtype, from_left: bool, bias: bool = True
    ) -> None:
        self.shape, self.from_left = shape, from_left
        cores = random_cores(shape, dtype, torch.device("cpu"))
        self.cores = [guarded(thin.laid_out(core, from_left)) for core in cores]
        self.x = guarded(torch.randn(rows, shape.in_features).to(dtype))
        self.bias = guarded(torch.randn(shape.out_features).to(dtype)) if bias else None
        added = torch.zeros(shape.out_features) if self.bias is None else self.bias.cpu()
        x64, cores64 = self.x.cpu().double(), [core.double() for core in cores]
        self.exact = dense_linear(x64, cores64, added.double(), shape)

    def run(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        chain = chain_for(self.cores, len(x), self.shape, self.from_left)
        return decode.decode(x, self.cores, (), self.bias, chain)

    def check(self, y: Tensor) -> None:
        assert relative_error(y.cpu(), self.exact) < 1.5 * torch.finfo(y.dtype).eps


@pytest.fixture(autouse=True)
def on_kernels(cuda_backend: object) -> None:
    """Of the extension that there is."""
    torch.set_default_device(None)


@pytest.fixture(params=["by the model", "any", "others"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tiles are taken: the fastest, or any of those that there are."""
    if request.param == "by the model":
        yield
        return
    rng = random.Random(request.param)
    monkeypatch.setattr(thin, "_seconds", lambda *_: rng.random())
    thin.chain_of.cache_clear()
    yield
    thin.chain_of.cache_clear()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("from_left", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_against_dense(name: str, from_left: bool) -> None:
    for rows, dtype, bias in ((1, BF16, True), (3, FP16, False), (16, BF16, True)):
        call = Call(SHAPES[name], rows, dtype, from_left, bias)
        call.check(call.run())


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("from_left", [True, False])
@pytest.mark.parametrize("name", ["odd", "aligned", "low rank", "three", "three, padded"])
def test_bytes(name: str, from_left: bool, stored: torch.dtype) -> None:
    shape = SHAPES[name]
    for rows, dtype in ((1, FP16), (5, BF16)):
        cores, scales = quantize(random_cores(shape, torch.float32), stored)
        laid = [guarded(thin.laid_out(core.view(torch.int8), from_left)) for core in cores]
        laid = [core.view(stored) for core in laid]
        x, bias = torch.randn(rows, shape.in_features).to(dtype), torch.randn(shape.out_features)
        widened = [core.double() for core in dequantize(cores, scales, torch.float64)]
        exact = dense_linear(x.double(), widened, bias.to(dtype).double(), shape)
        chain = chain_for(laid, rows, shape, from_left)
        on_device = [scale.to(DEVICE) for scale in scales]
        y = decode.decode(guarded(x), laid, on_device, guarded(bias.to(dtype)), chain)
        assert relative_error(y.cpu(), exact) < 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("from_left", [True, False])
def test_rows_at_any_distance(from_left: bool) -> None:
    call = Call(SHAPES["aligned"], 5, FP16, from_left)
    for wide in (131, 136):
        around = torch.full((5, wide), torch.nan, dtype=FP16, device=DEVICE)
        for start in (0, 1, 3):
            x = around[:, start : start + 128]
            call.check(call.run(x.copy_(call.x)))
            x.fill_(torch.nan)
    call.check(call.run(call.x.t().contiguous().t()))
    call.check(call.run(call.x[None, :, :].expand(2, 5, 128)[1]))
    one = Call(SHAPES["aligned"], 1, FP16, from_left)
    one.check(one.run(one.x.as_strided((1, 128), (3, 1), one.x.storage_offset())))


def test_rows_past_2_to_the_31() -> None:
    call = Call(SHAPES["aligned"], 2, FP16, True)
    far = torch.empty(2**31 + 128, dtype=FP16, device=DEVICE)  # of which little is touched
    x = far.as_strided((2, 128), (2**31, 1))
    call.check(call.run(x.copy_(call.x)))


def test_sums_have_a_fixed_order() -> None:
    call = Call(MPOShape.low_rank(4096, 64, 48), 2, BF16, False)
    chain = chain_for(call.cores, 2, call.shape, False)
    assert chain.products[1].shares == chain.products[0].splits > 1
    assert torch.equal(call.run(), call.run())


def test_cores_that_do_not_lie_so_are_not_read() -> None:
    shape = SHAPES["balanced"]
    plain = random_cores(shape, BF16)
    features = (shape.in_features, shape.out_features)
    for from_left in (True, False):
        wrong = [thin.laid_out(core, not from_left) for core in plain]
        for cores in (plain, wrong):
            layouts = tuple((tuple(core.shape), core.stride()) for core in cores)
            assert thin.chain_of(layouts, 1, features, from_left, 2, 132, FIGURES) is None
        laid = [thin.laid_out(core, from_left) for core in plain]
        for core, other in zip(plain, laid, strict=True):
            assert torch.equal(core, other)
            strides = thin.laid_out_strides(tuple(core.shape), from_left)
            sizes = zip(strides, other.stride(), core.shape, strict=True)
            assert all(a == b for a, b, size in sizes if size > 1)


def test_columns_past_a_grid_are_left_to_the_others(kernels: ModuleType) -> None:
    # Of tiles of four it would be half a grid, of one, which misaligned rows take, two.
    shape = MPOShape((2, 2**16), (2, 2), 2)
    features = (2**17, 4)
    for from_left, served in ((True, False), (False, True)):
        layouts = tuple((s, thin.laid_out_strides(s, from_left)) for s in shape.core_shapes)
        found = thin.chain_of(layouts, 16, features, from_left, 2, 132, FIGURES)
        assert (found is not None) == served
    good = Call(SHAPES["aligned"], 1, FP16, True)
    chain = chain_for(good.cores, 1, good.shape, True)
    first = chain.products[0]._replace(columns=2**20, column_tiles=4, groups=2)
    with pytest.raises(ValueError, match="product 0, columns: expected 65535 tiles of eight"):
        kernels.Chain((first, chain.products[1]), chain.offsets, 128, "float16", "float16", True)


def test_a_wrong_address_is_refused_by_name_and_nothing_is_written(kernels: ModuleType) -> None:
    call = Call(SHAPES["aligned"], 1, FP16, True)
    chain = decode.compiled(chain_for(call.cores, 1, call.shape, True), FP16, FP16, 90)
    y = torch.full((1, 128), 7.0, dtype=FP16, device=DEVICE)
    space = torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE)
    right = {
        "x": call.x.data_ptr(),
        "x_row": 0,
        "cores": [core.data_ptr() for core in call.cores],
        "scales": [],
        "bias": 0,
        "y": y.data_ptr(),
        "workspace": space.data_ptr(),
    }
    one, two = right["cores"]
    for wrong, name in (
        ({"x": 0}, "x"),
        ({"x": right["x"] + 1}, "x"),
        ({"y": 0}, "y"),
        ({"bias": 1}, "bias"),
        ({"workspace": 0}, "workspace"),
        ({"workspace": space.data_ptr() + 8}, "workspace"),
        ({"cores": [one, 0]}, "core 1"),
        ({"cores": [one + 1, two]}, "core 0"),
        ({"scales": [2]}, "scale 0"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected an address divisible by"):
            chain.launch(**{**right, **wrong}, early=False, device=0, stream=0)
    assert (y == 7).all()


def test_what_is_no_chain_is_refused_by_name(kernels: ModuleType) -> None:
    call = Call(SHAPES["aligned"], 1, FP16, True)
    good = chain_for(call.cores, 1, call.shape, True)

    def chain(**changes: int) -> object:
        first, second = good.products
        products = (first._replace(**changes), second)
        return kernels.Chain(products, good.offsets, 128, "float16", "float16", True)

    chain()
    for changes, message in (
        ({"m": 0}, "product 0, m: expected 1 or more, got 0"),
        ({"splits": 3}, "product 0, splits: expected as many tiles as k has, got 3"),
        ({"warps_k": 3}, "product 0, warps_k: expected a divisor of 8, got 3"),
        ({"groups": 3}, "product 0, groups: expected 2, or 4 with one column tile, got 3"),
        ({"column_tiles": 2}, "product 0, column_tiles: expected 1 or 4, got 2"),
        ({"shares": 2}, "product 0, shares: expected those that the product before makes, got 2"),
        ({"weight_major": 2**31}, "weight_major: expected it below 2.31, got 2147483648"),
    ):
        with pytest.raises(ValueError, match=message):
            chain(**changes)
    with pytest.raises(ValueError, match="element: expected one of float16, bfloat16, got int8"):
        kernels.Chain(good.products, good.offsets, 128, "int8", "int8", True)
    with pytest.raises(ValueError, match="products, offsets: expected 1 to 3, and as many"):
        kernels.Chain((), (), 128, "float16", "float16", True)
    with pytest.raises(ValueError, match="cores, scales: expected 2 and 1 or 0, got 1 and 0"):
        chain().launch(0, 0, [0], [], 0, 0, 0, False, 0, 0)  # type: ignore[attr-defined]


def early(seen: decode.Seen, cores: list[Tensor], stream: int) -> bool:
    """Of a launch that succeeds."""
    versions = decode.versions_of(cores)
    if not (found := seen.early(cores, versions, stream)):
        seen.note(cores, versions, stream)
    return found


class TestSeen:
    """Cores are read before x is there only where nothing that may still run writes them."""

    def test_not_before_a_first_call_on_a_stream_has_waited(self) -> None:
        seen, cores = decode.Seen(), [torch.ones(3), torch.ones(3)]
        assert not early(seen, cores, 1)
        assert early(seen, cores, 1) and early(seen, cores, 1)
        assert not early(seen, cores, 2)
        assert early(seen, cores, 2) and not early(seen, cores, 1)

    def test_not_after_a_change_in_place(self) -> None:
        seen, core = decode.Seen(), torch.nn.Parameter(torch.ones(3))
        changes = [
            lambda: core.data.add_(0) is None or core.detach().add_(1),
            lambda: torch.optim.SGD([core], 0.1).step(),
            lambda: torch.nn.ParameterList([core]).load_state_dict({"0": torch.zeros(3)}),
        ]
        core.grad = torch.ones(3)
        for change in changes:
            early(seen, [core], 1)
            assert early(seen, [core], 1)
            change()
            assert not early(seen, [core], 1)

    def test_views_made_anew_count_with_what_they_are_of(self) -> None:
        seen, held = decode.Seen(), torch.ones(4, dtype=torch.int8)
        assert not early(seen, [held.view(torch.float8_e4m3fn)], 1)
        assert early(seen, [held.view(torch.float8_e4m3fn)], 1)
        held.zero_()
        assert not early(seen, [held.view(torch.float8_e4m3fn)], 1)

    def test_a_new_tensor_in_an_old_place_is_new(self) -> None:
        seen = decode.Seen()
        for _ in range(200):
            assert not early(seen, [torch.ones(3)], 1)
        assert len(seen._last) <= 64  # what is gone is forgotten

    def test_never_where_nothing_is_counted(self) -> None:
        seen = decode.Seen()
        with torch.inference_mode():
            core = torch.ones(3)
        assert not early(seen, [core], 1) and not early(seen, [core], 1)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """What the calls were told."""
        told: list[bool] = []
        method = decode.Seen.early
        monkeypatch.setattr(decode.Seen, "early", lambda *a: told.append(method(*a)) or told[-1])
        return told

    def test_parts_merged_in_the_call_are_new(self, asked: list[bool]) -> None:
        call = Call(SHAPES["aligned"], 1, FP16, True)
        chain = chain_for(call.cores, 1, call.shape, True)
        for _ in range(2):
            decode.decode(call.x, [core.clone() for core in call.cores], (), None, chain)
        assert asked == [False, False]
        for _ in range(2):
            call.run()
        assert asked[2:] == [False, True]

    def test_a_launch_that_fails_has_not_waited(
        self, asked: list[bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call = Call(SHAPES["aligned"], 1, FP16, True)

        class Failing:
            def launch(self, *_: object) -> None:
                raise RuntimeError("launch")

        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="launch"):
            patched.setattr(decode, "compiled", lambda *_: Failing())
            call.run()
        for _ in range(2):
            call.run()
        assert asked == [False, False, True]

    def test_what_changes_during_a_launch_is_not_what_it_waited_for(
        self, asked: list[bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call = Call(SHAPES["aligned"], 1, FP16, True)
        compiled = decode.compiled

        class Changing:
            def __init__(self, *of: object) -> None:
                self.chain = compiled(*of)

            def launch(self, *operands: object) -> None:
                self.chain.launch(*operands)
                call.cores[0].neg_()

        with monkeypatch.context() as patched:
            patched.setattr(decode, "compiled", Changing)
            call.run()
        call.run()
        assert asked == [False, False]

    def test_what_is_captured_has_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen, core, other = decode.Seen(), torch.ones(3), torch.ones(3)
        assert not early(seen, [core], 1)
        with monkeypatch.context() as patched:
            patched.setattr(decode, "capturing", lambda: True)
            # A replay waits for what was before it, so only changes within the graph matter.
            assert early(seen, [core], 2) and not early(seen, [other], 2)
            other.neg_()
            assert not early(seen, [other], 2)
            core.neg_()
            assert not early(seen, [core], 2)
        assert not early(seen, [other], 2) and not early(seen, [core], 2)
        assert early(seen, [core, other], 2)
