"""The cuda back end as a whole on a device or the emulated one: plans, layers, bytes, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import mpo_kernels as mk
from mpo_kernels import MPOShape
from mpo_kernels.backends.cuda import backend, decode, extension, thin
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.planning.plan import Gradients
from mpo_kernels.testing import ODD_SHAPES, dense_linear, random_cores, relative_error

BF16 = torch.bfloat16


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shape", [s for s in ODD_SHAPES if s.num_cores in (2, 3)], ids=str)
def test_every_plan_agrees_with_dense(
    cuda_backend: backend.CudaBackend, shape: MPOShape, rows: int
) -> None:
    plain = random_cores(shape, BF16, torch.get_default_device())
    x, bias = (
        torch.randn(rows, shape.in_features).to(BF16),
        torch.randn(shape.out_features).to(BF16),
    )
    exact = dense_linear(x.double(), [c.double() for c in plain], bias.double(), shape)
    features = (shape.in_features, shape.out_features)
    for order in ("left", "right"):
        cores = [thin.laid_out(core, order == "left") for core in plain]
        plan = cuda_backend.plan_for(rows, BF16, x.device, cores, features=features)
        own = [p for p in plan.candidates if p.algorithm == "decode"]
        assert order in {p.order for p in own} and len(own) < len(plan.candidates)
        for candidate in own:
            y = cuda_backend.linear(x, cores, bias, shape.out_features, candidate)
            assert relative_error(y, exact) < 1.5 * torch.finfo(BF16).eps, candidate


@pytest.fixture
def without_triton(
    cuda_backend: backend.CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> backend.CudaBackend:
    """Beside the library's calls thin products are always the fastest at few rows."""
    monkeypatch.setattr(backend, "rest_of", lambda device, dtype: TorchBackend())
    return cuda_backend


def test_a_served_layer_decodes_few_rows_and_leaves_the_rest(
    without_triton: backend.CudaBackend,
) -> None:
    torch.manual_seed(1)
    plain = mk.MPOLinear.from_linear(torch.nn.Linear(64, 96), MPOShape((8, 8), (8, 12), 8)).to(BF16)
    exact = copy.deepcopy(plain).double().to_linear()
    with mk.use_backend("cuda"):
        # As cores are trained they do not lie as the kernel reads them.
        assert plain.plan(1).algorithm != "decode"
        layer = plain.merged(1)
        assert layer.plan(1).algorithm == "decode"
        assert "decode" in str(layer.plan(1)) and "blocks" in str(layer.plan(1))
        assert layer.plan(17).algorithm != "decode"
        assert layer.plan(1, backward=True).algorithm != "decode"
        for size in [(64,), (1, 64), (2, 3, 64), (17, 64), (0, 64), (2, 0, 64)]:
            x = torch.randn(size, dtype=BF16, requires_grad=True)
            y = layer(x)
            assert y.shape == (*size[:-1], 96) and y.dtype == BF16
            y.sum().backward()
            assert x.grad.shape == x.shape
            if x.numel():
                assert relative_error(y, exact(x.double())) < 2 * torch.finfo(BF16).eps
        full = copy.deepcopy(layer).float()
        x = torch.randn(1, 64)
        assert relative_error(full(x), exact(x.double())) < 1e-6
        with pytest.raises(ValueError, match="expected the 2 rows of the plan, got 3"):
            without_triton.linear(
                torch.randn(3, 64).to(BF16), list(layer.cores), layer.bias, 96, layer.plan(2)
            )


@pytest.mark.parametrize(
    "shape", [MPOShape((2, 4, 4, 4), (4, 4, 4, 2), 8), MPOShape.low_rank(128, 128, 16)]
)
def test_serving_merges_and_lays_out_once(
    without_triton: backend.CudaBackend, shape: MPOShape
) -> None:
    layer = mk.MPOLinear(128, 128, shape, dtype=BF16)
    with mk.use_backend("cuda"), torch.no_grad():
        served = layer.merged(1)
        assert served.plan(1).algorithm == "decode"
        assert 2 <= len(served.cores) <= 3
        x = torch.randn(1, 128).to(BF16)
        exact = copy.deepcopy(layer).double().to_linear()(x.double())
        # What is loaded, copied or moved lies as before.
        loaded = copy.deepcopy(served)
        loaded.load_state_dict(served.state_dict())
        for module in (served, loaded, served.to(torch.float32).to(BF16)):
            assert module.plan(1).algorithm == "decode"
            assert relative_error(module(x), exact) < 2 * torch.finfo(BF16).eps
        in_bytes = served.quantized()
        # Loaded from a file, bytes lie in no such way.
        plain = copy.deepcopy(in_bytes)
        for k, codes in enumerate(plain.codes):
            plain.register_buffer(f"int8_core_{k}", codes.contiguous())
        again = plain.merged(1)
        assert torch.equal(again(x), in_bytes(x))
        for module in (in_bytes, copy.deepcopy(in_bytes), in_bytes.to(BF16), again):
            assert module.plan(1).algorithm == "decode"
            assert module.plan(1).bytes < served.plan(1).bytes
            for rows, dtype in ((17, BF16), (1, torch.float32)):
                assert module.plan(rows, dtype).algorithm != "decode"


