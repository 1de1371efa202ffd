"""What only a device can show of thin products: early reads, streams, graphs, a second device."""

from __future__ import annotations

import pytest
import torch

import mpo_kernels as mk
from mpo_kernels import MPOShape
from mpo_kernels.backends.cuda import extension
from mpo_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(
    extension.unavailable() is not None, reason="needs a GPU: bench/gpu_gate.sh runs it"
)
BF16 = torch.bfloat16


def stack(device: str = "cuda", layers: int = 6) -> torch.nn.Sequential:
    """Layers one after the other, each of which may read its cores while the one before runs."""
    torch.manual_seed(0)
    shape = MPOShape.low_rank(4096, 4096, 128)
    plain = [mk.MPOLinear(4096, 4096, shape, device=device, dtype=BF16) for _ in range(layers)]
    with mk.use_backend("cuda"):
        served = torch.nn.Sequential(*(layer.merged(1) for layer in plain)).requires_grad_(False)
        assert all(layer.plan(1).algorithm == "decode" for layer in served)
    return served


def exact(served: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """With each state rounded as the layers round it, in fp64 between."""
    for layer in served:
        linear = mk.MPOLinear.to_linear(layer).double()
        x = linear(x.double()).to(BF16)
    return x


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 4096, device="cuda", dtype=BF16)


def test_cores_that_change_between_calls(x: torch.Tensor) -> None:
    served = stack(layers=2)
    cores = [core for layer in served for core in layer.cores]
    with mk.use_backend("cuda"), torch.no_grad():
        for step in range(200):
            served(x)
            for core in cores:
                core.mul_(-1 if step % 2 else 1)
                core.copy_(torch.roll(core, 1, 0))
            y = served(x)
            torch.cuda.synchronize()
            assert torch.equal(y, served(x)), step


def test_a_stack_is_right_and_the_same_each_time(x: torch.Tensor) -> None:
    served = stack()
    with mk.use_backend("cuda"), torch.no_grad():
        first = served(x)
        assert all(torch.equal(served(x), first) for _ in range(50))
    assert relative_error(first, exact(served, x).double()) < 2e-2


def test_in_a_graph_and_on_two_streams(x: torch.Tensor) -> None:
    served = stack()
    with mk.use_backend("cuda"), torch.no_grad():
        expected = served(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = served(x)
        for _ in range(20):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)
        for layer in served:
            layer.cores[0].neg_()
        graph.replay()
        assert torch.equal(y, served(x))
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        for stream in streams * 10:
            with torch.cuda.stream(stream):
                found.append(served(x))
        torch.cuda.synchronize()
        assert all(torch.equal(each, y) for each in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_second_device(x: torch.Tensor) -> None:
    with mk.use_backend("cuda"), torch.no_grad():
        here, there = stack()(x), stack("cuda:1")(x.to("cuda:1"))
    assert torch.equal(here, there.to(here.device))
    assert torch.cuda.current_device() == 0
