"""MPOLinear and mpo_linear against the dense layer in fp64, odd shapes first."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo_kernels import MPOLinear, MPOShape, mpo_linear
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.layers.blockwise import BlockwiseLinear
from mpo_kernels.planning.plan import Gradients
from mpo_kernels.testing import ODD_SHAPES, dense_linear, random_cores, relative_error, tolerance

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(shape, lead, dtype, layout="contiguous"):
    def tensor(features):
        size = (*lead, features)
        if layout == "transposed":
            return (
                torch.randn(size[::-1], dtype=torch.float64)
                .to(dtype)
                .permute(*range(len(size))[::-1])
            )
        if layout == "sliced":
            return torch.randn(*lead, 2 * features + 1, dtype=torch.float64).to(dtype)[..., 1::2]
        if layout == "expanded":
            return torch.randn(features, dtype=torch.float64).to(dtype).expand(size)
        return torch.randn(size, dtype=torch.float64).to(dtype)

    return tensor(shape.in_features), tensor(shape.out_features)


def gradients(function, x, cores, bias, dy):
    """y and the gradients of x, bias and every core."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias, *cores)]
    y = function(leaves[0], leaves[2:], leaves[1])
    return [y, *torch.autograd.grad(y, leaves, dy)]


def errors(shape, lead, dtype, layout):
    """The worst relative error of ours, and of torch's own in this dtype, over y and gradients."""
    (x, dy), cores = inputs(shape, lead, dtype, layout), random_cores(shape, dtype)
    bias = torch.randn(shape.out_features).to(dtype)

    def ours(x, cores, bias):
        return mpo_linear(x, cores, bias, in_features=shape.in_features)

    def dense(x, cores, bias):
        return dense_linear(x, cores, bias, shape)

    def in_dtype(dtype, of=lambda t: t):
        inputs = (x, *cores, bias, dy)
        x_, *cores_, bias_, dy_ = [of(t).to(dtype) for t in inputs]
        return x_, cores_, bias_, dy_

    got = gradients(ours, x, cores, bias, dy)
    exact = gradients(dense, *in_dtype(torch.float64))
    scale = gradients(dense, *in_dtype(torch.float64, torch.abs))
    assert got[0].is_contiguous() and all(g.dtype == dtype for g in got)
    assert [g.shape for g in got] == [e.shape for e in exact]
    if dtype == torch.float64:
        # Nothing finer to compare with: what torch's own fp32 loses, in fp64's units.
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        same = gradients(dense, *in_dtype(torch.float32))
    else:
        unit, same = 1.0, gradients(dense, *in_dtype(dtype))
    return (
        max(map(relative_error, got, exact, scale)),
        unit * max(map(relative_error, same, exact, scale)),
    )


