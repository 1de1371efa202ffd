"""InterpolativeLinear against the low rank that it is made of, in fp64, odd sizes first."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mpo_kernels import InterpolativeLinear, MPOEmbedding, MPOLinear, MPOShape
from mpo_kernels.cores.gauge import interpolated
from mpo_kernels.testing import relative_error

# Outputs, inputs, rank: from one to the full, tall and wide.
SIZES = [(13, 7, r) for r in range(1, 8)] + [(7, 13, r) for r in (1, 4, 6, 7)] + [(5, 5, 5)]


def low_rank(m, n, rank, dtype=torch.float32, bias=True):
    return MPOLinear(n, m, MPOShape.low_rank(n, m, rank), bias, dtype=dtype)


def weight(layer):
    """Formed by torch's own products, with autograd."""
    coefficients, pivots = layer.cores
    return torch.cat((pivots, coefficients @ pivots))[layer.order]


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_same_layer_in_fewer_numbers(m, n, rank, bias):
    plain = low_rank(m, n, rank, bias=bias)
    layer = plain.eval().interpolative()
    assert not layer.training and sum(c.numel() for c in layer.cores) == rank * (m + n - rank)
    assert (layer.shape, layer.rank) == (plain.shape, rank)
    exact = copy.deepcopy(plain).double()
    for lead in ((), (1,), (3, 5), (0,), (2, 0)):
        x = torch.randn(*lead, n)
        y = layer(x)
        assert y.shape == (*lead, m) and y.dtype == torch.float32 and y.is_contiguous()
        if y.numel():
            assert relative_error(y, exact(x.double())) <= 1e-6
    dense = exact.to_linear().weight
    back = layer.to_mpo()
    for other in (layer.to_linear(), back.to_linear()):
        assert relative_error(other.weight, dense) <= 1e-6
        assert (other.bias is None) == (not bias)
    assert back.shape == plain.shape and not back.training
    with torch.no_grad():
        back.cores[1].zero_()
        if bias:
            back.bias.zero_()
    assert relative_error(layer.to_linear().weight, dense) <= 1e-6  # which shares nothing with it


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_gradients_are_those_of_dense_autograd(m, n, rank):
    layer = low_rank(m, n, rank, torch.float64).interpolative()
    x, dy = torch.randn(3, 2, n, dtype=torch.float64), torch.randn(3, 2, m, dtype=torch.float64)
    leaves = [x.requires_grad_(), *layer.parameters()]
    found = torch.autograd.grad(layer(x), leaves, dy)
    wanted = torch.autograd.grad(F.linear(x, weight(layer), layer.bias), leaves, dy)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def spoilt(kind, m, rank):
    left = torch.randn(m, rank, dtype=torch.float64)
    if kind == "columns":
        left *= torch.logspace(-8, 8, rank, dtype=torch.float64)
    elif kind == "rows":
        left *= torch.logspace(-6, 6, m, dtype=torch.float64)[torch.randperm(m), None]
    elif kind == "rank":
        left[:, rank // 2 :] = left[:, :1]
    elif kind == "zero":
        left.zero_()
    return left


@pytest.mark.parametrize("kind", ["normal", "columns", "rows", "rank", "zero"])
@pytest.mark.parametrize(("m", "rank"), [(13, 7), (150, 97), (300, 40)])
def test_coefficients_stay_small(kind, m, rank):
    left, right = spoilt(kind, m, rank), torch.randn(rank, 61, dtype=torch.float64)
    exact = left @ right
    coefficients, pivots, order = interpolated(left.float(), right.float())
    assert coefficients.dtype == torch.float32 and coefficients.abs().amax() <= 4
    assert sorted(order.tolist()) == list(range(m))
    stacked = torch.cat((pivots.double(), coefficients.double() @ pivots.double()))
    exact = left.float().double() @ right.float().double()
    assert torch.linalg.norm(stacked[order] - exact) <= 1e-6 * torch.linalg.norm(exact)
    # What is held are rows of the matrix.
    torch.testing.assert_close(exact[order < rank], pivots[order[order < rank]].double())


def test_freezing_leaves_the_larger_core():
    for m, n, rank, central in ((13, 7, 3, 0), (9, 7, 3, 1), (7, 13, 3, 1), (7, 7, 7, 1)):
        layer = InterpolativeLinear(n, m, rank)
        layer.freeze_central()
        assert layer.central == central
        assert [core.requires_grad for core in layer.cores] == [k != central for k in range(2)]
        layer(torch.randn(4, n)).square().sum().backward()
        frozen, trained = layer.cores[central], layer.cores[1 - central]
        assert frozen.grad is None and trained.grad is not None and layer.bias.grad is not None
        layer.unfreeze()
        assert all(core.requires_grad for core in layer.cores)


def test_a_new_layer_starts_as_torchs_own():
    layer, dense = InterpolativeLinear(300, 400, 50), torch.nn.Linear(300, 400)
    std = weight(layer).detach().std()
    assert 0.8 < float(std / dense.weight.detach().std()) < 1.2
    assert float(layer.bias.detach().abs().amax()) <= 300**-0.5


@pytest.mark.parametrize(("rank", "kind"), [(300, InterpolativeLinear), (10, MPOLinear)])
def test_served_as_the_faster_of_two_forms(rank, kind):
    """What r² multiply-adds a row save pays for the order of the outputs, or does not."""
    layer = low_rank(400, 300, rank).interpolative().eval()
    served, x = layer.merged(64), torch.randn(5, 300)
    assert type(served) is kind and not served.training
    assert served.bias is not layer.bias and served.cores[1] is not layer.cores[1]
    torch.testing.assert_close(served(x), layer(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected at least one row, got 0"):
        layer.merged(0)


def test_compiles_as_one_graph():
    layer = low_rank(13, 7, 4).interpolative()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lead in ((2,), (5, 3)):
        x = torch.randn(*lead, 7)
        torch.testing.assert_close(compiled(x), layer(x))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},)).module()
    torch.testing.assert_close(program(torch.cat((x, x))), layer(torch.cat((x, x))))
    whole = low_rank(7, 7, 7).interpolative()  # whose coefficients are none
    whole.freeze_central()
    asks = torch.compile(lambda x: x.to(whole.weight.dtype), fullgraph=True, backend="eager")
    assert asks(torch.randn(2, dtype=torch.float64)).dtype == torch.float32


