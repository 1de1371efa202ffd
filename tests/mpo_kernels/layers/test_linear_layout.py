"""How the cores of MPOLinear lie in memory, as they are and in bytes."""

import copy
from dataclasses import replace

import pytest
import torch

from mpo_kernels import MPOEmbedding, MPOLinear, MPOShape, decompose
from mpo_kernels.layers.blockwise import BlockwiseLinear


def channels_last(core):
    return core.to(memory_format=torch.channels_last)


WAYS = {
    "balanced": lambda layer: layer.balance(),
    "rounded": lambda layer: layer.round(max_rank=3),
    "channels last": channels_last,
    "channels last within a model": lambda layer: channels_last(torch.nn.Sequential(layer)),
    "loaded": lambda layer: layer.load_state_dict(
        {name: channels_last(core) for name, core in layer.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_cores_stay_contiguous(way):
    """safetensors writes no other tensors."""
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 4), bias=False)
    WAYS[way](layer)
    assert all(core.is_contiguous() for core in layer.cores)
    assert not any(channels_last(core).is_contiguous() for core in layer.cores)  # it would show


def test_held_in_bytes_they_stay_contiguous_too():
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 4))
    for held in (layer.quantized(), BlockwiseLinear(layer, 8)):
        assert all(part.is_contiguous() for part in channels_last(held).state_dict().values())


def test_bytes_lie_as_the_cores_did():
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 4))
    for core in layer.cores:
        core.data = channels_last(core.data)
    assert not any(core.is_contiguous() for core in layer.cores)
    held = layer.quantized()
    for core, codes in zip(layer.cores, held.codes, strict=True):
        sizes = zip(core.shape, core.stride(), codes.stride(), strict=True)
        assert all(a == b for size, a, b in sizes if size > 1)
    x = torch.randn(3, 24)
    assert torch.equal(held(x), copy.deepcopy(held)(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_bytes_are_laid_out_and_not_merged(dtype):
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 4)).quantized(dtype)
    served, x = layer.merged(1), torch.randn(3, 24)
    assert served.shape == layer.shape and torch.equal(served(x), layer(x))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(served.codes, layer.codes, strict=True))
    with pytest.raises(ValueError, match="expected at least one row, got 0"):
        layer.merged(0)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_bytes_have_the_plan_of_the_widened_cores(x_dtype):
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 4), dtype=x_dtype)
    for rows in (1, 40):
        plan, wide = layer.quantized().plan(rows, x_dtype), layer.plan(rows)
        assert (plan.algorithm, plan.order, plan.split) == (wide.algorithm, wide.order, wide.split)
        both = zip(plan.candidates, wide.candidates, strict=True)
        added = [p.predicted_us - w.predicted_us for p, w in both]
        assert min(added) > 0 and max(added) - min(added) < 1e-9
        assert plan.bytes == wide.bytes + 7 * layer.shape.num_parameters
    with pytest.raises(ValueError, match="expected at least one row, got 0"):
        layer.quantized().plan(0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_have_a_dense_layer_and_an_empty_self(dtype, bias):
    layer = MPOLinear(
        23, 29, MPOShape((2, 3, 4), (5, 3, 2), 4, in_features=23, out_features=29), bias
    )
    held, x = layer.quantized(dtype), torch.randn(3, 23)
    dense = held.to_linear()
    torch.testing.assert_close(dense(x), held(x), rtol=1e-5, atol=1e-5)
    assert dense.weight.requires_grad and (dense.bias is None) != bias
    halves = held.to_linear(torch.float16)
    assert torch.equal(halves.weight, dense.weight.half())
    empty = layer.to("meta").quantized(dtype)
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in held.state_dict().items()
    }
    assert empty.weight.is_meta


@pytest.mark.parametrize("kind", [MPOLinear, MPOEmbedding])
def test_cores_of_a_decomposition_are_made_contiguous(kind):
    found = decompose(torch.randn(30, 24), MPOShape((2, 3, 4), (5, 3, 2)))
    layer = kind.from_decomposition(replace(found, cores=[*map(channels_last, found.cores)]))
    assert all(core.is_contiguous() for core in layer.cores)
    assert all(map(torch.equal, layer.cores, found.cores))
