"""Text as batches: every source, how it is packed, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_text import tokenizer, words
from transformers import AutoTokenizer

import mpop
from mpop.data import text as text_module
from mpop.data.text import read_text

TEXTS = [words(90, 1), words(70, 2)]
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "good ."}]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def packed(source: str | Path, **options: Any) -> torch.Tensor:
    batches = mpop.text_batches(tokenizer(), source, **options)
    assert all(set(batch) == {"input_ids"} for batch in batches)
    return torch.cat([batch["input_ids"] for batch in batches])


def test_windows_begin_with_bos_and_do_not_overlap(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(words(163), encoding="utf-8")
    whole = tokenizer()(source.read_text(), add_special_tokens=False).input_ids
    found = packed(source, samples=100, seqlen=9)
    assert found.shape == (163 // 8, 9) and found.dtype == torch.int64
    assert (found[:, 0] == 0).all() and (found[:, 1:] != 0).all()
    # Some start within the remainder, and from there each window once, in another order.
    grids = [[whole[at : at + 8] for at in range(start, start + 160, 8)] for start in range(4)]
    assert sorted(found[:, 1:].tolist()) in map(sorted, grids)
    assert found[:, 1:].tolist() not in grids


def test_the_choice_is_the_seeds(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(words(400), encoding="utf-8")
    options = {"samples": 5, "seqlen": 10}
    first = packed(source, **options)
    assert len(first) == 5
    torch.testing.assert_close(packed(source, **options, batch_size=2), first)
    assert not torch.equal(packed(source, **options, seed=1), first)
    sizes = [len(b["input_ids"]) for b in mpop.text_batches(tokenizer(), source, **options)]
    assert sizes == [1] * 5
    batches = mpop.text_batches(tokenizer(), source, **options, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]


def test_a_bert_reads_cls_and_sep(bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(words(40), encoding="utf-8")
    made = AutoTokenizer.from_pretrained(bert)
    (batch, *_) = mpop.text_batches(made, source, seqlen=12)
    (ids,) = batch["input_ids"].tolist()
    assert (ids[0], ids[-1]) == (made.cls_token_id, made.sep_token_id)
    assert not {*ids[1:-1]} & {*made.all_special_ids}


def test_sources(tmp_path: Path) -> None:
    made = tokenizer()
    plain = tmp_path / "b.txt"
    plain.write_bytes("\ufeffthe café\r\n".encode())
    assert read_text(made, plain) == "the café\r\n"
    lines = write(tmp_path / "a.jsonl", {"text": TEXTS[0], "id": 1}, {"text": TEXTS[1]})
    assert read_text(made, lines) == "\n\n".join(TEXTS)
    assert read_text(made, tmp_path) == "\n\n".join([*TEXTS, "the café\r\n"])
    chat = write(tmp_path / "chat.jsonl", {"messages": CHAT})
    assert read_text(made, str(chat)) == "user the cat sat </s>assistant good . </s>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "missing file"),
        ("a.csv", b"a,b", r"expected a .txt or .jsonl file or a folder of them"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"\xff\xfea", "a.txt is not UTF-8"),
        ("a.txt", b"\x7fELF\0\0", "a.txt: expected text, got binary data"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "the"}\n\n{"text"', "a.jsonl:3: expected an object of JSON"),
        ("a.jsonl", b'{"body": "the", "id": 1}', "expected a text .* got body of str, id of int"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: expected a text .* got text of NoneType"),
        ("a.jsonl", b'{"messages": "a"}', "messages of a chat, a list, got messages of str"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: expected an object of JSON"),
        ("a.jsonl", b'{"text": "the \\ud83d cat"}', "jsonl:1: expected text, got half of a"),
        ("a.jsonl", b'["the"]', "a.jsonl:1: expected a text .* got list"),
        ("a.jsonl", b'{"messages": ["the"]}', "jsonl:1: messages that the chat template refuses"),
        ("a.txt", b"the cat sat", r"a.txt: expected at least the 7 tokens of one window, got 3"),
    ],
)
def test_bad_sources(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        mpop.text_batches(tokenizer(), tmp_path / name, seqlen=8)
    assert "\n" not in str(raised.value)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the name of a text, got an empty one"):
        read_text(tokenizer(), "")
    with pytest.raises(ValueError, match=r"expected .txt or .jsonl files in the folder"):
        read_text(tokenizer(), tmp_path)
    chat = write(tmp_path / "chat.jsonl", {"messages": CHAT})
    with pytest.raises(
        ValueError, match=r"chat.jsonl:1: expected a tokenizer with a chat template"
    ):
        read_text(tokenizer(chat=None), chat)
    for name in ("samples", "seqlen", "batch_size"):
        with pytest.raises(ValueError, match="expected samples, seqlen and batch_size of at least"):
            mpop.text_batches(tokenizer(), chat, **{name: 0})
    with pytest.raises(ValueError, match="expected a seqlen above the 1 tokens that the tokenizer"):
        mpop.text_batches(tokenizer(), chat, seqlen=1)


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_module, "hub_reachable", lambda: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        rows = datasets.Dataset.from_dict({"text": TEXTS + ["the"] * 10})
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(tokenizer(), "owner/name:raw", len(TEXTS[0]) + 1) == "\n\n".join(TEXTS)
    assert asked == [(("owner/name", "raw"), {"split": "train", "streaming": True})]
    # A folder of that name goes first.
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/a.txt").write_text("mine")
    assert read_text(tokenizer(), "owner/name") == "mine"

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no such\ndata set")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"^other: expected .* cannot be loaded \(no such\)$"):
        read_text(tokenizer(), "other")
    monkeypatch.setattr(text_module, "hub_reachable", lambda: False)
    with pytest.raises(
        ValueError, match=r"^other: expected .* a data set of the hub, which cannot"
    ):
        read_text(tokenizer(), "other")