def test_autocast_halves_and_nested():
    plain = low_rank(13, 7, 4)
    layer = plain.interpolative()
    x = torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and relative_error(y, plain(x)) < 0.02
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.order.dtype == torch.int64
    assert relative_error(half(x.bfloat16()), plain(x)) < 0.02
    nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    torch.testing.assert_close(layer(nested).values(), layer(torch.cat((x, x[:2]))))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("m", "n", "rank"), [(13, 7, 4), (7, 13, 6), (5, 5, 5)])
def test_bytes_and_their_scales(m, n, rank, dtype):
    layer = low_rank(m, n, rank).interpolative()
    with torch.no_grad():
        layer.cores[1].mul_(torch.logspace(-3, 3, rank)[:, None])  # of very different sizes
        layer.cores[0].mul_(torch.logspace(3, -3, rank))
    coded = layer.eval().quantized(dtype)
    # Half a step of 127, or half of the last of three bits, of the largest of a row.
    bound = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}[dtype]
    for codes, core in zip(coded.cores, layer.cores, strict=True):
        assert codes.dtype == dtype and codes.shape == core.shape
    assert [tuple(scale.shape) for scale in coded.scales] == [(m - rank,), (rank,), (rank,)]
    rows, scale, columns = (each.double() for each in coded.scales)
    held = [rows[:, None] * coded.cores[0].double() * columns]
    held.append(scale[:, None] * coded.cores[1].double())
    steps = [bound * core.detach().double().abs().amax(1, keepdim=True) for core in layer.cores]
    left, pivots = (core.detach().double() for core in layer.cores)
    assert ((held[1] - pivots).abs() <= 1.01 * steps[1]).all()
    # What is made of rows makes up for them: all in all no more than if each were that far off.
    most = steps[0] * pivots.abs().sum(0) + left.abs() @ steps[1] + steps[0] * steps[1].sum()
    assert (held[0] @ held[1] - left @ pivots).norm() <= most.expand(m - rank, n).norm()
    exact = torch.cat((held[1], held[0] @ held[1]))[layer.order]
    bias = layer.bias.detach().double()
    for lead in ((2, 3), (0,), ()):
        x = torch.randn(*lead, n)
        expected = F.linear(x.double(), exact, bias).float()
        torch.testing.assert_close(coded(x), expected, rtol=1e-4, atol=1e-4)
    assert relative_error(coded(x.double()), F.linear(x.double(), exact, bias)) <= 1e-14
    assert relative_error(coded.to_linear().weight, exact) <= 1e-6
    assert not list(coded.parameters()) and coded.weight.shape == (m, n)
    assert sum(code.nbytes for code in coded.codes) == rank * (m + n - rank)
    x = torch.randn(2, n, requires_grad=True)
    (gradient,) = torch.autograd.grad(coded(x).sum(), x)
    torch.testing.assert_close(gradient, exact.sum(0).float().expand(2, n), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert coded(x).dtype == torch.bfloat16
    half = copy.deepcopy(coded).to(torch.bfloat16)
    assert half.bias.dtype == torch.bfloat16 and half.order.dtype == torch.int64
    assert all(map(torch.equal, half.scales, coded.scales))
    assert relative_error(half(x.bfloat16()), coded(x)) < 0.05
    empty = InterpolativeLinear(n, m, rank, device="meta").quantized(dtype).to_empty(device="cpu")
    empty.load_state_dict(coded.state_dict())
    assert torch.equal(empty(x), coded(x))
    with pytest.raises(ValueError, match=f"expected cores of 16 bits or more, got {dtype}"):
        coded.quantized()


def nearest(core: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded, each row by its largest, in fp64."""
    largest = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
    scale = core.double().abs().amax(1, keepdim=True) / largest
    codes = core.double() / scale
    return (codes.round() if dtype == torch.int8 else codes.to(dtype).double()) * scale


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(  # more and fewer than a block
    ("sizes", "share"), [((301, 203, 157), 0.45), ((60, 300, 41), 0.85)]
)
def test_what_is_made_of_rows_makes_up_for_their_rounding(sizes, share, dtype):
    """Beside both cores rounded to the nearest, where rows are nearly alike, of any size."""
    m, n, rank = sizes
    layer = InterpolativeLinear(n, m, rank)
    with torch.no_grad():
        size = torch.logspace(-0.5, 0.5, rank)[:, None]
        layer.cores[1].copy_((torch.randn(rank, n) + 3 * torch.randn(n)) * size)
        layer.cores[0].div_(size.t())
        left, pivots = (nearest(core, dtype) for core in layer.cores)
        exact = layer.cores[0].double() @ layer.cores[1].double()
        found = layer.quantized(dtype).to_linear().weight.double()[rank:]  # they lie in order
    assert relative_error(found, exact) < share * relative_error(left @ pivots, exact)


def test_what_is_made_up_for_stays_within_a_byte():
    """What a long row loses would take a short one like it beyond the largest of its column."""
    layer = InterpolativeLinear(9, 102, 2)
    with torch.no_grad():
        like = torch.randn(9)
        layer.cores[1].copy_(torch.stack((40 * like, like + 0.01 * torch.randn(9))))
        layer.cores[0].copy_(torch.stack((torch.linspace(-1, 1, 100), torch.ones(100)), 1))
    weight = layer.to_linear().weight
    assert relative_error(layer.quantized().to_linear().weight, weight) < 0.02


@pytest.mark.parametrize("sizes", [[1.0] * 19 + [size] for size in (1e-3, 1e-5, 1e-30)] + [None])
def test_a_small_row_is_not_used_beyond_measure(sizes):
    """To make up for large ones it would take coefficients beside which the others are nothing."""
    layer = InterpolativeLinear(30, 60, 20)
    with torch.no_grad():
        size = torch.logspace(0, -6, 20) if sizes is None else torch.tensor(sizes)
        layer.cores[0].copy_(torch.randn(40, 20))
        layer.cores[1].copy_(torch.randn(20, 30) * size[:, None])
        left, pivots = (nearest(core, torch.int8) for core in layer.cores)
        exact = layer.cores[0].double() @ layer.cores[1].double()
        found = layer.quantized().to_linear().weight.double()[20:]
    assert relative_error(found, exact) < relative_error(left @ pivots, exact)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_units_of_another_size_are_as_exact(dtype):
    """What dense layers before and after may undo, of outputs that are made and that are kept."""
    layer = InterpolativeLinear(90, 130, 50)
    made, kept = torch.ones(80), torch.ones(50)
    made[::7], kept[::5] = 1e-2, 1e-2
    with torch.no_grad():
        layer.cores[0].copy_(torch.randn(80, 50))
        layer.cores[1].copy_(torch.randn(50, 90))
        dense = torch.cat((layer.cores[1], layer.cores[0] @ layer.cores[1]))
        plain = layer.quantized(dtype).to_linear().weight
        layer.cores[0].mul_(made[:, None] / kept)
        layer.cores[1].mul_(kept[:, None])
        scaled = layer.quantized(dtype).to_linear().weight / torch.cat((kept, made))[:, None]
    assert relative_error(scaled, dense) < 1.2 * relative_error(plain, dense) < 0.05


def test_rows_of_zeros_in_bytes():
    layer = InterpolativeLinear(7, 9, 4)
    with torch.no_grad():
        layer.cores[1][1:3].zero_()
    weight = layer.to_linear().weight
    assert relative_error(layer.quantized().to_linear().weight, weight) < 0.02
    with torch.no_grad():
        layer.cores[1].zero_()
    assert not layer.quantized().to_linear().weight.any()


def test_what_bytes_do_not_hold():
    layer = low_rank(7, 5, 3).interpolative()
    with pytest.raises(ValueError, match=r"expected a dtype of .*, got torch\.int16"):
        layer.quantized(torch.int16)
    layer.cores[0].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="expected finite cores, got NaN or Inf in core 0"):
        layer.quantized()


def test_meta_and_state():
    layer = low_rank(13, 7, 4).interpolative()
    empty = InterpolativeLinear(7, 13, 4, device="meta")
    assert empty(torch.randn(2, 7, device="meta")).shape == (2, 13)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7)
    assert torch.equal(empty(x), layer(x))
    assert layer.state_dict().keys() == {"cores.0", "cores.1", "order", "bias"}
    assert layer.weight.shape == (13, 7)
    with pytest.raises(NotImplementedError, match=r"InterpolativeLinear \[13, 7\]: held as cores"):
        layer.weight + 1


def test_what_is_refused():
    shape = MPOShape.balanced(12, 12, 2)
    with pytest.raises(
        ValueError, match=r"expected low rank, in and out factors \(1, 12\) and \(12, 1\), got "
    ):
        MPOLinear(12, 12, shape).interpolative()
    for factors in (((12, 1), (1, 12)), ((1, 12, 1), (12, 1, 1)), ((12,), (12,))):
        with pytest.raises(ValueError, match=r"expected low rank, .*, got \("):
            MPOLinear(12, 12, MPOShape(*factors)).interpolative()
    table = MPOEmbedding(9, 5, MPOShape.low_rank(9, 5, 3))
    with pytest.raises(ValueError, match=r"expected low rank, .* got \(5, 1\) and \(1, 9\)"):
        table.as_linear().interpolative()
    for rank in (0, 6):
        with pytest.raises(ValueError, match=f"expected a rank from 1 to 5, got {rank}"):
            InterpolativeLinear(7, 5, rank)
    plain = low_rank(7, 5, 3)
    plain.cores[0].data[0, 0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="expected finite cores, got NaN or Inf in core 0"):
        plain.interpolative()
    layer = low_rank(7, 5, 3).interpolative()
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 5\], got \[2, 6\]"):
        layer(torch.randn(2, 6))
