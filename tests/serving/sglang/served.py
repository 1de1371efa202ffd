"""SGLang's own models with the cores of a checkpoint, and their logits.

SGLang's attention needs its scheduler and cache of keys and values: torch's takes its place, one
whole prompt at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.models.gpt2 import GPT2LMHeadModel
from torch import Tensor

from mpop_serving import register_sglang


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


RadixAttention.forward = attend  # type: ignore[method-assign]
register_sglang()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Of one prompt ``[length]``: ``[length, ids of this process]``, with the padding's."""
    batch = MagicMock(forward_mode=ForwardMode.EXTEND, attn_cp_metadata=None, input_ids=ids)
    body = model.transformer if isinstance(model, GPT2LMHeadModel) else model.model
    hidden = body(ids, torch.arange(len(ids)), batch)
    return model.logits_processor._compute_lm_head(hidden, model.lm_head)
