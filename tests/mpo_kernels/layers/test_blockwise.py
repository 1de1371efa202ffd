"""Layers with a quantised centre: codes, panels against autograd through a plain layer, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mpo_kernels import MPOEmbedding, MPOLinear, MPOShape
from mpo_kernels.layers import blockwise
from mpo_kernels.layers.blockwise import (
    NF4,
    BlockwiseEmbedding,
    BlockwiseLinear,
    dequantize_rows,
    quantize_rows,
)
from mpo_kernels.testing import ODD_SHAPES

SHAPES = [shape for shape in ODD_SHAPES if shape.num_cores > 1]


@pytest.fixture(autouse=True, params=[7, 2**18], ids=["small panels", "one panel"])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "PANEL", request.param)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
class TestCodes:
    def test_eight_bits_are_off_by_half_a_step(self, columns: int) -> None:
        matrix = torch.randn(5, columns)
        codes, scales = quantize_rows(matrix, 8)
        assert codes.dtype == torch.int8 and codes.numel() == 5 * 64 * -(-columns // 64)
        found = dequantize_rows(codes, scales, columns, torch.float32)
        for start in range(0, columns, 64):
            block = matrix[:, start : start + 64]
            steps = block.abs().amax(1, keepdim=True) / 127
            assert ((found[:, start : start + 64] - block).abs() <= 0.5001 * steps).all()

    def test_four_bits_are_the_nearest_of_sixteen(self, columns: int) -> None:
        matrix = torch.randn(5, columns)
        codes, scales = quantize_rows(matrix, 4)
        assert codes.dtype == torch.uint8 and codes.numel() == 5 * 32 * -(-columns // 64)
        found = dequantize_rows(codes, scales, columns, torch.float32)
        for start in range(0, columns, 64):
            block = matrix[:, start : start + 64]
            largest = block.abs().amax(1, keepdim=True)
            near = (block / largest)[..., None].sub(torch.tensor(NF4)).abs().min(2)
            exact = torch.tensor(NF4)[near.indices] * largest
            torch.testing.assert_close(found[:, start : start + 64], exact)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_codes_of_what_codes_stand_for_are_the_same(self, columns: int, bits: int) -> None:
        codes, scales = quantize_rows(torch.randn(5, columns), bits)
        again = quantize_rows(dequantize_rows(codes, scales, columns, torch.float32), bits)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
        zeros = dequantize_rows(
            *quantize_rows(torch.zeros(5, columns), bits), columns, torch.float32
        )
        assert not zeros.any()


def reference(layer: nn.Module, given: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients by autograd through the plain layer with the values of the codes."""
    plain = layer.dequantized().double()
    plain.requires_grad_(True)
    given = given.double().requires_grad_() if given.is_floating_point() else given
    y = plain(given)
    y.backward(grad.double())
    cores = [core.grad for k, core in enumerate(plain.cores) if k != plain.central]
    bias = getattr(plain, "bias", None)
    ends = [None if bias is None else bias.grad, given.grad]
    return y.detach(), [*cores, *ends]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestLayers:
    def test_linear(self, shape: MPOShape, bits: int) -> None:
        layer = MPOLinear(shape.in_features, shape.out_features, shape)
        light = BlockwiseLinear(copy.deepcopy(layer), bits)
        x = torch.randn(2, 3, shape.in_features, requires_grad=True)
        grad = torch.randn(2, 3, shape.out_features)
        y = light(x)
        y.backward(grad)
        exact, gradients = reference(copy.deepcopy(light), x.detach(), grad)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
        found = [*(core.grad for core in light.auxiliary), light.bias.grad, x.grad]
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)
        whole = layer(x).detach()
        assert float((y - whole).norm() / whole.norm()) < (0.2 if bits == 4 else 0.02)

    def test_embedding(self, shape: MPOShape, bits: int) -> None:
        layer = MPOEmbedding(shape.in_features, shape.out_features, shape, padding_idx=1)
        light = BlockwiseEmbedding(layer, bits)
        ids = torch.randint(0, shape.in_features, (2, 5))
        grad = torch.randn(2, 5, shape.out_features)
        rows = light(ids)
        rows.backward(grad)
        exact, gradients = reference(copy.deepcopy(light), ids, grad)
        torch.testing.assert_close(rows.double(), exact, rtol=1e-4, atol=1e-5)
        for one, other in zip(light.auxiliary, gradients[: len(light.auxiliary)], strict=True):
            torch.testing.assert_close(one.grad.double(), other, rtol=1e-3, atol=1e-4)

    def test_only_what_trains_has_a_gradient(self, shape: MPOShape, bits: int) -> None:
        light = BlockwiseLinear(MPOLinear(shape.in_features, shape.out_features, shape), bits)
        light.auxiliary[0].requires_grad_(False)
        x = torch.randn(4, shape.in_features)
        light(x).sum().backward()
        assert light.auxiliary[0].grad is None and light.bias.grad is not None
        with torch.no_grad():
            assert not light(x).requires_grad


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_and_what_is_saved_for_backward(bits: int) -> None:
    shape = MPOShape.balanced(128, 128, 5)
    layer = MPOLinear(128, 128, shape, dtype=torch.float32)
    centre = layer.cores[layer.central].numel()
    light = BlockwiseLinear(layer, bits)
    held = light.codes.nbytes + light.scales.nbytes
    assert held <= centre * (bits / 8 + 4 / 64) * 1.1
    x = torch.randn(10, 128, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        light(x)
    kept = x.numel() + sum(core.numel() for core in light.auxiliary)
    assert sum(t.numel() for t in saved) <= kept + 128


def test_autocast_and_casts() -> None:
    shape = MPOShape((4, 3), (3, 4), 6)
    light = BlockwiseLinear(MPOLinear(12, 12, shape), 8)
    x = torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = light(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == light.auxiliary[0].grad.dtype == torch.float32
    half = copy.deepcopy(light).bfloat16()
    assert torch.equal(half.scales, light.scales) and torch.equal(half.codes, light.codes)
    assert half(x.detach().bfloat16()).dtype == torch.bfloat16
    restored = BlockwiseLinear(MPOLinear(12, 12, shape), 8)
    restored.load_state_dict(light.state_dict())
    assert torch.equal(restored(x), light(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_state_of_a_plain_layer_loads(bits: int) -> None:
    layer = MPOLinear(12, 20, MPOShape((4, 3), (4, 5), 6))
    light, other = (BlockwiseLinear(copy.deepcopy(layer), bits) for _ in range(2))
    with torch.no_grad():
        for parameter in light.parameters():
            parameter.add_(1)
    x = torch.randn(5, 12)
    other.load_state_dict(light.dequantized().state_dict())
    assert torch.equal(other(x), light(x))
    wide = MPOLinear(12, 20, MPOShape((4, 3), (4, 5), 9))
    with pytest.raises(RuntimeError, match=r"size mismatch for auxiliary\.0"):
        other.load_state_dict(wide.state_dict(), strict=False)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 3"):
        BlockwiseLinear(MPOLinear(12, 12, MPOShape((4, 3), (3, 4))), 3)
    with pytest.raises(ValueError, match="expected a layer of two cores"):
        BlockwiseLinear(MPOLinear(12, 12, MPOShape((12,), (12,))), 4)
    layer = MPOLinear(12, 12, MPOShape((4, 3), (3, 4)))
    layer.cores[layer.central].data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        BlockwiseLinear(layer, 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [BlockwiseLinear, BlockwiseEmbedding])
class TestOnADevice:
    """What a compiler and a graph's capture ask of a step, forward and backward."""

    @pytest.fixture(autouse=True, params=[150])
    def panel(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some panels, and not too many to trace."""
        monkeypatch.setattr(blockwise, "PANEL", request.param)

    @pytest.fixture
    def layer(self, kind: type, bits: int) -> blockwise.BlockwiseLayer:
        shape = MPOShape((2, 3, 4), (5, 3, 2), 4, in_features=23, out_features=29)
        plain = MPOLinear if kind is BlockwiseLinear else MPOEmbedding
        layer = kind(plain(23, 29, shape), bits)
        assert len(list(layer.panels(tuple(layer.auxiliary)))) == 2
        return layer

    @staticmethod
    def inputs(kind: type, rows: int, device: str = "cpu") -> Tensor:
        if kind is BlockwiseLinear:
            return torch.randn(rows, 23, device=device).requires_grad_()
        return torch.randint(23, (rows,), device=device)

    def test_compiles_as_one_graph(self, layer: blockwise.BlockwiseLayer, kind: type) -> None:
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 5):
            x, dy = self.inputs(kind, rows), torch.randn(rows, 29)
            wanted = [p for p in (*layer.parameters(), x) if p.requires_grad]
            # Compiled first: nothing may wait for an eager call to compute it.
            got = torch.autograd.grad(compiled(x), wanted, dy)
            for one, other in zip(got, torch.autograd.grad(layer(x), wanted, dy), strict=True):
                torch.testing.assert_close(one, other)

    def test_no_value_is_read(self, layer: blockwise.BlockwiseLayer, kind: type) -> None:
        x = self.inputs(kind, 3, "meta")  # which has none
        layer.to("meta")
        layer(x).sum().backward()
        assert all(core.grad.shape == core.shape for core in layer.auxiliary)

    def test_a_moved_layer_knows_its_levels(
        self, layer: blockwise.BlockwiseLayer, kind: type
    ) -> None:
        expected = layer.centre()
        state, twin = layer.state_dict(), copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        twin.load_state_dict(state)
        assert torch.equal(twin.centre(), expected)
        assert torch.equal(layer.bfloat16().centre(), expected)
