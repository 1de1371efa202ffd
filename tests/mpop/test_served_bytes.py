"""Matrices in bytes or in interpolative form, as a server's layers load and cut them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mpo_kernels import MPOLinear, MPOShape, QuantizedMPOLinear
from mpop.models.config import INTERPOLATIVE, ModuleSpec
from mpop_serving.layers import LinearMethod, Place, VocabularyMethod

SHAPE = MPOShape((4, 3), (4, 4), 5)
STORES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def bytes_of(store: str, shape: MPOShape = SHAPE) -> QuantizedMPOLinear:
    torch.manual_seed(0)
    layer = MPOLinear(shape.in_features, shape.out_features, shape, bias=False)
    return layer.quantized(STORES[store])


def layer_of(method: Any, rank: int, processes: int, **members: Any) -> Any:
    method.place = lambda layer: Place(rank, processes)
    layer: Any = nn.Module()
    vars(layer).update(members)
    return layer


def load(layer: Any, state: dict[str, torch.Tensor], shard: str | None = None) -> None:
    """As a server does: by the names in the file."""
    parameters = dict(layer.named_parameters())
    for name, tensor in state.items():
        parameters[name].weight_loader(parameters[name], tensor, shard)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("store", STORES)
def test_columns_and_rows(store: str, processes: int) -> None:
    held = bytes_of(store)
    spec = ModuleSpec("linear", SHAPE, False, store)
    assert set(spec.tensors) == set(held.state_dict())
    x, sums = torch.randn(3, 12), torch.zeros(3, 16)
    want = held(x)
    for rank in range(processes):
        columns = LinearMethod([("column", spec)])
        layer = layer_of(columns, rank, processes)
        columns.create_weights(layer, 12, [16 // processes], 12, 16, torch.bfloat16)
        load(layer, held.state_dict())
        columns.process_weights_after_loading(layer)
        parts = list(layer.parts[0])
        assert [part.dtype for part in parts] == [torch.int8, torch.int8, torch.float32]
        size = 16 // processes
        own = want[:, rank * size : (rank + 1) * size]
        torch.testing.assert_close(columns.apply(layer, x), own, rtol=1e-5, atol=1e-6)

        rows = LinearMethod([("row", spec)])
        layer = layer_of(rows, rank, processes)
        size = 12 // processes
        rows.create_weights(layer, size, [16], 12, 16, torch.float32)
        load(layer, held.state_dict())
        rows.process_weights_after_loading(layer)
        sums += rows.apply(layer, x[:, rank * size : (rank + 1) * size])
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-6)


def test_fused_with_a_dense_one_and_one_of_floats() -> None:
    held, plain = bytes_of("int8"), MPOLinear(12, 16, MPOShape((2, 2, 3), (4, 2, 2), 4), False)
    dense = torch.randn(16, 12)
    method = LinearMethod(
        [
            ("q", ModuleSpec("linear", SHAPE, False, "int8")),
            ("k", ModuleSpec("linear", plain.shape, False)),
            ("v", None),
        ]
    )
    layer = layer_of(method, 0, 1)
    method.create_weights(layer, 12, [16, 16, 16], 12, 48, torch.float32)
    load(layer, held.state_dict(), "q")
    load(layer, plain.state_dict(), "k")
    load(layer, {"weight": dense}, "v")
    method.process_weights_after_loading(layer)
    x = torch.randn(5, 12)
    want = torch.cat([held(x), plain(x), x @ dense.t()], -1)
    torch.testing.assert_close(method.apply(layer, x), want, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_missing_or_of_another_size() -> None:
    state = bytes_of("int8").state_dict()
    method = LinearMethod([("name", ModuleSpec("linear", SHAPE, False, "int8"))])
    layer = layer_of(method, 0, 1)
    method.create_weights(layer, 12, [16], 12, 16, torch.float32)
    with pytest.raises(ValueError, match=r"name\.scale_0: expected \[5\].*got \[4\]"):
        load(layer, {"scale_0": torch.ones(4)})
    load(layer, {name: state[name] for name in state if name != "scale_0"})
    with pytest.raises(ValueError, match=r"name\.scale_0: missing from the checkpoint"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_head_of_its_own(processes: int) -> None:
    """Fifty words, padded to 64, of which each process gives its part."""
    shape = MPOShape((4, 3), (10, 5), 6)
    held, x, logits = bytes_of("int8", shape), torch.randn(3, 12), []
    size = 64 // processes
    sizes = {"org_vocab_size": 50, "embedding_dim": 12, "num_embeddings_per_partition": size}
    for rank in range(processes):
        method = VocabularyMethod("lm_head", ModuleSpec("linear", shape, False, "int8"))
        layer = layer_of(method, rank, processes, **sizes)
        method.create_weights(layer, 12, [size], 12, 64, torch.float32)
        load(layer, held.state_dict())
        method.process_weights_after_loading(layer)
        logits.append(method.apply(layer, x))
    found = torch.cat(logits, -1)
    torch.testing.assert_close(found[:, :50], held(x), rtol=1e-5, atol=1e-6)
    assert not found[:, 50:].any()


def rows_of(rank: int, outputs: int = 16, store: str | None = None) -> tuple[Any, ModuleSpec]:
    torch.manual_seed(0)
    shape = MPOShape.low_rank(12, outputs, rank)
    layer: Any = MPOLinear(12, outputs, shape, bias=False).interpolative()
    held = layer if store is None else layer.quantized(STORES[store])
    return held, ModuleSpec("linear", shape, False, store, form=INTERPOLATIVE)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(
    ("rank", "store"), [(1, None), (3, "int8"), (6, None), (11, "float8_e4m3fn"), (12, None)]
)
def test_columns_and_rows_of_interpolative_form(
    rank: int, store: str | None, processes: int
) -> None:
    held, spec = rows_of(rank, store=store)
    assert {name: tuple(t.shape) for name, t in held.state_dict().items()} == spec.tensors
    x, sums = torch.randn(3, 12), torch.zeros(3, 16)
    want = held(x).detach()
    for place in range(processes):
        columns, rows = LinearMethod([("column", spec)]), LinearMethod([("row", spec)])
        layer, size = layer_of(columns, place, processes), 16 // processes
        columns.create_weights(layer, 12, [size], 12, 16, torch.float32)
        load(layer, held.state_dict())
        columns.process_weights_after_loading(layer)
        # Never more than the dense weight.
        assert sum(part.numel() for part in layer.parts[0]) <= 12 * size
        own = want[:, place * size : (place + 1) * size]
        torch.testing.assert_close(columns.apply(layer, x), own, rtol=1e-5, atol=1e-5)

        layer, size = layer_of(rows, place, processes), 12 // processes
        rows.create_weights(layer, size, [16], 12, 16, torch.float32)
        load(layer, held.state_dict())
        rows.process_weights_after_loading(layer)
        sums += rows.apply(layer, x[:, place * size : (place + 1) * size])
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-5)


def test_interpolative_form_fused_with_others() -> None:
    (held, spec), coded, dense = rows_of(4), bytes_of("int8"), torch.randn(16, 12)
    method = LinearMethod(
        [("q", spec), ("k", ModuleSpec("linear", SHAPE, False, "int8")), ("v", None)]
    )
    layer = layer_of(method, 0, 1)
    method.create_weights(layer, 12, [16, 16, 16], 12, 48, torch.bfloat16)
    load(layer, held.state_dict(), "q")
    load(layer, coded.state_dict(), "k")
    load(layer, {"weight": dense}, "v")
    method.process_weights_after_loading(layer)
    assert {part.dtype for part in layer.parts[0]} == {torch.bfloat16}
    x = torch.randn(5, 12)
    found = method.apply(layer, x.bfloat16()).float()
    torch.testing.assert_close(found[:, :16], held(x).detach(), rtol=0.03, atol=0.03)
    with pytest.raises(ValueError, match=r"q\.order: expected \[16\].*got \[15\]"):
        load(layer, {"order": torch.arange(15)}, "q")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("rank", "store"), [(3, None), (11, None), (5, "int8")])
def test_a_head_in_interpolative_form(rank: int, store: str | None, processes: int) -> None:
    held, spec = rows_of(rank, 50, store)
    x, logits, size = torch.randn(3, 12), [], 64 // processes
    sizes = {"org_vocab_size": 50, "embedding_dim": 12, "num_embeddings_per_partition": size}
    for place in range(processes):
        method = VocabularyMethod("lm_head", spec)
        layer = layer_of(method, place, processes, **sizes)
        method.create_weights(layer, 12, [size], 12, 64, torch.float32)
        load(layer, held.state_dict())
        method.process_weights_after_loading(layer)
        logits.append(method.apply(layer, x))
    found = torch.cat(logits, -1)
    torch.testing.assert_close(found[:, :50], held(x).detach(), rtol=1e-5, atol=1e-5)
    assert not found[:, 50:].any()
