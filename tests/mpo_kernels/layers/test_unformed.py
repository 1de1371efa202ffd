"""What stands in for the weight, and layers of what is no plain tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from mpo_kernels import MPOEmbedding, MPOLinear, MPOShape, mpo_embedding, mpo_linear
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLinear

LINEAR = MPOShape((3, 4), (5, 2), 4, in_features=11)
TABLE = MPOShape((3, 4), (5, 2), 4, in_features=11)


def linear() -> MPOLinear:
    return MPOLinear(11, 10, LINEAR)


def table() -> MPOEmbedding:
    return MPOEmbedding(11, 10, TABLE)


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "tied": lambda: MPOEmbedding(10, 11, MPOShape((5, 2), (3, 4), 4, out_features=11)).as_linear(),
    "blockwise": lambda: BlockwiseLinear(linear(), 8),
    "quantised": lambda: linear().quantized(),
}
TABLES: dict[str, Callable[[], nn.Module]] = {
    "table": table,
    "blockwise table": lambda: BlockwiseEmbedding(table(), 4),
}
LAYERS = {**LINEARS, **TABLES}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return LAYERS[request.param]()


def test_the_weight_tells_what_a_dense_one_would(layer: nn.Module) -> None:
    weight, is_linear = layer.weight, hasattr(layer, "in_features")
    assert weight.shape == weight.size() == ((10, 11) if is_linear else (11, 10))
    assert (weight.dim(), weight.ndim, weight.numel(), len(weight)) == (2, 2, 110, weight.size(0))
    assert isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
    assert weight.device == torch.device("cpu")
    assert not weight.is_meta and not weight.is_cuda and weight.grad is None
    assert f"{list(weight.shape)}" in repr(weight)
    x = torch.ones(2, dtype=torch.int32)
    assert x.to(weight).dtype == x.type_as(weight).dtype == weight.dtype


def test_the_weight_follows_the_cores() -> None:
    layer = linear()
    assert layer.weight.requires_grad
    layer.freeze_central()
    assert layer.weight.requires_grad
    assert not layer.requires_grad_(False).weight.requires_grad
    assert layer.half().weight.dtype == torch.half and layer.weight.nbytes == 220
    assert layer.to("meta").weight.is_meta


COMPUTED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "linear": lambda layer, x: F.linear(x, layer.weight),
    "matmul": lambda layer, x: x @ layer.weight.t(),
    "right": lambda layer, x: layer.weight @ x,
    "addmm": lambda layer, x: torch.addmm(x, x, layer.weight),
    "embedding": lambda layer, x: F.embedding(torch.tensor([1]), layer.weight),
    "einsum": lambda layer, x: torch.einsum("bi,oi->bo", x, layer.weight),
    "operator": lambda layer, x: torch.ops.aten.mm(x, layer.weight),
    "out": lambda layer, x: torch.add(x, x, out=layer.weight),
    "index": lambda layer, x: layer.weight[0],
    "cat": lambda layer, x: torch.cat([x, layer.weight]),
    "data": lambda layer, x: layer.weight.data,
    "detach": lambda layer, x: layer.weight.detach(),
    "cast": lambda layer, x: layer.weight.to(torch.float64),
    "numpy": lambda layer, x: layer.weight.numpy(),
    "list": lambda layer, x: layer.weight.tolist(),
    "pointer": lambda layer, x: layer.weight.data_ptr(),
    "copy": lambda layer, x: x.copy_(layer.weight),
    "deepcopy": lambda layer, x: copy.deepcopy(layer.weight),
    "parameter": lambda layer, x: nn.Parameter(layer.weight),
    "norm": lambda layer, x: torch.linalg.norm(layer.weight),
    "comparison": lambda layer, x: layer.weight == 0,
    "like": lambda layer, x: torch.zeros_like(layer.weight),
    "in place": lambda layer, x: layer.weight.mul_(2),
    "initialised": lambda layer, x: nn.init.normal_(layer.weight),
    "item set": lambda layer, x: layer.weight.__setitem__(0, 1.0),
    "data set": lambda layer, x: setattr(layer.weight, "data", x),
    "gradient set": lambda layer, x: setattr(layer.weight, "grad", x),
    "frozen": lambda layer, x: layer.weight.requires_grad_(False),
    "frozen by name": lambda layer, x: setattr(layer.weight, "requires_grad", False),
    "replaced": lambda layer, x: setattr(layer, "weight", nn.Parameter(x)),
    "replaced by a tensor": lambda layer, x: setattr(layer, "weight", x),
    "trained": lambda layer, x: torch.optim.SGD([layer.weight], 0.1),
    "pruned": lambda layer, x: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_what_reads_or_writes_the_weight_is_refused(layer: nn.Module, compute: Callable) -> None:
    layer.label = "model.proj"
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((RuntimeError, TypeError), match=r"model\.proj, \w+ \[1\d, 1\d\]: held as"):
        compute(layer, torch.ones(11, 11))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


class Reader(nn.Module):
    """Asks for a weight's dtype, and computes with it where told to."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = linear(), reads

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer.weight, Tensor) and x.dtype != self.layer.weight.dtype:
            x = x.to(self.layer.weight.dtype)
        y = self.layer(x) * self.layer.weight.shape[0]
        return y + F.linear(x, self.layer.weight) if self.reads else y


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_code_may_ask_and_may_not_compute(fullgraph: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 11, dtype=torch.float64)
    asks = Reader(reads=False)
    compiled = torch.compile(asks, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(x), asks(x))
    torch.testing.assert_close(torch.export.export(asks, (x,)).module()(x), asks(x))
    with pytest.raises(Exception, match=r"never formed|held as cores|Observed exception"):
        torch.compile(Reader(reads=True), fullgraph=fullgraph, backend="aot_eager")(x)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_code_is_told_what_eager_code_is(name: str) -> None:
    layer = LAYERS[name]()

    def told(x: Tensor) -> Tensor:
        weight = layer.weight
        is_here = weight.device.type == "cpu" and not weight.is_meta
        answers = (is_here, weight.requires_grad, *weight.shape, weight.dtype.itemsize)
        return x.to(weight.device) + sum(k * int(answer) for k, answer in enumerate(answers))

    torch._dynamo.reset()
    x = torch.zeros(3)
    torch.testing.assert_close(torch.compile(told, backend="aot_eager")(x), told(x))


