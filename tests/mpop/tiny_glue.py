"""A tiny BERT with its tokenizer, and tiny data of every GLUE task in GLUE's own layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from mpop.data.glue import TASKS, Task

torch.set_num_threads(1)  # matrices this small only lose by sharing

_TEXT = "a the film plot cast dog cat is was not never good bad fine poor sat ran slept here"
WORDS = _TEXT.split()
GLUE_DIR = Path(
    os.environ.get("MPOP_GLUE_DIR", Path(__file__).parents[2].with_name("shared") / "glue")
)
HEADERS = {
    "cola": None,
    "sst2": "sentence label",
    "mrpc": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
    "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
}


def header(task: Task) -> list[str]:
    """The columns of the task's files as GLUE distributes them."""
    text = HEADERS[task.name]
    if text is None:
        return list(task.header)
    return text.split("," if "," in text else None)


def rows(task: Task, count: int) -> list[list[str]]:
    """Rows whose label can be read off the text: the fields of `header(task)`."""
    labels = task.file_labels or task.labels or ("0.5", "2.0", "4.5")
    made = []
    for i in range(count):
        label = i % len(labels)
        texts = [
            f"the {WORDS[2 + (i + k) % 5]} is {WORDS[11 + label]} {WORDS[i % 11]} ."
            for k in range(len(task.text_columns))
        ]
        values = dict(zip(task.text_columns, texts, strict=True))
        values[task.label_column] = labels[label]
        made.append([values.get(column, "x") for column in header(task)])
    return made


def write_tsv(path: Path, task: Task, fields: list[list[str]]) -> None:
    """Write rows as the task's files are written: with a header, except for CoLA."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = fields if task.header else [header(task), *fields]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def write_glue(folder: Path, train: int = 48, dev: int = 24) -> Path:
    """All nine tasks; returns `folder`."""
    for task in TASKS.values():
        for split, name in task.layouts[0].items():
            count = train if split == "train" else dev
            write_tsv(folder / task.folder / name, task, rows(task, count))
    return folder


def save_bert(folder: Path, dropout: float = 0.1) -> Path:
    """A BertModel of two narrow layers with random weights; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(
        folder
    )
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, pad: str | None = "<pad>", side: str = "right") -> Path:
    """One of the same words for any model: a text of T5's kind, that ends; returns `folder`.

    Args:
        pad: the padding token, 0; None for a tokenizer without.
        side: where it pads.
    """
    tokens = ["<pad>", "</s>", "<unk>", ".", *WORDS]
    words = Tokenizer(WordLevel({token: k for k, token in enumerate(tokens)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        padding_side=side,
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


def real_glue() -> Path:
    """The folder of real GLUE files, or a skip that says how to give one."""
    if not GLUE_DIR.is_dir():
        pytest.skip(f"no GLUE files in {GLUE_DIR}; set MPOP_GLUE_DIR to a folder of them")
    return GLUE_DIR


def last_json(text: str) -> dict:
    """The object on the last line."""
    return json.loads(text.splitlines()[-1])