def assert_right(shape, lead, dtype, layout):
    """The worst error of three draws is within twice the worst of torch's own."""
    ours, torchs = zip(*(errors(shape, lead, dtype, layout) for _ in range(3)), strict=True)
    assert max(ours) <= tolerance(max(torchs), dtype, shape.num_cores)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_forward_and_gradients_on_odd_shapes(shape, dtype, layout):
    assert_right(shape, (3, 7), dtype, layout)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 5))
    factors = st.lists(st.integers(1, 5), min_size=n, max_size=n)
    ins, outs = draw(factors), draw(factors)
    shape = MPOShape(
        ins,
        outs,
        draw(st.none() | st.integers(1, 12)),
        in_features=math.prod(ins) - draw(st.integers(0, min(3, math.prod(ins) - 1))),
        out_features=math.prod(outs) - draw(st.integers(0, min(3, math.prod(outs) - 1))),
    )
    lead = draw(st.sampled_from([(), (1,), (2,), (17,), (2, 3), (1, 2, 2)]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    return shape, lead, draw(st.sampled_from(DTYPES)), layout


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(problems())
def test_any_shape_rank_dtype_and_layout(problem):
    assert_right(*problem)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_candidate_of_the_planner_is_right(shape):
    rows, n = 7, shape.num_cores
    cores = random_cores(shape, torch.float64)
    bias = torch.randn(shape.out_features, dtype=torch.float64)
    (x, dy) = inputs(shape, (rows,), torch.float64)
    leaves = [x.requires_grad_(), *[core.requires_grad_() for core in cores]]
    y = dense_linear(x, cores, bias, shape)
    exact = torch.autograd.grad(y, leaves, dy)
    device = torch.device("cpu")
    central = tuple(k != shape.central for k in range(n))
    with torch.no_grad():
        for plan in TorchBackend().plan_for(rows, x.dtype, device, cores).candidates:
            for block in {1, 2, plan.block}:
                cut = replace(plan, block=block)
                got = TorchBackend().linear(x, cores, bias, shape.out_features, cut)
                torch.testing.assert_close(got, y, msg=lambda m, p=cut: f"{p!r}\n{m}")
        for wanted in (
            Gradients(True, (True,) * n),
            Gradients(True, (False,) * n),
            Gradients(False, (True,) * n),
            Gradients(True, central),
            Gradients(False, (True,) + (False,) * (n - 1)),
            Gradients(False, (False,) * (n - 1) + (True,)),
        ):
            if not any((wanted.x, *wanted.cores)):
                continue
            for plan in TorchBackend().plan_for(rows, x.dtype, device, cores, wanted).candidates:
                for block in {1, 2, plan.block}:
                    cut = replace(plan, block=block)
                    dx, grads = TorchBackend().linear_backward(dy, x, cores, wanted, cut)
                    for got, want, need in zip(
                        (dx, *grads), exact, (wanted.x, *wanted.cores), strict=True
                    ):
                        assert (got is not None) == need
                        if need:
                            torch.testing.assert_close(
                                got, want, msg=lambda m, p=cut: f"{p!r}\n{m}"
                            )


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_drop_in_for_linear(shape):
    linear = torch.nn.Linear(shape.in_features, shape.out_features)
    layer = MPOLinear.from_linear(linear, shape.with_ranks(None))
    x = torch.randn(2, 3, shape.in_features)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.to_linear().weight, linear.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.to_linear().bias, linear.bias)
    assert layer.weight.shape == linear.weight.shape


def test_a_layer_without_bias_stays_without():
    layer = MPOLinear.from_linear(torch.nn.Linear(6, 8, bias=False))
    assert layer.bias is None and layer.to_linear().bias is None
    assert set(layer.state_dict()) == {f"cores.{k}" for k in range(5)}


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3), ()])
def test_empty_and_single_inputs(lead):
    layer = MPOLinear(6, 8, MPOShape((2, 3), (4, 2), 2))
    x = torch.randn(*lead, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*lead, 8) and x.grad.shape == x.shape
    if 0 in lead:
        assert all(torch.equal(c.grad, torch.zeros_like(c)) for c in layer.cores)


def test_a_new_layer_starts_like_linear():
    layer, linear = (
        MPOLinear(256, 192, MPOShape.balanced(256, 192, 3, 24)),
        torch.nn.Linear(256, 192),
    )
    assert layer.to_linear().weight.std().item() == pytest.approx(
        linear.weight.std().item(), rel=0.3
    )
    assert layer.bias.abs().max().item() <= 256**-0.5


def test_gradcheck_and_opcheck():
    shape = ODD_SHAPES[5]
    cores = random_cores(shape, torch.float64)
    x, bias = torch.randn(2, shape.in_features).double(), torch.randn(shape.out_features).double()
    leaves = [t.requires_grad_() for t in (x, bias, *cores)]
    assert torch.autograd.gradcheck(
        lambda x, b, *c: mpo_linear(x, c, b, in_features=shape.in_features), leaves, fast_mode=True
    )
    for trained in range(2):
        for core in cores[trained:]:
            core.requires_grad_(False)
        torch.library.opcheck(torch.ops.mpo_kernels.linear, (x, cores, bias, shape.out_features))


