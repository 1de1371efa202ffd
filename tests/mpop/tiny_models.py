"""Small models with random weights, one or two for each architecture that is supported."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn

from mpop.models.matrices import mpo_modules

VOCABULARY = 50

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
_MOBILE = {
    **_BERT,
    "embedding_size": 8,
    "intra_bottleneck_size": 12,
    "true_hidden_size": 12,
    "num_feedforward_networks": 2,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 20}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 20,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_MOE = {**_BERT, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
_SMALL = {"embedding_size": 16}
_PAD = {"pad_token_id": 0}

BUILDERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT)),
    "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT)),
    "roberta-mlm": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(**_DISTILBERT)
    ),
    "distilbert-mlm": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**_DISTILBERT)),
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**_BERT, **_SMALL)),
    "albert-mlm": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**_BERT, **_SMALL)),
    "mobilebert": lambda: hf.MobileBertForSequenceClassification(hf.MobileBertConfig(**_MOBILE)),
    "mobilebert-mlm": lambda: hf.MobileBertForMaskedLM(hf.MobileBertConfig(**_MOBILE)),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**_BERT, **_SMALL)),
    "electra-mlm": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_BERT, **_SMALL)),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**_GPT2, **_PAD)),
    "gpt2-lm": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_BERT, num_key_value_heads=1)),
    "llama-tied": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_BERT, **_PAD, tie_word_embeddings=True)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_T5, feed_forward_proj="gated-gelu")
    ),
    "t5-classifier": lambda: hf.T5ForSequenceClassification(hf.T5Config(**_T5)),
    "bart-classifier": lambda: hf.BartForSequenceClassification(hf.BartConfig(**_BART)),
}

# With experts in one tensor; in the second the other layer has none, in the third they have biases.
MIXTURES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_MOE, num_local_experts=4)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_MOE, num_experts=5, moe_intermediate_size=20, mlp_only_layers=[1])
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_MOE, **_PAD, num_local_experts=4)),
}


def build(name: str) -> hf.PreTrainedModel:
    """A model in evaluation mode, the same at every call, with weights of usual size."""
    torch.manual_seed(0)
    model = {**BUILDERS, **MIXTURES}[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two texts that end in token 1, the end of a text in a T5's eyes."""
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_generator = isinstance(model, hf.T5ForConditionalGeneration)
    return {**batch, "decoder_input_ids": ids[:, :5]} if is_generator else batch


def logits(model: hf.PreTrainedModel) -> Tensor:
    return model(**inputs(model)).logits


def batches(count: int = 8, rows: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """Ids with padding on the right."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 50, (rows, length), generator=generator)
        mask = torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=generator)
        made.append({"input_ids": ids * mask, "attention_mask": mask.long()})
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what it holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """It is dense, and holds what it did."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(mpo_modules(model))