def test_compiled_and_traced_calls_see_an_operator(cuda_backend: backend.CudaBackend) -> None:
    layer = mk.MPOLinear(64, 64, MPOShape((8, 8), (8, 8), 8), dtype=BF16).requires_grad_(False)
    x = torch.randn(2, 64).to(BF16)
    with mk.use_backend("cuda"):
        layer = layer.merged(2).requires_grad_(False)
        eager = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
        program = torch.export.export(layer, (x,))
        assert torch.equal(eager, compiled) and torch.equal(eager, program.module()(x))
        assert any("mpo_kernels.linear" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [MPOShape((8, 9), (6, 8), 8), MPOShape((4, 3, 4), (3, 4, 5), 6)])
def test_a_quantised_layer(
    cuda_backend: backend.CudaBackend,
    shape: MPOShape,
    stored: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = mk.MPOLinear(shape.in_features, shape.out_features, shape, dtype=BF16)
    for core in layer.cores:
        core.data = thin.laid_out(core.data, True)
    served = layer.quantized(stored)
    widened = mk.MPOLinear(shape.in_features, shape.out_features, shape)
    for core, bytes_, scale in zip(
        widened.cores, served.cores, [*served.scales, torch.ones(1)], strict=True
    ):
        core.data = bytes_.float() * scale
    widened.bias.data = layer.bias.float().detach()
    calls = []
    monkeypatch.setattr(backend, "decode", lambda *a: calls.append(len(a[0])) or decode.decode(*a))
    for rows in (1, 3, 17):
        x = torch.randn(rows, shape.in_features).to(BF16)
        with mk.use_backend("cuda"):
            y = served(x)
        exact = widened.to_linear().double()(x.double())
        # At seventeen rows the cores are rounded to bf16 first.
        assert relative_error(y, exact) < 3 * torch.finfo(BF16).eps
    assert calls == [1, 3]


def test_bytes_are_widened_where_that_is_faster(
    cuda_backend: backend.CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = mk.MPOLinear(72, 48, MPOShape((8, 9), (6, 8), 8), dtype=BF16)
    for core in layer.cores:
        core.data = thin.laid_out(core.data, True)
    served, x = layer.quantized(), torch.randn(2, 72).to(BF16)
    with mk.use_backend("cuda"):
        expected = served(x)
        backend._plan.cache_clear()
        monkeypatch.setattr(backend, "_time", lambda *_: 1.0)
        monkeypatch.setattr(backend, "decode", None)
        assert served.plan(2).algorithm != "decode"
        assert relative_error(served(x), expected.double()) < 3 * torch.finfo(BF16).eps


def test_gradients_are_left_to_the_others(cuda_backend: backend.CudaBackend) -> None:
    shape = MPOShape((4, 8), (8, 4), 8)
    cores = random_cores(shape, BF16, torch.get_default_device())
    x, grad = torch.randn(2, 32).to(BF16), torch.randn(2, 32).to(BF16)
    dx, _ = cuda_backend.linear_backward(grad, x, cores, Gradients(True, (True, True)))
    weight = mk.reconstruct([c.double() for c in cores])
    assert relative_error(dx, grad.double() @ weight) < 2 * torch.finfo(BF16).eps
    ids = torch.tensor([0, 31, 7])
    rows = cuda_backend.embedding(ids, cores, 32)
    assert relative_error(rows, weight.t()[ids]) < 2 * torch.finfo(BF16).eps
    needs = (True, True)
    grads = cuda_backend.embedding_backward(torch.ones(3, 32).to(BF16), ids, cores, needs)
    assert all(g.shape == c.shape for g, c in zip(grads, cores, strict=True))


def test_a_view_negated_on_reading(without_triton: backend.CudaBackend) -> None:
    layer = mk.MPOLinear(64, 64, MPOShape((8, 8), (8, 8), 8), dtype=BF16)
    x = torch.randn(2, 64).to(BF16)
    with mk.use_backend("cuda"):
        layer = layer.merged(2).requires_grad_(False)
        assert layer.plan(2).algorithm == "decode"
        torch.set_default_device(None)  # a mode: with it every call goes by the dispatcher
        assert torch.equal(layer(torch._neg_view(x)), layer(-x))


def test_a_core_past_2_31_is_left_to_the_others(cuda_backend: backend.CudaBackend) -> None:
    shape = MPOShape((4, 8), (8, 4), 8)
    cores = random_cores(shape, BF16, torch.get_default_device())
    wide = torch.empty(0, dtype=BF16, device="meta").new_empty_strided(
        (1, 4, 8, 8), (1, 1, 2**30, 4)
    )
    plan = cuda_backend.plan_for(1, BF16, cores[0].device, [wide, cores[1]], features=(32, 32))
    assert "decode" not in {p.algorithm for p in plan.candidates}


def test_a_quantised_state_says_how_its_bytes_are_read() -> None:
    layer = mk.MPOLinear(12, 8, MPOShape((3, 4), (4, 2), 3))
    as_int8, as_float8 = layer.quantized(torch.int8), layer.quantized(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"Missing key[\s\S]*float8_e4m3fn_core_0"):
        as_float8.load_state_dict(as_int8.state_dict())
    other = mk.MPOLinear(12, 8, MPOShape((3, 4), (4, 2), 3)).quantized(torch.int8)
    other.load_state_dict(as_int8.state_dict())
    x = torch.randn(2, 12)
    assert torch.equal(other(x), as_int8(x))
    for module in (copy.deepcopy(as_int8), as_int8.bfloat16().float()):
        assert torch.equal(module.scales[0], other.scales[0])
        assert torch.equal(module.cores[0], other.cores[0])


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_small_weights_survive_being_widened_to_fp16(size: float) -> None:
    layer = mk.MPOLinear.from_linear(torch.nn.Linear(64, 64, bias=False), MPOShape((8, 8), (8, 8)))
    for core in layer.cores:
        core.data *= size**0.5
    x = torch.randn(4, 64)
    error = relative_error(layer.quantized(torch.int8)(x.half()), layer(x).double())
    assert error < 0.02


def test_refusals_of_quantised_layers() -> None:
    layer = mk.MPOLinear(12, 8, MPOShape((3, 4), (4, 2), 3))
    with pytest.raises(ValueError, match=r"expected a dtype of .*int8.*got torch.int4"):
        layer.quantized(torch.int4)
    with pytest.raises(ValueError, match="expected a layer of two cores"):
        mk.MPOLinear(12, 8, MPOShape((12,), (8,))).quantized()
    served, x = layer.quantized(), torch.randn(1, 12)
    with pytest.raises(ValueError, match=r"expected cores of 16 bits or more, got torch\.int8"):
        served.quantized()
    operator = torch.ops.mpo_kernels.quantized_linear
    for cores, scales, bias in (
        (served.cores, [s.half() for s in served.scales], None),
        (served.cores, [torch.ones(2)], None),
        (served.cores, served.scales, torch.ones(3)),
        (served.cores, served.scales, torch.ones(8).half()),
    ):
        with pytest.raises(TypeError, match="expected"):
            operator(x, cores, scales, bias, 8)
    layer.cores[0].data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf in core 0"):
        layer.quantized()


class TestAbsent:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for function in (extension.unavailable, extension.unsupported, extension.loaded):
            function.cache_clear()

    @pytest.fixture(autouse=True)
    def forgotten(self) -> object:
        yield
        for function in (extension.unavailable, extension.unsupported, extension.loaded):
            function.cache_clear()

    def importing(self, monkeypatch: pytest.MonkeyPatch, result: object) -> None:
        def found(name: str) -> object:
            assert name == "mpo_kernels._cuda"
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(extension, "import_module", found)

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (ModuleNotFoundError(), "were not built; install .*MPO_KERNELS_BUILD_CUDA=1"),
            (ImportError("undefined symbol"), "cannot be loaded .undefined symbol.; install"),
            (SimpleNamespace(INTERFACE=99), "another version .*interface 99, expected 2.; install"),
        ],
    )
    def test_it_says_why_and_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch, result: object, message: str
    ) -> None:
        self.importing(monkeypatch, result)
        with pytest.raises(RuntimeError, match=message):
            extension.load()
        with pytest.raises(ValueError, match=f"cuda back end cannot be used: .*{message}"):
            mk.use_backend("cuda").__enter__()
        assert not mk.available_backends()["cuda"][0]

    def test_a_library_without_code_for_the_device_is_not_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def limits(index: int) -> None:
            raise RuntimeError("architecture: no code for it in this library: no kernel image")

        module = SimpleNamespace(INTERFACE=extension.INTERFACE, limits=limits)
        self.importing(monkeypatch, module)
        extension.limits.cache_clear()
        reason = extension.unsupported(torch.device("cuda", 0))
        assert reason.startswith("architecture: no code for it") and "MPO_KERNELS_BUILD" in reason

    def test_a_device_without_an_index_is_the_current_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        module = SimpleNamespace(INTERFACE=extension.INTERFACE, limits=asked.append)
        self.importing(monkeypatch, module)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        extension.limits.cache_clear()
        extension.limits(torch.device("cuda"))
        extension.limits(torch.device("cuda", 1))
        extension.limits.cache_clear()
        assert asked == [3, 1]

    def test_old_devices_and_others_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = SimpleNamespace(INTERFACE=extension.INTERFACE, limits=lambda index: (75, 40))
        self.importing(monkeypatch, module)
        extension.limits.cache_clear()
        reason = extension.unsupported(torch.device("cuda", 0))
        assert reason == "the kernels need compute capability 8.0, not that of sm_75"
        assert (
            extension.unsupported(torch.device("cpu")) == "the kernels need a CUDA device, not cpu"
        )
        extension.limits.cache_clear()
