"""SGLang's own models, with their cores loaded, give transformers' logits; attention apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.layers.quantization as quantization
import torch
from saved import edit_config, edit_tensors
from served import load, logits
from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from mpo_kernels import MPOShape, reconstruct
from mpo_kernels.testing import random_cores
from mpop.models.config import ModuleSpec
from mpop_serving.sglang import MPOQuantizationConfig
from tests.serving.checkpoints import CASES, VOCABULARY, newer, save

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **CASES,
    "biases": ("llama-attention-biases", {"num_cores": 3, "ranks": 20, "embeddings": False}),
    "tied": ("llama-tied", {"num_cores": 3, "rel_error": 0.1}),
    "another model": ("qwen3-tied", {"compression": 0.8}),
    # Its table asks for no configuration.
    "fused on disk": ("gpt2", {"compression": 0.9, "embeddings": False}),
}


def test_sglang_finds_it() -> None:
    (entry,) = entry_points(group="sglang.srt.plugins", name="mpo")
    entry.load()()
    found = quantization.get_quantization_config("mpo")
    entry.load()()
    assert quantization.get_quantization_config("mpo") is found
    assert "mpo" in QUANTIZATION_CHOICES


@pytest.mark.parametrize("case", MODELS)
def test_logits(case: str, tmp_path: Path) -> None:
    name, options = MODELS[case]
    dense = save(tmp_path, name, **options)
    model = load(tmp_path)
    ids = torch.randint(VOCABULARY, (11,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = dense(ids[None]).logits[0]
    found = logits(model, ids)[:, :VOCABULARY]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert any(hasattr(module, "parts") for module in model.modules())


def as_one_of(rank: int, processes: int) -> AbstractContextManager[Any]:
    """Layers built within take this process for one of several; nothing is sent between them."""
    group = SimpleNamespace(rank_in_group=rank, world_size=processes)
    groups = {}
    for name in ("tp", "attn_tp", "moe_tp"):
        groups |= {f"{name}_rank": rank, f"{name}_size": processes, f"{name}_group": group}
    return get_parallel().override(**groups)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_of_several_processes_are_the_whole(processes: int) -> None:
    """Eight heads of size two and two of keys and values, dense values; outputs, then inputs."""
    shapes = {
        "q_proj": MPOShape((3, 4), (8, 2), 4),
        "k_proj": MPOShape((2, 6), (4, 1), 2),
        "o_proj": MPOShape((8, 2), (3, 4), 5),
    }
    cores = {name: random_cores(shape) for name, shape in shapes.items()}
    dense = {name: reconstruct(each) for name, each in cores.items()}
    dense["v_proj"] = torch.randn(4, 12)
    x, y = torch.randn(5, 12), torch.randn(5, 16)
    parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    sums = torch.zeros(5, 12)
    for rank in range(processes):
        specs = {name: ModuleSpec("linear", shape, False) for name, shape in shapes.items()}
        config = MPOQuantizationConfig(specs)
        with as_one_of(rank, processes):
            qkv = QKVParallelLinear(12, 2, 8, 2, bias=False, quant_config=config, prefix="qkv_proj")
            row = RowParallelLinear(
                16, 12, bias=False, reduce_results=False, quant_config=config, prefix="o_proj"
            )
            for name in "qk":
                for parameter, core in zip(qkv.cores, cores[f"{name}_proj"], strict=True):
                    parameter.weight_loader(parameter, core, name)
            qkv.weight.weight_loader(qkv.weight, dense["v_proj"], "v")
            for parameter, core in zip(row.cores, cores["o_proj"], strict=True):
                parameter.weight_loader(parameter, core)
            for layer in (qkv, row):
                layer.quant_method.process_weights_after_loading(layer)
            sizes = [16 // processes, *[max(4 // processes, 2)] * 2]
            for name, part in zip("qkv", qkv(x)[0].split(sizes, -1), strict=True):
                parts[name].append(part)
            width = 16 // processes
            sums += row(y[:, rank * width : (rank + 1) * width])[0]
    for name, found in parts.items():
        # More processes than heads of keys and values: neighbours hold the same.
        shares = found if name == "q" else found[:: max(processes // 2, 1)]
        want = x @ dense[f"{name}_proj"].t()
        torch.testing.assert_close(torch.cat(shares, -1), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums, y @ dense["o_proj"].t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_shares_of_a_vocabulary(kind: str) -> None:
    """Fifty words, padded to 64, of which each of two processes has a range."""
    shape = MPOShape((2, 5, 5), (3, 2, 2), 7)
    cores = random_cores(shape)
    rows = reconstruct(cores).t()
    if kind == "linear":
        shape, cores = shape.transpose(), [core.transpose(1, 2) for core in cores]
    specs, x = {"words": ModuleSpec(kind, shape, False)}, torch.randn(3, 12)
    logits, found = [], torch.zeros(50, 12)
    for rank in range(2):
        cls = VocabParallelEmbedding if kind == "embedding" else ParallelLMHead
        with as_one_of(rank, 2):
            layer = cls(50, 12, quant_config=MPOQuantizationConfig(specs), prefix="words")
            for parameter, core in zip(layer.cores, cores, strict=True):
                parameter.weight_loader(parameter, core)
            layer.quant_method.process_weights_after_loading(layer)
            logits.append(layer.quant_method.apply(layer, x))
            if kind == "embedding":
                found += layer._embed_local_shard(torch.arange(50))
    torch.testing.assert_close(torch.cat(logits, -1)[:, :50], x @ rows.t(), rtol=1e-4, atol=1e-5)
    if kind == "embedding":
        torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-5)


def pop_a_core(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.cores.2"]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("llama", newer, "upgrade mpop"),
        (
            "llama",
            lambda path: edit_tensors(path, pop_a_core),
            "up_proj.cores.2: missing from the checkpoint",
        ),
    ],
)
def test_what_is_wrong_is_said(
    name: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save(tmp_path, name)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_model_that_holds_nothing_of_it_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama", include=["model.embed_tokens"])
    rename = {"model.embed_tokens": "model.other"}

    def edit(config: dict[str, Any]) -> None:
        modules = config["quantization_config"]["modules"]
        for old, new in rename.items():
            modules[new] = {**modules.pop(old), "kind": "linear"}

    edit_config(tmp_path, edit)
    with pytest.raises(ValueError, match=r"model\.other: no layer that SGLang builds"):
        load(tmp_path)


def test_factors_that_do_not_divide_say_what_to_do() -> None:
    specs = {"up_proj": ModuleSpec("linear", MPOShape((3, 4), (3, 4)), False)}
    with as_one_of(0, 2), pytest.raises(ValueError, match="mpop compress --tensor-parallel 2"):
        ColumnParallelLinear(
            12, 12, bias=False, quant_config=MPOQuantizationConfig(specs), prefix="up_proj"
        )
