"""The operators in plain torch against the dense layer, and a program of nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

from mpo_kernels import MPOEmbedding, MPOLinear, MPOShape, reconstruct
from mpo_kernels.backends.torch import gather
from mpo_kernels.backends.torch.backend import ALGORITHMS, TorchBackend
from mpo_kernels.export import DECOMPOSITIONS
from mpo_kernels.testing import ODD_SHAPES, dense_linear, random_cores


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_plan_in_plain_torch(shape):
    cores = random_cores(shape, torch.float64)
    x = torch.randn(6, shape.in_features, dtype=torch.float64)
    plans = TorchBackend().plan_for(6, torch.float64, x.device, cores).candidates
    for plan in plans:
        y = ALGORITHMS[plan.algorithm].plain(x, cores, shape.out_features, plan)
        torch.testing.assert_close(y, dense_linear(x, cores, None, shape))


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("copies", [0, 16])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rows_of_a_table_in_plain_torch(shape, copies, mirrored, monkeypatch):
    monkeypatch.setattr(gather, "COPIES", copies)
    monkeypatch.setattr(gather, "_mirror_pays", lambda count, cores: mirrored)
    cores = random_cores(shape, torch.float64)
    table = reconstruct(cores, in_features=shape.in_features, out_features=shape.out_features).t()
    ids = torch.randint(shape.in_features, (9,))
    torch.testing.assert_close(
        gather.plain(ids, cores, shape.out_features), F.embedding(ids, table)
    )


class Tied(torch.nn.Module):
    """Embedding, two layers and tied head, padded on every side, with and without a bias."""

    def __init__(self):
        super().__init__()
        self.words = MPOEmbedding(
            29, 10, MPOShape((5, 6), (3, 4), 7, in_features=29, out_features=10)
        )
        shape = MPOShape((3, 2, 2), (4, 2, 5), in_features=10, out_features=37)
        self.up = MPOLinear(10, 37, shape)
        self.down = MPOLinear(37, 10, MPOShape.low_rank(37, 10, 2), bias=False)
        self.head = self.words.as_linear(torch.randn(29))

    def forward(self, ids):
        return self.head(self.down(self.up(self.words(ids))))


@pytest.mark.parametrize(("copies", "mirrored"), [(0, True), (16, False)])
def test_a_program_without_our_operators(copies, mirrored, monkeypatch):
    monkeypatch.setattr(gather, "COPIES", copies)
    monkeypatch.setattr(gather, "_mirror_pays", lambda count, cores: mirrored)
    model = Tied()
    sample = torch.randint(29, (11, 13))
    axes = {"ids": {0: Dim("rows"), 1: Dim("length")}}
    program = torch.export.export(model, (sample,), dynamic_shapes=axes)
    assert any("mpo_kernels" in str(node.target) for node in program.graph.nodes)
    program = program.run_decompositions(DECOMPOSITIONS)
    assert not any("mpo_kernels" in str(node.target) for node in program.graph.nodes)
    sorts = any("nonzero" in str(node.target) for node in program.graph.nodes)
    assert sorts == (copies == 0)
    for ids in (sample[:1, :1], torch.full((2, 3), 28), torch.randint(29, (7, 5)).t()):
        torch.testing.assert_close(program.module()(ids), model(ids), rtol=1e-4, atol=1e-5)