def test_differentiable_once_and_torch_says_so():
    layer = MPOLinear(6, 8, MPOShape((2, 3), (4, 2), 2))
    x = torch.randn(2, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_and_returns_its_dtype(dtype):
    shape = ODD_SHAPES[4]
    layer = MPOLinear(shape.in_features, shape.out_features, shape)
    x = torch.randn(5, shape.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        y.float().sum().backward()  # inside, where autocast is still on
    assert y.dtype == dtype and x.grad.dtype == torch.float32
    assert all(core.grad.dtype == torch.float32 for core in layer.cores)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype):
        assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_with_dynamic_rows(backend):
    torch._dynamo.reset()
    shape = ODD_SHAPES[5]
    model = torch.nn.Sequential(
        MPOLinear(shape.in_features, shape.out_features, shape), torch.nn.GELU()
    )
    model[0].freeze_central()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for rows in (2, 3, 9, 33):
        x = torch.randn(rows, shape.in_features, requires_grad=True)
        want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want)
        wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
        for a, b in zip(
            torch.autograd.grad(got.sum(), wanted),
            torch.autograd.grad(want.sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter["stats"]["unique_graphs"] == 1, "recompiled for another number of rows"


def test_the_function_compiles_as_one_graph():
    torch._dynamo.reset()
    shape = ODD_SHAPES[5]
    cores = random_cores(shape)
    sizes = {"in_features": shape.in_features, "out_features": shape.out_features}
    compiled = torch.compile(mpo_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 9):
        x = torch.randn(rows, shape.in_features)
        torch.testing.assert_close(compiled(x, cores, **sizes), mpo_linear(x, cores, **sizes))


def test_frozen_cores_get_no_gradient_and_the_rest_train():
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2)))
    layer.freeze_central()
    layer(torch.randn(5, 24)).sum().backward()
    assert [core.grad is None for core in layer.cores] == [False, True, False]
    layer.unfreeze()
    assert all(core.requires_grad for core in layer.cores)


def test_full_rank_trains_as_the_dense_layer_does():
    """32 steps of SGD on W itself, and on an MPO layer whose W takes the same steps."""
    torch.manual_seed(3)
    dense = torch.nn.Sequential(
        torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)
    ).double()
    mpo = copy.deepcopy(dense)
    # One core holds W as it is, so that a step on the core is a step on W.
    mpo[0] = MPOLinear.from_linear(dense[0], MPOShape((12,), (20,)))
    mpo[2] = MPOLinear.from_linear(dense[2], MPOShape((20,), (3,)))
    x, target = torch.randn(64, 12).double(), torch.randn(64, 3).double()
    losses = []
    for model in (dense, mpo):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(32):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_five_cores_learn_what_dense_learns():
    torch.manual_seed(3)
    x = torch.randn(256, 24)
    target = x @ torch.randn(24, 30) / 5
    layer = MPOLinear.from_linear(torch.nn.Linear(24, 30), MPOShape.balanced(24, 30))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    first = F.mse_loss(layer(x), target).item()
    for _ in range(150):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first


def test_rounding_keeps_the_parameters_and_they_still_train():
    """A squeezed tensor that is a new parameter would never hear of the optimizer again."""
    layer = MPOLinear.from_linear(torch.nn.Linear(24, 30), MPOShape((2, 3, 4), (5, 3, 2)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    parameters, before = list(layer.cores), layer.to_linear().weight
    rounded = layer.round(max_rank=4)
    assert all(a is b for a, b in zip(parameters, layer.cores, strict=True))
    assert layer.shape.ranks == (4, 4) and layer.shape.in_features == 24
    error = relative_error(layer.to_linear().weight, before)
    assert error == pytest.approx(rounded.rel_error, rel=1e-4)
    cut = [core.clone() for core in layer.cores]
    optimizer.zero_grad()
    layer(torch.randn(4, 24)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(cut, layer.cores, strict=True))


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
@pytest.mark.parametrize("kind", ["plain", "in bytes", "in blocks"])
def test_a_model_may_write_in_place_of_the_output(kind, lead):
    """Longformer scales its queries so."""
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 4), bias=False)
    kinds = {"in bytes": MPOLinear.quantized, "in blocks": lambda of: BlockwiseLinear(of, 4)}
    layer = kinds.get(kind, lambda of: of)(layer)
    x = torch.randn(*lead, 24, requires_grad=True)
    (expected,) = torch.autograd.grad((layer(x) * 2).square().sum(), x)
    y = layer(x)
    y *= 2
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_copies_and_moves():
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 5))
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.shape == layer.shape
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    meta = MPOLinear(24, 30, layer.shape, device="meta")
    assert meta(x.to("meta")).shape == (3, 30)
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(layer.float().state_dict())
    assert torch.equal(meta(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_another_rank_loads(assign):
    wide = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 7))
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 2))
    layer.load_state_dict(wide.state_dict(), assign=assign)
    x = torch.randn(3, 24)
    assert layer.shape == wide.shape and torch.equal(layer(x), wide(x))


