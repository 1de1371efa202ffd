"""MPOEmbedding against ``nn.Embedding`` and the dense table."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_kernels import MPOEmbedding, MPOShape, mpo_embedding, reconstruct
from mpo_kernels.backends.torch import gather
from mpo_kernels.export import DECOMPOSITIONS
from mpo_kernels.layers.blockwise import BlockwiseEmbedding
from mpo_kernels.testing import ODD_SHAPES, random_cores, relative_error, tolerance


def dense_table(cores, shape):
    return torch.cat([mpo_row(cores, row, shape) for row in range(shape.in_features)])


def mpo_row(cores, row, shape):
    """One row by its mixed-radix digits, independently of the layer: ∏ T_k[:, i_k]."""
    digits = []
    for factor in reversed(shape.in_factors):
        row, digit = divmod(row, factor)
        digits.append(digit)
    state = cores[0].new_ones(1, 1)
    for core, digit in zip(cores, reversed(digits), strict=True):
        d, _, j, r = core.shape
        state = (state @ core[:, digit].reshape(d, j * r)).reshape(-1, r)
    return state.reshape(1, -1)[:, : shape.out_features]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 2**22])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rows_and_gradients(shape, dtype, block, mirrored, monkeypatch):
    monkeypatch.setattr(gather, "BLOCK", block)
    monkeypatch.setattr(gather, "_mirror_pays", lambda count, cores: mirrored)
    cores = [core.requires_grad_() for core in random_cores(shape, dtype)]
    ids = torch.randint(shape.in_features, (4, 5)).t()
    sizes = {"num_embeddings": shape.in_features, "embedding_dim": shape.out_features}
    rows = mpo_embedding(ids, cores, **sizes)
    dy = torch.randn(rows.shape).to(dtype)
    got = [rows, *torch.autograd.grad(rows, cores, dy)]

    def reference(cores, of=lambda t: t):
        cores = [of(core.detach()).requires_grad_() for core in cores]
        rows = F.embedding(ids, dense_table(cores, shape))
        return [rows, *torch.autograd.grad(rows, cores, of(dy).to(rows.dtype))]

    exact = reference([core.double() for core in cores])
    scale = reference([core.double() for core in cores], torch.abs)
    unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    same = reference([core.float() for core in cores])
    for ours, torchs, want, size in zip(got, same, exact, scale, strict=True):
        assert ours.dtype == dtype
        bound = tolerance(unit * relative_error(torchs, want, size), dtype, shape.num_cores + 2)
        assert relative_error(ours, want, size) <= bound


def test_each_distinct_row_is_formed_once_and_no_other(monkeypatch):
    seen, formed = [], gather._states
    monkeypatch.setattr(
        gather, "_states", lambda ids, cores: seen.extend(ids.tolist()) or formed(ids, cores)
    )
    layer = MPOEmbedding(1009, 24, MPOShape.balanced(1009, 24, 3, 8))
    layer(torch.tensor([[5, 1008, 5, 7], [7, 5, 5, 0]]))
    assert len(seen) == len(set(seen)) == 4


def test_the_chain_is_read_from_the_cheaper_end():
    cheap_first = [torch.randn(1, 5, 1, 2), torch.randn(2, 6, 4, 3), torch.randn(3, 7, 10, 1)]
    assert not gather._mirror_pays(30, cheap_first)
    assert gather._mirror_pays(30, gather._mirror_cores(cheap_first))
    table = MPOEmbedding(30522, 384, MPOShape.balanced(30522, 384), device="meta")
    assert gather._mirror_pays(500, list(table.cores))


def test_drop_in_for_embedding():
    table = torch.nn.Embedding(1009, 24, padding_idx=-3)
    layer = MPOEmbedding.from_embedding(table)
    assert layer.padding_idx == table.padding_idx == 1006
    ids = torch.randint(1009, (3, 50))
    torch.testing.assert_close(layer(ids), table(ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.to_embedding().weight, table.weight, rtol=1e-4, atol=1e-5)
    assert layer.to_embedding().padding_idx == 1006
    assert layer(torch.empty(0, 4, dtype=torch.int32)).shape == (0, 4, 24)
    assert layer.weight.shape == (1009, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(ids).dtype == torch.float32  # as nn.Embedding under autocast


def test_padding_passes_no_gradient():
    layer = MPOEmbedding(30, 6, MPOShape((5, 6), (2, 3), 4), padding_idx=2)
    others = MPOEmbedding(30, 6, layer.shape)
    others.load_state_dict(layer.state_dict())
    layer(torch.tensor([[2, 7], [2, 9]])).sum().backward()
    others(torch.tensor([7, 9])).sum().backward()
    for a, b in zip(layer.cores, others.cores, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_frozen_cores_get_no_gradient():
    layer = MPOEmbedding(30, 6, MPOShape((5, 3, 2), (1, 3, 2)))
    layer.freeze_central()
    layer(torch.tensor([2, 7])).sum().backward()
    assert [core.grad is None for core in layer.cores] == [k == layer.central for k in range(3)]


def test_the_tied_head_shares_the_cores_and_both_train_them():
    table = torch.nn.Embedding(101, 12).double()
    layer = MPOEmbedding.from_embedding(table)
    bias = torch.nn.Parameter(torch.randn(101).double())
    head = layer.as_linear(bias)
    assert all(a is b for a, b in zip(head.cores, layer.cores, strict=True)) and head.bias is bias
    ids = torch.tensor([3, 100, 3])

    def loss(embed, project):
        return F.cross_entropy(project(embed(ids).tanh()), ids)

    got = torch.autograd.grad(loss(layer, head), layer.cores[0])
    dense = [core.detach().requires_grad_() for core in layer.cores]
    weight = dense_table(dense, layer.shape)
    want = loss(lambda ids: F.embedding(ids, weight), lambda x: F.linear(x, weight, bias))
    torch.testing.assert_close(got, torch.autograd.grad(want, dense[0]))
    torch.testing.assert_close(head.to_linear().weight, table.weight, rtol=1e-9, atol=1e-9)
    layer.round(max_rank=5)
    assert head.shape == layer.shape and max(head.shape.ranks) == 5
    torch.testing.assert_close(head.to_linear().weight, layer.to_embedding().weight)
    again = copy.deepcopy(torch.nn.ModuleList([layer, head]))
    assert again[0].cores[2] is again[1].cores[2]


@pytest.mark.parametrize("shape", [MPOShape((4, 6), (4, 5), 5), MPOShape((4, 4), (2, 8), 5)])
def test_a_tied_head_in_bytes_and_merged_is_the_head(shape):
    """Square ones too, where cores that are not turned would fit as well."""
    layer = MPOEmbedding(shape.in_features, shape.out_features, shape)
    head = layer.as_linear(torch.randn(shape.in_features))
    x = torch.randn(7, shape.out_features)
    exact = x.double() @ dense_table([c.double() for c in layer.cores], shape).t()
    exact = exact + head.bias.double()
    for other, bound in ((head, 1e-6), (head.merged(1), 1e-6), (head.quantized(), 2e-2)):
        assert other(x).shape == (7, shape.in_features)
        assert relative_error(other(x), exact) < bound


def test_compiles_as_one_graph():
    layer = MPOEmbedding(101, 12, MPOShape.balanced(101, 12, 3))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 5, 17):
        ids = torch.randint(101, (n,))
        torch.testing.assert_close(compiled(ids), layer(ids))
        compiled(ids).sum().backward()
    function = torch.compile(mpo_embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    cores = list(layer.cores)
    torch.testing.assert_close(function(ids, cores), mpo_embedding(ids, cores))


def test_gradcheck_and_opcheck():
    shape = MPOShape((3, 2, 2), (2, 3, 1), 3, in_features=11)
    cores = [core.requires_grad_() for core in random_cores(shape, torch.float64)]
    ids = torch.tensor([[1, 4], [4, 10]])
    assert torch.autograd.gradcheck(
        lambda *c: mpo_embedding(ids, c, num_embeddings=11), cores, fast_mode=True
    )
    cores[1].requires_grad_(False)
    torch.library.opcheck(torch.ops.mpo_kernels.embedding, (ids, cores, 11, 6))


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.tensor([0.5]), TypeError, "int32 or int64 ids, got torch.float32"),
        (torch.tensor([0, 30]), IndexError, r"ids in \[0, 30\), got 0 … 30"),
        (torch.tensor([-1]), IndexError, r"ids in \[0, 30\)"),
    ],
)
def test_bad_ids_say_what_was_expected(ids, error, says):
    with pytest.raises(error, match=says):
        MPOEmbedding(30, 6, MPOShape((5, 6), (2, 3), 4))(ids)


@pytest.mark.parametrize("outside", [-1, 30, 31, 32, 1000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_outside_are_refused_wherever_a_table_refuses_them(outside, dtype):
    # 30 rows of a table padded to 32.
    layer = MPOEmbedding(30, 6, MPOShape((4, 8), (2, 3), 4, in_features=30))
    ids = torch.tensor([[1, outside, 29]], dtype=dtype)
    trained, frozen = BlockwiseEmbedding(layer, 8), BlockwiseEmbedding(layer, 4)
    frozen.requires_grad_(False)
    exported = torch.export.export(layer, (ids.clamp(0, 29),))
    plain = exported.run_decompositions(DECOMPOSITIONS)
    for run in (
        *(layer, trained, frozen, torch.compile(layer, backend="aot_eager")),
        *(exported.module(), plain.module()),
        lambda ids: mpo_embedding(ids, list(layer.cores), num_embeddings=30),
    ):
        run(ids.clamp(0, 29))
        with pytest.raises(IndexError):
            run(ids)


def test_a_padding_index_counts_from_the_end():
    layer = MPOEmbedding(30, 6, MPOShape((5, 6), (2, 3), 4))
    sizes = {"num_embeddings": 30, "embedding_dim": 6}
    rows = mpo_embedding(torch.tensor([29, 5]), list(layer.cores), padding_idx=-1, **sizes)
    rows[0].sum().backward()
    assert not any(core.grad.any() for core in layer.cores)
    with pytest.raises(ValueError, match="padding_idx within 30 rows, got 30"):
        mpo_embedding(torch.tensor([1]), list(layer.cores), padding_idx=30, **sizes)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_model_may_write_in_place_of_the_rows(blocks):
    """CTRL scales its words so."""
    layer, ids = MPOEmbedding(30, 6, MPOShape((5, 6), (2, 3), 4)), torch.tensor([[3, 29], [0, 3]])
    layer = BlockwiseEmbedding(layer, 8) if blocks else layer
    first = next(p for p in layer.parameters() if p.requires_grad)
    (expected,) = torch.autograd.grad((layer(ids) * 2).square().sum(), first)
    rows = layer(ids)
    rows *= 2
    rows.square().sum().backward()
    torch.testing.assert_close(first.grad, expected)


def test_bad_arguments_say_what_was_expected():
    shape = MPOShape((5, 6), (2, 3), 4)
    with pytest.raises(ValueError, match="expected a shape for 31 × 6"):
        MPOEmbedding(31, 6, shape)
    with pytest.raises(ValueError, match="padding_idx within 30 rows, got 30"):
        MPOEmbedding(30, 6, shape, padding_idx=30)
    with pytest.raises(ValueError, match=r"expected a bias \[30\]"):
        MPOEmbedding(30, 6, shape).as_linear(torch.zeros(6))
    with pytest.raises(ValueError, match="without max_norm"):
        MPOEmbedding.from_embedding(torch.nn.Embedding(30, 6, max_norm=1.0))


def test_a_vocabulary_that_does_not_factor_is_padded_and_clipped():
    shape = MPOShape.balanced(30522, 16, 5, 4)
    layer = MPOEmbedding(30522, 16, shape)
    assert layer(torch.tensor([30521])).shape == (1, 16)
    with pytest.raises(IndexError):
        layer(torch.tensor([30522]))
    last = reconstruct(list(layer.cores), in_features=30522, out_features=16)[:, -1]
    torch.testing.assert_close(layer(torch.tensor(30521)), last, rtol=1e-4, atol=1e-6)


class Selections(TorchDispatchMode):
    """How many single slices are selected from a tensor that does not lie in order."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            self.count += args[2].numel() == 1 and not args[0].is_contiguous()
        return func(*args, **(kwargs or {}))


def test_a_mirrored_core_is_not_copied_for_each_digit():
    """Selecting from one that lies so copies all of it: forty times the time of three cores."""
    cores = random_cores(MPOShape((4, 5, 3), (4, 3, 2), 6))
    ids = torch.arange(60)
    assert gather._mirror_pays(60, cores)
    with Selections() as selections:
        gather.forward(ids, cores, 24)
        gather.backward(torch.randn(60, 24), ids, cores, (True, True, True))
    assert selections.count == 0
