"""SGLang's own models, with their cores loaded, give transformers' logits; attention apart.

SGLang's attention needs its scheduler and cache of keys and values: torch's takes its place, one
whole prompt at a time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import sglang.srt.layers.quantization as quantization
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.models.gpt2 import GPT2LMHeadModel
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

import mpop
from mpo_kernels import MPOShape, reconstruct
from mpo_kernels.testing import random_cores
from mpop.config import FORMAT_VERSION, ModuleSpec
from mpop_sglang.quantization import MPOQuantizationConfig

VOCABULARY = 150
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
BUILDERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "llama-biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, attention_bias=True)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=96, n_layer=2, n_head=2, n_positions=128)
    ),
}
SGLANG = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "gpt2": GPT2LMHeadModel}
# Fused matrices with cores of other numbers, sizes that are padded, and dense ones among them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "compression": 0.6,
            "include": ["model.*", "lm_head"],
            "exclude": ["*.0.self_attn.k_proj", "*.1.mlp.up_proj"],
            "overrides": {
                "*.v_proj": {"num_cores": 2},
                "*.q_proj": {"in_factors": (9, 11), "out_factors": (10, 13)},
            },
        },
    ),
    "factors chosen": ("llama", {"compression": 0.6, "factors": "auto"}),
    "biases": ("llama-biases", {"num_cores": 3, "ranks": 20, "embeddings": False}),
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


def save(path: Path, name: str, **options: Any) -> hf.PreTrainedModel:
    """Write a compressed model; returns the dense model with the same weights."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mpop.compress(model, mpop.CompressionConfig(**options))
    mpop.save(model, path)
    return mpop.merge(copy.deepcopy(model))


def load(path: Path) -> Any:
    """What SGLang's loader makes of a folder."""
    model_config = ModelConfig(str(path), dtype="float32")
    assert model_config.quantization == "mpo"
    loader = DefaultModelLoader(LoadConfig())
    return loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))


def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Causal attention within one prompt."""
    heads = (self.tp_q_head_num, self.tp_k_head_num, self.tp_v_head_num)
    q, k, v = (
        x.view(1, -1, n, self.head_dim).transpose(1, 2)
        for x, n in zip((q, k, v), heads, strict=True)
    )
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=self.scaling
    )
    return y.transpose(1, 2).flatten(2)[0]


@pytest.fixture(autouse=True)
def attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RadixAttention, "forward", attend)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    batch = MagicMock(forward_mode=ForwardMode.EXTEND, attn_cp_metadata=None)
    body = model.transformer if isinstance(model, GPT2LMHeadModel) else model.model
    hidden = body(ids, torch.arange(len(ids)), batch)
    found = model.logits_processor._compute_lm_head(hidden, model.lm_head)
    return found[:, :VOCABULARY]


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    dense = save(tmp_path, name, **options)
    model = load(tmp_path)
    ids = torch.randint(VOCABULARY, (11,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = dense(ids[None]).logits[0]
    torch.testing.assert_close(logits(model, ids), want, rtol=1e-4, atol=1e-4)
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


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def pop_a_core(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.cores.2"]


def newer(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] = FORMAT_VERSION + 1


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("llama", lambda path: edit_config(path, newer), "upgrade mpop"),
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
