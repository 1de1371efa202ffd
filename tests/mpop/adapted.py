"""What tests of adapters share: models, batches, a few steps of training, what must not change."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import PeftModel
from tiny_models import build, inputs
from torch import Tensor

import mpop

SEQ_CLS: Any = {"task_type": "SEQ_CLS"}
FILE = "adapter_model.safetensors"


def compressed(name: str = "bert", **config: Any) -> hf.PreTrainedModel:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(**config))
    return model


def output(model: Any) -> Tensor:
    batch = inputs(model.get_base_model() if isinstance(model, PeftModel) else model)
    with torch.no_grad():
        return model(**batch).logits


def train(model: Any, steps: int = 3) -> Tensor:
    """The output after a few steps of AdamW on what requires a gradient."""
    batch = inputs(model.get_base_model() if isinstance(model, PeftModel) else model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    return output(model)


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that an error must leave as it was."""
    parameters = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    return {"modules": [(n, type(m)) for n, m in model.named_modules()], "parameters": parameters}


def assert_untouched(model: torch.nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    assert now["modules"] == before["modules"]
    assert now["parameters"].keys() == before["parameters"].keys()
    for name, (value, trains) in before["parameters"].items():
        assert torch.equal(now["parameters"][name][0], value), name
        assert now["parameters"][name][1] == trains, name


def changed(model: Any) -> Any:
    """The model with other adapters, each its own, which none is after a few steps of training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mpo_light_cores." in name or ".lora_" in name or ".modules_to_save." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * parameter.abs().mean().clamp_min(0.2) * noise)
    return model


def rows(model: Any, count: int) -> dict[str, Tensor]:
    """A batch of texts of several lengths, no two alike."""
    ids = torch.randint(2, 50, (count, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}
