"""What each of several processes holds of a matrix, together the whole of it."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    VocabParallelEmbedding,
    pad_vocab_size,
)

from mpo_kernels import MPOShape, reconstruct
from mpo_kernels.testing import random_cores
from mpop.models.config import ModuleSpec
from mpop_serving.vllm import MPOLinearMethod, MPOVocabularyMethod


def test_vllm_finds_it_and_registering_again_changes_nothing() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="mpo")
    entry.load()()
    found = get_quantization_config("mpo")
    entry.load()()
    assert get_quantization_config("mpo") is found


def load(layer: nn.Module, matrices: dict[str | None, list[Tensor]]) -> None:
    for shard, cores in matrices.items():
        if len(cores) == 1:
            layer.weight.weight_loader(layer.weight, cores[0], shard)
            continue
        for parameter, core in zip(layer.cores, cores, strict=False):
            parameter.weight_loader(parameter, core, shard)


def linear(
    method: MPOLinearMethod, rank: int, processes: int, ins: int, outs: list[int]
) -> nn.Module:
    layer = nn.Module()
    layer.tp_rank, layer.tp_size = rank, processes
    method.create_weights(layer, ins, outs, 0, 0, torch.float32)
    return layer


SHAPES = [
    MPOShape((4, 3), (8, 2), 5),
    MPOShape((1, 12), (16, 1), 4),
    MPOShape((1, 4, 3), (4, 1, 4)),
    MPOShape((4, 1, 3), (4, 2, 2), (3, 4)),
    # The last digit is padding.
    MPOShape((5, 3), (5, 4), 6, in_features=12, out_features=16),
]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_and_rows(shape: MPOShape, processes: int) -> None:
    cores = random_cores(shape)
    dense = reconstruct(cores, in_features=shape.in_features, out_features=shape.out_features)
    x, sums = torch.randn(3, shape.in_features), 0
    spec = ModuleSpec("linear", shape, False)
    for rank in range(processes):
        method = MPOLinearMethod([("column", spec)])
        size = shape.out_features // processes
        layer = linear(method, rank, processes, shape.in_features, [size])
        load(layer, {None: cores})
        method.process_weights_after_loading(layer)
        want = x @ dense[rank * size : (rank + 1) * size].t()
        torch.testing.assert_close(method.apply(layer, x), want, rtol=1e-4, atol=1e-5)

        method = MPOLinearMethod([("row", spec)])
        size = shape.in_features // processes
        layer = linear(method, rank, processes, size, [shape.out_features])
        load(layer, {None: cores})
        method.process_weights_after_loading(layer)
        sums = sums + method.apply(layer, x[:, rank * size : (rank + 1) * size])
    torch.testing.assert_close(sums, x @ dense.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_fused_attention_with_replicated_keys_and_a_dense_matrix(processes: int) -> None:
    """Eight heads of size two, but two of keys and values, which several processes share."""
    queries, keys = MPOShape((3, 2), (8, 2), 4), MPOShape((2, 3), (4, 1), 2)
    matrices = {"q": random_cores(queries), "k": random_cores(keys), "v": [torch.randn(4, 6)]}
    dense = {s: m[0] if len(m) == 1 else reconstruct(m) for s, m in matrices.items()}
    x, bias = torch.randn(5, 6), torch.randn(24)
    for rank in range(processes):
        held = max(4 // processes, 2)
        share = rank // (processes // (4 // held))
        method = MPOLinearMethod(
            [
                ("q", ModuleSpec("linear", queries, False)),
                ("k", ModuleSpec("linear", keys, False)),
                ("v", None),
            ]
        )
        layer = linear(method, rank, processes, 6, [16 // processes, held, held])
        load(layer, matrices)
        method.process_weights_after_loading(layer)
        rows = slice(rank * 16 // processes, (rank + 1) * 16 // processes)
        shared = slice(share * held, (share + 1) * held)
        weight = torch.cat([dense["q"][rows], dense["k"][shared], dense["v"][shared]])
        own = bias[: len(weight)]
        torch.testing.assert_close(
            method.apply(layer, x, own), x @ weight.t() + own, rtol=1e-4, atol=1e-5
        )


def test_three_matrices_that_are_one_in_the_checkpoint() -> None:
    shape = MPOShape((3, 2), (6, 4), 5)
    cores, x = random_cores(shape), torch.randn(2, 6)
    thirds = reconstruct(cores).chunk(3)
    for rank in range(2):
        method = MPOLinearMethod([("c_attn", ModuleSpec("conv1d", shape, False))])
        layer = linear(method, rank, 2, 6, [4, 4, 4])
        load(layer, {None: cores})
        method.process_weights_after_loading(layer)
        weight = torch.cat([third.chunk(2)[rank] for third in thirds])
        torch.testing.assert_close(method.apply(layer, x), x @ weight.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "ins", "outs", "message"),
    [
        (
            MPOShape((3, 4), (3, 4)),
            12,
            [6],
            r"of 12 whose first 2 divides, got \(3, 4\).*=2 \(mpop",
        ),
        (MPOShape((3, 4), (3, 4)), 6, [12], "--tensor-parallel 2"),
        (MPOShape((2, 3), (4, 6)), 6, [4, 4, 4], "tensor_parallel=6"),
        (MPOShape((2, 3), (4, 3), out_features=10), 6, [5], "whose first 2 divides"),
        (MPOShape((2, 3), (4, 3)), 6, [5], "expected 5 features in each of 2 processes"),
        (MPOShape((2, 3), (4, 3)), 4, [6], "expected 4 features in each of 2 processes"),
    ],
)
def test_factors_and_sizes_that_do_not_divide(
    shape: MPOShape, ins: int, outs: list[int], message: str
) -> None:
    method = MPOLinearMethod([("name", ModuleSpec("linear", shape, False))])
    with pytest.raises(ValueError, match=f"name: .*{message}"):
        linear(method, 0, 2, ins, outs)


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("kind", ["embedding", "linear"])
@pytest.mark.parametrize("factors", [(2, 5, 5), (1, 50), (3, 17)])
def test_vocabularies(factors: tuple[int, ...], kind: str, processes: int) -> None:
    """Fifty words, which vLLM pads to 64."""
    dims = (3, 2, 2) if len(factors) == 3 else (12, 1)
    shape = MPOShape(factors, dims, 7, in_features=50, out_features=12)
    cores = random_cores(shape)
    table = reconstruct(cores, in_features=50, out_features=12).t()
    if kind == "linear":
        shape, cores = shape.transpose(), [core.transpose(1, 2) for core in cores]
    padded = pad_vocab_size(50)
    x, ids, logits, rows = torch.randn(3, 12), torch.arange(50), [], 0
    for rank in range(processes):
        layer = nn.Module()
        layer.tp_rank, layer.tp_size = rank, processes
        layer.org_vocab_size, layer.embedding_dim = 50, 12
        layer.num_embeddings_per_partition = padded // processes
        layer.shard_indices = VocabParallelEmbedding._get_indices(
            padded, padded, 50, 50, rank, processes
        )
        method = MPOVocabularyMethod("words", ModuleSpec(kind, shape, False))
        method.create_weights(layer, 12, [padded // processes], 12, padded, torch.float32)
        load(layer, {None: cores})
        method.process_weights_after_loading(layer)
        logits.append(method.apply(layer, x))
        if kind == "embedding":
            start = layer.shard_indices.org_vocab_start_index
            own = (ids >= start) & (ids < layer.shard_indices.org_vocab_end_index)
            found = method.embedding(layer, (ids - start) * own)
            rows = rows + found * own[:, None]
    assert {part.shape for part in logits} == {(3, padded // processes)}
    torch.testing.assert_close(torch.cat(logits, -1)[:, :50], x @ table.t(), rtol=1e-4, atol=1e-5)
    if kind == "embedding":
        torch.testing.assert_close(rows, table, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_of_another_size() -> None:
    shape = MPOShape((5, 10), (3, 4), 2)
    method = MPOVocabularyMethod("words", ModuleSpec("embedding", shape, False))
    layer = SimpleNamespace(org_vocab_size=51, embedding_dim=12)
    with pytest.raises(
        ValueError, match=r"words: expected \(51, 12\) by the model, got \(50, 12\)"
    ):
        method.create_weights(layer, 12, [64], 12, 64, torch.float32)
