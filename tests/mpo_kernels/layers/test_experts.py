"""MPOExperts: against each expert's dense matrix in fp64, by the kernel and by the loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOShape
from mpo_kernels.layers.experts import MPOExperts
from mpo_kernels.ops import grouped

SHAPES = {
    "low rank": MPOShape.low_rank(24, 40, 8),
    "odd": MPOShape.low_rank(7, 11, 3),
    "transposed": MPOShape((24, 1), (1, 40), 8),
    "skewed": MPOShape.skewed(21, 10, 2, 5, 9),
    "five": MPOShape.balanced(24, 36, 5),
    "padded": MPOShape((2, 2, 3), (3, 2, 2), 5, in_features=11, out_features=10),
    "one core": MPOShape((6,), (8,)),
}
# One without rows at either end and between, one with a single row.
COUNTS = (0, 5, 0, 1, 3, 0)


def _offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


def _layer(
    shape: MPOShape, dtype: torch.dtype = torch.float64, shared: int | None = None
) -> MPOExperts:
    torch.manual_seed(0)
    return MPOExperts(len(COUNTS), shape, shared, dtype=dtype)


def _dense(x: Tensor, layer: MPOExperts, counts: tuple[int, ...] = COUNTS) -> Tensor:
    """By einsum of each expert's cores, which autograd differentiates."""
    shape, rows = layer.shape, []
    for e, part in enumerate(x.split(counts)):
        whole, *others = (core if core.dim() == 4 else core[e] for core in layer.cores)
        for core in others:
            whole = torch.einsum("aijb,bklc->aikjlc", whole, core).flatten(3, 4).flatten(1, 2)
        rows.append(part @ whole[0, : shape.in_features, : shape.out_features, 0])
    return torch.cat(rows)


def _stand_in(x: Tensor, other: Tensor, *, offs: Tensor) -> Tensor:
    """What torch's kernel computes, of any dtype and sizes."""
    bounds = [0, *offs.tolist()]
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    if other.dim() == 3:
        return torch.cat([x[part] @ w for part, w in zip(parts, other, strict=True)])
    return torch.stack([x[:, part] @ other[part] for part in parts])


