"""What only a device can show: offsets past 2³¹, streams, graphs, compilation, launches, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

import mpo_kernels as mk
from mpo_kernels import MPOShape
from mpo_kernels.backends.triton import panels, tiles
from mpo_kernels.backends.triton.backend import TritonBackend
from mpo_kernels.backends.triton.chain import chain
from mpo_kernels.backends.triton.gather import gather
from mpo_kernels.backends.triton.matrix import matrix_chain, matrix_gradient
from mpo_kernels.backends.triton.tiles import Chain, TwoParts
from mpo_kernels.planning.plan import Gradients, Plan
from mpo_kernels.testing import random_cores, relative_error

BF16 = torch.bfloat16
SHAPE = MPOShape((12, 64), (64, 48), 16)


@pytest.fixture(autouse=True)
def guards() -> None:
    """In place of the guarded buffers, which would double what is large here."""


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with mk.use_backend("triton"):
        yield


def layer(dtype: torch.dtype = BF16) -> mk.MPOLinear:
    return mk.MPOLinear(768, 3072, SHAPE, device="cuda", dtype=dtype)


def exact(module: mk.MPOLinear, x: torch.Tensor) -> torch.Tensor:
    dense = module.to_linear().double()
    return torch.nn.functional.linear(x.double(), dense.weight, dense.bias)


@pytest.fixture(scope="module")
def tall() -> torch.Tensor:
    """More than 2³¹ elements."""
    return torch.randn(2**31 // 64 + 77, 64, device="cuda", dtype=BF16)


def test_offsets_past_2_to_the_31(tall: torch.Tensor) -> None:
    a, b = (torch.randn(size, device="cuda", dtype=BF16) for size in ((8, 4, 3), (8, 4, 3)))
    p = Chain(8, 4, 8, 4, 3, 64, 16, True)
    limits = tiles.LIMITS["sm_90"]
    rows = tiles.power_of_two(len(tall))
    w = torch.einsum("ijd,kld->ikjl", b.double(), a.double()).reshape(64, 16)
    last = tall[-5:].double() @ w
    y = chain(tall, a, b, None, p, tiles.chain_tiles(p, 64, 2, limits)[0][1])
    assert relative_error(y[-5:], last) < 1e-2
    y = matrix_chain(tall, a, b, None, p, tiles.matrix_tiles(p, rows, 2, limits)[0][1])
    assert relative_error(y[-5:], last) < 1e-2
    dy = torch.zeros_like(y)
    dy[-5:] = torch.randn_like(dy[-5:])
    tile = tiles.matrix_tiles(p, rows, 2, limits, gradient=True)[0][1]
    s = torch.einsum("bsf,fjd->bsjd", tall[-5:].double().view(5, 8, 8), a.double())
    of_second = torch.einsum("bsjd,bnj->snd", s, dy[-5:].double().view(5, 4, 4))
    assert relative_error(matrix_gradient(tall, dy, a, p, tile), of_second) < 1e-2
    cores, bias = (b[None], a.permute(2, 0, 1)[..., None]), torch.zeros_like(y[0])
    panels.forward(tall, cores, bias, y, Plan("panels", "columns", (1,), rows, 2, 0, 0, 0.0))
    assert relative_error(y[-5:], last) < 1e-2


def test_an_embedding_of_more_than_2_to_the_31_elements() -> None:
    a, b = (torch.randn(size, device="cuda", dtype=BF16) for size in ((30, 32, 4), (31, 32, 4)))
    p = TwoParts(30, 32, 31, 32, 4, 930, 1024)
    ids = torch.randint(930, (2**21 + 3,), device="cuda")
    tile = tiles.gather_tiles(p, 2**22, 2, tiles.LIMITS["sm_90"])[0][1]
    rows = gather(ids, a, b, p, tile)
    w = torch.einsum("ijd,kld->ikjl", a.double(), b.double()).reshape(930, 1024)
    assert relative_error(rows[-3:], w[ids[-3:]]) < 1e-2


def test_a_row_stride_past_2_to_the_31(tall: torch.Tensor) -> None:
    x = tall.view(-1).as_strided((2, 768), (2**31 + 1024, 1))
    module = layer()
    for rows in (2, 128):  # the kernels of few rows and of many
        fused = next(plan for plan in module.plan(rows).candidates if plan.algorithm == "fused")
        y = TritonBackend().linear(x, list(module.cores), module.bias, 3072, fused)
        assert relative_error(y, exact(module, x)) < 2e-2


def test_on_a_second_stream() -> None:
    module, stream = layer(), torch.cuda.Stream()
    x = torch.randn(512, 768, device="cuda", dtype=BF16)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = module(x * 2)
    torch.cuda.current_stream().wait_stream(stream)
    assert relative_error(y, exact(module, x * 2)) < 2e-2


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_in_a_cuda_graph(rows: int) -> None:
    module = layer().requires_grad_(False)
    x = torch.randn(rows, 768, device="cuda", dtype=BF16)
    module(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, exact(module, x)) < 2e-2


def test_an_embedding_in_a_cuda_graph() -> None:
    module = mk.MPOEmbedding(930, 96, MPOShape((30, 31), (12, 8), 16), device="cuda")
    ids = torch.randint(930, (4, 33), device="cuda")
    with torch.no_grad():
        module(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = module(ids)
        ids.copy_(torch.randint_like(ids, 930))
        graph.replay()
        assert relative_error(rows, module.to_embedding()(ids)) < 1e-5


def test_compiled_whole() -> None:
    module = layer(torch.float32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (3, 17):
        x = torch.randn(rows, 768, device="cuda", requires_grad=True)
        y = compiled(x)
        assert relative_error(y, exact(module, x)) < 1e-5
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_autocast(dtype: torch.dtype) -> None:
    module = layer(torch.float32)
    x = torch.randn(65, 768, device="cuda")
    with torch.autocast("cuda", dtype):
        y = module(x)
    y.float().sum().backward()
    assert y.dtype == dtype and relative_error(y, exact(module, x)) < 2e-2
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_fifty_row_counts_compile_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(found)
    )
    module = mk.MPOLinear(80, 120, MPOShape((8, 10), (10, 12), 5), device="cuda", dtype=BF16)
    module.requires_grad_(False)
    for rows in range(1, 4000, 80):
        module(torch.randn(rows, 80, device="cuda", dtype=BF16))
    assert 0 < len(compiled) <= 16


def test_deterministic_where_torch_asks_for_it() -> None:
    module = mk.MPOEmbedding(930, 96, MPOShape((30, 31), (12, 8), 16), device="cuda")
    ids = torch.randint(930, (4096,), device="cuda")
    dy = torch.randn(4096, 96, device="cuda")

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(ids), list(module.parameters()), dy)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert all(map(torch.equal, gradients(), gradients()))
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_of_a_step_is_bounded() -> None:
    cores = random_cores(SHAPE, BF16, "cuda")
    x = torch.randn(16384, 768, device="cuda", dtype=BF16)
    dy = torch.randn(16384, 3072, device="cuda", dtype=BF16)
    gradients = Gradients(True, (True, True))
    plan = TritonBackend().plan_for(16384, BF16, x.device, cores, gradients, (768, 3072))
    fused = next(p for p in plan.candidates if p.algorithm == "fused")
    TritonBackend().linear_backward(dy, x, cores, gradients, fused)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    TritonBackend().linear_backward(dy, x, cores, gradients, fused)
    held = torch.cuda.max_memory_allocated() - before
    # dx, and for each part its gradient in fp32 once a split.
    splits = max(launch.tile.splits for launch in fused.launches)
    assert held <= x.nbytes + 4 * (splits + 2) * SHAPE.num_parameters + 2**20
