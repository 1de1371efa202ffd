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

import mpop
from mpop.cli import main

DOCS = Path(__file__).parents[2] / "docs"


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
    encoder = transformers.AutoModel.from_pretrained(bare)
    mpop.compress(encoder)
    mpop.save(encoder, tmp_path / "half-encoder")
    tokenizer.save_pretrained(tmp_path / "half-encoder")
    return tmp_path


@pytest.mark.parametrize("page", ["index.md", "peft.md", "planner.md", "transformers.md"])
def test_python(page: str, here: Path) -> None:
    names: dict[str, object] = {}
    blocks = snippets(page, "python")
    assert blocks
    for block in blocks:
        torch.manual_seed(0)
        exec(compile(block, page, "exec"), names)


def test_shell(
    here: Path, capsys: pytest.CaptureFixture[str], in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quickstart's task, from the dense model to the bench."""
    monkeypatch.setattr(subprocess, "run", in_process)
    lines = [
        line.split("#")[0]
        for block in snippets("index.md", "sh")
        for line in block.splitlines()
        if line.startswith("mpop ")
    ]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] != "bench":
            words += ["--data-dir", "GLUE"]
        quick = ["--batch-sizes", "1", "--length", "8", "--repeats", "1"]
        assert main([*words, *(quick if words[0] == "bench" else [])]) == 0, line
    assert "MPO / dense" in capsys.readouterr().out