@pytest.fixture(params=["by expert", "grouped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "grouped":
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", _stand_in, raising=False)
        monkeypatch.setattr(grouped, "_has_kernel", lambda *operands: True)
        monkeypatch.setattr(grouped, "is_compiling", lambda: True)
    return request.param


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("shared", [None, 0, -1], ids=["own cores", "first shared", "last shared"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_dense_matrix_of_each_expert(
    shape: MPOShape, shared: int | None, counts: tuple[int, ...], way: str
) -> None:
    layer = _layer(shape, shared=shared if shared is None else shared % shape.num_cores)
    assert layer.cores[shared or 0].dim() == (5 if shared is None else 4)
    x = torch.randn(sum(counts), shape.in_features, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.cores]
    found, right = layer(x, _offsets(counts)), _dense(x, layer, counts)
    torch.testing.assert_close(found, right)
    flow = torch.randn_like(right)
    grads = zip(*(torch.autograd.grad(y, wanted, flow) for y in (found, right)), strict=True)
    for grad, expected in grads:
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("shared", [None, 1, 4])
@pytest.mark.parametrize("rows", [1, 1000])
def test_few_rows_and_many_merge_otherwise_and_agree(
    rows: int, shared: int | None, way: str
) -> None:
    shape = SHAPES["five"]
    assert len({grouped._plan(shape.core_shapes, 6, n).split for n in (1, 1024)}) == 2
    layer, counts = _layer(shape, shared=shared), (0, 0, rows, 0, 0, 0)
    x = torch.randn(rows, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, _offsets(counts)), _dense(x, layer, counts))


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch's kernel is not used before")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_kernel_is_the_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(SHAPES["low rank"], dtype)
    x, dense = torch.randn(9, 24, dtype=dtype, requires_grad=True), torch.randn(6, 24, 16)
    found = []
    for is_there in (False, True):
        monkeypatch.setattr(grouped, "_has_kernel", lambda *_, there=is_there: there)
        y = layer(x, _offsets(COUNTS))
        grads = torch.autograd.grad(y.sum(), [x, *layer.cores])
        found.append((y, *grads, grouped.grouped_mm(x, dense.to(dtype), _offsets(COUNTS))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_when_a_chain_is_grouped() -> None:
    cheap = [grouped._plan(SHAPES[name].core_shapes, 6, 64).is_cheap for name in ("odd", "five")]
    assert cheap == [True, False]
    bits = torch.empty(1, dtype=torch.bfloat16)
    assert not grouped._has_kernel(bits, [8])  # on a CPU it is a loop itself
    assert not grouped._has_kernel(bits.float(), [8])


@pytest.mark.parametrize(("name", "dtype"), [("low rank", torch.bfloat16), ("odd", torch.float32)])
def test_compiled_it_is_one_graph(name: str, dtype: torch.dtype) -> None:
    layer, offsets = _layer(SHAPES[name], dtype), _offsets(COUNTS)
    x = torch.randn(9, layer.in_features, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, right = compiled(x, offsets), layer(x, offsets)
    torch.testing.assert_close(found, right)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.cores)) for y in (found, right)]
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected)


def test_autocast_computes_in_its_dtype() -> None:
    layer = _layer(SHAPES["odd"], torch.float32)
    x = torch.randn(9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, _offsets(COUNTS))
    assert found.dtype == torch.bfloat16
    right = layer.bfloat16()(x.bfloat16(), _offsets(COUNTS))
    torch.testing.assert_close(found, right)


def test_bad_input() -> None:
    layer, x = _layer(SHAPES["odd"]), torch.randn(9, 7, dtype=torch.float64)
    offsets = _offsets(COUNTS)
    for bad, ends, error, line in (
        (x[:, :6], offsets, ValueError, r"expected x \[..., 7\], got \[9, 6\]"),
        (x[None], offsets, ValueError, r"expected rows \[rows, 7\], got \[1, 9, 7\]"),
        (x.float(), offsets, TypeError, "expected cores like x, torch.float32"),
        (x, offsets.long(), ValueError, r"expected int32 offsets \[6\], got torch.int64 \[6\]"),
        (x, offsets[:5], ValueError, r"expected int32 offsets \[6\], got torch.int32 \[5\]"),
    ):
        with pytest.raises(error, match=line):
            layer(bad, ends)
    with pytest.raises(ValueError, match="expected at least one expert, got 0"):
        MPOExperts(0, SHAPES["odd"])
    with pytest.raises(ValueError, match="shared: expected one of 2 cores, got 2"):
        MPOExperts(3, SHAPES["odd"], shared=2)


def test_its_parts_in_a_model() -> None:
    layer = _layer(SHAPES["five"])
    weight = layer.to_weight()
    assert weight.shape == layer.weight.shape == (6, 36, 24)
    layer.balance()
    torch.testing.assert_close(layer.to_weight(), weight)
    layer.freeze_central()
    trained = [core.requires_grad for core in layer.cores]
    assert trained == [k != layer.central for k in range(5)]
    one = _layer(SHAPES["five"], shared=2)
    assert one.to_weight().shape == (6, 36, 24)
    with pytest.raises(ValueError, match="cores of their own"):
        one.balance()
    with pytest.raises(NotImplementedError, match=r"MPOExperts \[6, 36, 24\]: held as cores"):
        layer.weight.float()


@pytest.mark.parametrize("shape", [SHAPES["low rank"], MPOShape.low_rank(40, 24, 8)])
@pytest.mark.parametrize("shared", [0, 1])
def test_with_one_in_common_the_centre_holds_most(shape: MPOShape, shared: int) -> None:
    layer = _layer(shape, shared=shared)
    assert layer.central == 1 - shared
    layer.freeze_central()
    trained = [core.requires_grad for core in layer.cores]
    assert trained[shared] and sum(trained) == 1
    assert 2 * layer.cores[shared].numel() < layer.cores[1 - shared].numel()


def test_a_core_in_common_may_be_the_centre() -> None:
    assert _layer(MPOShape.balanced(256, 256, 5), shared=2).central == 2


def test_a_state_of_other_ranks_is_loaded_and_of_other_experts_refused() -> None:
    layer, small = _layer(SHAPES["low rank"]), _layer(MPOShape.low_rank(24, 40, 3))
    small.load_state_dict(layer.state_dict())
    assert small.shape == layer.shape and torch.equal(small.cores[0], layer.cores[0])
    shared = _layer(SHAPES["low rank"], shared=1)
    one = _layer(MPOShape.low_rank(24, 40, 3), shared=1)
    one.load_state_dict(shared.state_dict())
    assert torch.equal(one.cores[1], shared.cores[1])
    with pytest.raises(RuntimeError, match="expected cores of 6 experts"):
        layer.load_state_dict(shared.state_dict())
    with pytest.raises(RuntimeError, match="expected cores of 5 experts"):
        MPOExperts(5, layer.shape, dtype=torch.float64).load_state_dict(layer.state_dict())
