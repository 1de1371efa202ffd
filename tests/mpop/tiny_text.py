"""A tiny Llama with a tokenizer that begins a text with BOS, and texts of its words."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers as hf
from tiny_glue import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

TOKENS = ["<s>", "</s>", "<unk>", ".", "user", "assistant", *WORDS]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


def tokenizer(chat: str | None = CHAT) -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({token: k for k, token in enumerate(TOKENS)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = chat
    return made


def llama(vocabulary: int = len(TOKENS)) -> hf.LlamaForCausalLM:
    """The same at every call; 64 positions."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return hf.LlamaForCausalLM(config).eval()


def save_llama(folder: Path) -> Path:
    """The model and the tokenizer; returns `folder`."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """A text of so many tokens without BOS."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))