def test_a_state_that_does_not_belong_is_refused_and_changes_nothing():
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 2))
    before = copy.deepcopy(layer.state_dict())

    def refused(says, **changes):
        state = {**copy.deepcopy(before), **changes}
        with pytest.raises(RuntimeError, match=says):
            layer.load_state_dict({k: v for k, v in state.items() if v is not None})
        assert layer.shape.ranks == (2, 2)
        assert all(torch.equal(a, before[k]) for k, a in layer.state_dict().items())

    refused("cores.1", **{"cores.1": None})
    refused("factors", **{"cores.1": torch.zeros(2, 4, 3, 2)})
    refused("cores", **{"cores.1": torch.zeros(2, 3, 3, 5)})
    # A hostile size: claimed on the meta device, refused before anything is allocated.
    huge = {
        "cores.0": torch.empty(1, 2, 5, 2**40, device="meta"),
        "cores.1": torch.empty(2**40, 3, 3, 2, device="meta"),
    }
    refused("at most the full", **huge)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(3, 23), ValueError, r"expected x \[\.\.\., 24\], got \[3, 23\]"),
        (torch.zeros(()), ValueError, "expected x"),
        (torch.zeros(3, 24, dtype=torch.int64), TypeError, "floating-point x, got torch.int64"),
        (torch.zeros(3, 24, dtype=torch.float64), TypeError, "torch.float64 on cpu, got"),
    ],
)
def test_bad_input_says_what_was_expected(x, error, says):
    with pytest.raises(error, match=says):
        MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 2))(x)


def test_bad_arguments_say_what_was_expected():
    shape, cores = MPOShape((2, 3), (4, 5)), [torch.ones(1, 2, 4, 8), torch.ones(8, 3, 5, 1)]
    with pytest.raises(ValueError, match="expected a shape for 6 -> 21"):
        MPOLinear(6, 21, shape)
    with pytest.raises(TypeError, match="expected an MPOShape"):
        MPOLinear(6, 20, (2, 3))
    with pytest.raises(ValueError, match="chain from 1 to 1"):
        mpo_linear(torch.ones(6), cores[::-1])
    with pytest.raises(ValueError, match=r"expected a bias \[20\], got \[2, 10\]"):
        mpo_linear(torch.ones(6), cores, torch.ones(2, 10))
    with pytest.raises(ValueError, match="out_features <= 20"):
        mpo_linear(torch.ones(6), cores, torch.ones(21))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_merged_is_the_same_matrix_in_fewer_cores(shape: MPOShape, rows: int):
    layer = MPOLinear(shape.in_features, shape.out_features, shape)
    layer.freeze_central()
    merged = layer.merged(rows)
    x = torch.randn(3, shape.in_features)
    torch.testing.assert_close(merged(x), layer(x), atol=1e-5, rtol=1e-5)
    assert merged.shape.num_cores == len(layer.plan(rows).split) + 1
    assert merged.plan(rows).split == tuple(range(1, merged.shape.num_cores))
    storages = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in merged.parameters()}
