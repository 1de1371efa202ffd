"""The pages of `docs/`: their snippets run as they stand, on tiny models of the names they use."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_glue import save_bert, write_glue
from tiny_text import save_llama, words

import mpop
from mpop.cli import main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("index.md", "language-models.md", "peft.md", "planner.md", "transformers.md")


def snippets(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that the pages name, the current one."""
    monkeypatch.chdir(tmp_path)
    write_glue(tmp_path / "GLUE", train=192, dev=24)
    bare = save_bert(tmp_path / "bert-base-uncased")
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(bare)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bare)
    tokenizer.save_pretrained(tmp_path / "tuned")
    save_llama(tmp_path / "HuggingFaceTB/SmolLM2-135M")
    (tmp_path / "corpus.txt").write_text(words(5_000))
    (tmp_path / "test.txt").write_text(words(500))
    encoder = transformers.AutoModel.from_pretrained(bare)
    mpop.compress(encoder)
    mpop.save(encoder, tmp_path / "half-encoder")
    tokenizer.save_pretrained(tmp_path / "half-encoder")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_python(page: str, here: Path) -> None:
    names: dict[str, object] = {}
    blocks = snippets(page, "python")
    assert blocks
    for block in blocks:
        torch.manual_seed(0)
        exec(compile(block, page, "exec"), names)


def commands(page: str) -> list[list[str]]:
    """Arguments of `mpop`."""
    lines = "\n".join(snippets(page, "sh")).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mpop ")]


def test_shell(
    here: Path, capsys: pytest.CaptureFixture[str], in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quickstart's task, from the dense model to the bench."""
    monkeypatch.setattr(subprocess, "run", in_process)
    found = commands("index.md")
    assert len(found) >= 5
    quick = ["--batch-sizes", "1", "--length", "8", "--repeats", "1"]
    for each in found:
        more = quick if each[0] == "bench" else ["--data-dir", "GLUE"]
        assert main([*each, *more]) == 0, each
    assert "MPO / dense" in capsys.readouterr().out


def test_a_language_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"heal": ("--tokens", "2000"), "squeeze": ("--max-rounds", "1", "--settle-steps", "2")}
    for each in commands("language-models.md"):
        assert main([*each, *quick.get(each[0], ())]) == 0, each
    text = capsys.readouterr()
    assert "mean KL(dense || compressed)" in text.out and "warning" not in text.err


def test_every_example_that_cuts_sees_text() -> None:
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for each in commands(str(page)):
            budgets = {"--compression", "--ranks", "--rel-error"}
            assert budgets.isdisjoint(each) or "--calibrate" in each, each