def test_bytes_tell_that_they_are_bytes_and_eight_bits_are_refused() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        layer = linear().quantized(dtype)
        assert layer.weight.dtype == torch.int8
        with pytest.raises(TypeError, match=r"floating-point x, got torch\.float8"):
            layer(torch.randn(2, 11).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
class TestNested:
    @pytest.mark.parametrize("name", LINEARS)
    def test_a_layer_of_ragged_rows(self, name: str, layout: torch.layout) -> None:
        layer = LINEARS[name]()
        parts = [torch.randn(n, 11) for n in (3, 0, 5)]
        got = layer(torch.nested.nested_tensor(parts, layout=layout))
        assert got.is_nested and got.layout == layout
        for y, part in zip(got.unbind(), parts, strict=True):
            torch.testing.assert_close(y, layer(part))

    @pytest.mark.parametrize("name", TABLES)
    def test_a_table_of_ragged_ids(self, name: str, layout: torch.layout) -> None:
        layer = TABLES[name]()
        parts = [torch.randint(11, (n,)) for n in (3, 5)]
        got = layer(torch.nested.nested_tensor(parts, layout=layout))
        for y, part in zip(got.unbind(), parts, strict=True):
            torch.testing.assert_close(y, layer(part))

    def test_gradients_and_the_functions(self, layout: torch.layout) -> None:
        layer = linear()
        parts = [torch.randn(n, 11, requires_grad=True) for n in (3, 5)]
        nested = torch.nested.as_nested_tensor(parts, layout=layout)
        sum(y.square().sum() for y in layer(nested).unbind()).backward()
        got = [part.grad for part in parts] + [core.grad for core in layer.cores]
        for tensor in (*parts, *layer.parameters()):
            tensor.grad = None
        sum(layer(part).square().sum() for part in parts).backward()
        for mine, tensor in zip(got, (*parts, *layer.cores), strict=True):
            torch.testing.assert_close(mine, tensor.grad)
        cores = list(layer.cores)
        y = mpo_linear(nested, cores, layer.bias, in_features=11)
        torch.testing.assert_close(y.unbind()[1], layer(parts[1]))
        ids = torch.nested.nested_tensor([torch.tensor([3, 10]), torch.tensor([1])], layout=layout)
        rows = mpo_embedding(ids, cores, num_embeddings=11)
        torch.testing.assert_close(
            rows.unbind()[1], mpo_embedding(torch.tensor([1]), cores, num_embeddings=11)
        )

    def test_sums_with_what_is_ragged_alike(self, layout: torch.layout) -> None:
        layer = MPOLinear.from_linear(nn.Linear(6, 6))
        x = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 4)], layout=layout)
        got = x + layer(x)
        torch.testing.assert_close(got.unbind()[1], x.unbind()[1] + layer(x.unbind()[1]))

    def test_items_of_another_size(self, layout: torch.layout) -> None:
        wrong = torch.nested.nested_tensor([torch.randn(2, 7), torch.randn(1, 7)], layout=layout)
        with pytest.raises(ValueError, match=r"expected x \[\.\.\., 11\]"):
            linear()(wrong)


@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_of_torch_pads_as_with_dense_layers(nested: bool) -> None:
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        right = encoder(x, src_key_padding_mask=padding)
        for layer in encoder.layers:
            layer.linear1 = MPOLinear.from_linear(layer.linear1)
            layer.linear2 = MPOLinear.from_linear(layer.linear2)
        got = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], right[~padding], rtol=1e-4, atol=1e-5)


def test_torch_fx_takes_a_layer_as_a_leaf(layer: nn.Module) -> None:
    inputs = torch.randn(4, 11) if hasattr(layer, "in_features") else torch.randint(11, (4,))
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    torch.testing.assert_close(traced(inputs), layer(inputs).relu())
    assert set(dict(traced.named_parameters())) == {f"0.{k}" for k, _ in layer.named_parameters()}


def test_a_layer_is_not_traced_by_itself() -> None:
    with pytest.raises(TypeError, match=r"a leaf to torch\.fx: trace a module that holds it"):
        torch.fx.symbolic_trace(linear())


def test_what_is_on_another_device_is_not_taken_for_values(layer: nn.Module) -> None:
    inputs = torch.randn(4, 11) if hasattr(layer, "in_features") else torch.randint(11, (4,))
    with pytest.raises(TypeError, match="on meta"):
        copy.deepcopy(layer).to("meta")(inputs)
    with pytest.raises(TypeError, match="on meta"):
        layer(inputs.to("meta"))


def test_what_is_no_tensor(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        layer([1.0] * 11)
