"""A hundred architectures of transformers: compressed at full rank, saved and loaded.

Each gives what it gave dense, with its matrices as cores or with a reason why they stayed dense.
`make survey` runs all of them; the tests run one of each kind.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import mpop
from mpop.models.left import left_dense
from mpop.models.matrices import mpo_modules

# Sizes by the names that configurations have for them.
SMALL: dict[str, int | float] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "projection_dim", "conv_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "state_size"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("mamba_d_state", "rotary_dim"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "type_vocab_size"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("d_kv", "head_dim", "patch_size", "global_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("embedding_size", "bottleneck_size", "q_lora_rank", "kv_lora_rank"), 16),
    **{"mamba_n_groups": 1, "image_size": 32, "num_channels": 3, "num_mel_bins": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}


def small(cls: type[hf.PreTrainedConfig]) -> hf.PreTrainedConfig:
    """A configuration of this class with small sizes."""
    default = cls().to_dict()
    sizes: dict[str, Any] = {
        key: value
        for key, value in SMALL.items()
        if (key in default or key in cls.attribute_map)
        and not isinstance(default.get(key), list | dict | str)
    }
    for key, part in cls.sub_configs.items():
        if part is not hf.AutoConfig:
            sizes[key] = small(part).to_dict()
    return cls(**sizes)


def made(name: str) -> hf.PreTrainedModel:
    cls = getattr(hf, name)
    torch.manual_seed(0)
    model = cls(small(cls.config_class)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch_for(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    """Texts, images or sounds, whichever the model is called with."""
    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 8), generator=generator)
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 32)
    offered = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :5],
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "input_values": torch.randn(2, 800, generator=generator),
        "input_features": torch.randn(2, 16, 64, generator=generator),
    }
    is_text = "input_ids" in taken
    both = "pixel_values" in taken and "logit_scale" in dict(model.named_parameters())
    for key in ("pixel_values", "input_values", "input_features"):
        if is_text and not both:
            offered.pop(key)
    if not is_text:
        offered.pop("attention_mask")
    return {key: value for key, value in offered.items() if key in taken}


@torch.no_grad()
def result(model: hf.PreTrainedModel) -> Tensor:
    torch.manual_seed(2)  # of what hashes at random
    output = model(**batch_for(model))
    return output.logits if "logits" in output else output[0]


QUICK, MORE = (
    part.partition(":")[2].split()
    for part in Path(__file__).with_name("architectures.txt").read_text().split("\n\n")
)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.survey) for name in MORE)]
)
def test_full_rank_gives_what_dense_gave(name: str, tmp_path: Path) -> None:
    model = made(name)
    right = result(model)
    close = 1e-4 * float(right.abs().max())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "most of this .* stays dense")
        report = mpop.compress(model)
    cut = result(model)
    torch.testing.assert_close(cut, right, rtol=0, atol=close)
    held = sum(core.numel() for _, module in mpo_modules(model) for core in module.cores)
    assert held + sum(part.parameters for part in report.left) == report.parameters_after
    mpop.save(model, tmp_path / "m")
    again = mpop.load(tmp_path / "m").eval()
    assert left_dense(again) == left_dense(model)
    torch.testing.assert_close(result(again), cut, rtol=0, atol=close / 10)
    torch.testing.assert_close(result(mpop.merge(again)), right, rtol=0, atol=close)
