"""README and the pages of `docs/` run as they stand, on tiny models of the names they use."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from mkdocs.commands.build import build
from mkdocs.config import load_config
from tiny_glue import save_bert, write_glue
from tiny_text import save_llama, words

import mpop
from mpop.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    "../README.md",
    "tutorials/encoder.md",
    "tutorials/language-model.md",
    "tutorials/layer.md",
    "tutorials/training-loop.md",
    "how-to/language-models.md",
    "how-to/peft.md",
    "how-to/transformers.md",
    "explanations/planner.md",
)
# What makes a command quick; it stands after the page's own arguments, and so in their place.
QUICK = {
    "bench": "--batch-sizes 1 --length 8 --repeats 1",
    "heal": "--tokens 2000",
    "squeeze": "--max-rounds 1 --settle-steps 2",
}

# What a page's commands print among other things.
SAID = {
    "../README.md": "MPO / dense",
    "tutorials/encoder.md": "MPO / dense",
    "tutorials/language-model.md": "mean KL(dense || compressed)",
    "how-to/language-models.md": "squeezed: ",
}
# What they may warn of: as the tutorials say, and torch's own of ONNX.
WARNED = {"../README.md": ("little text",), "tutorials/encoder.md": ("little text", "deprecated")}


def snippets(page: Path) -> list[tuple[str, str]]:
    """Language and text of each, in their order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Arguments of `mpop`."""
    lines = text.replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mpop ")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that the pages name, the current one."""
    monkeypatch.chdir(tmp_path)
    write_glue(tmp_path / "GLUE", train=192, dev=24)
    bare = save_bert(tmp_path / "bert-base-uncased")
    save_bert(tmp_path / "sentence-transformers/all-MiniLM-L6-v2")
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(bare)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bare)
    tokenizer.save_pretrained(tmp_path / "tuned")
    save_llama(tmp_path / "HuggingFaceTB/SmolLM2-135M")
    texts = {"train": words(5_000), "test": words(500)}
    (tmp_path / "corpus.txt").write_text(texts["train"])
    (tmp_path / "test.txt").write_text(texts["test"])
    wiki = {split: {"text": [text]} for split, text in texts.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: wiki)
    encoder = transformers.AutoModel.from_pretrained(bare)
    mpop.compress(encoder)
    mpop.save(encoder, tmp_path / "half-encoder")
    tokenizer.save_pretrained(tmp_path / "half-encoder")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(
    page: str,
    here: Path,
    in_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(subprocess, "run", in_process)
    names: dict[str, object] = {}
    ran = 0
    if "--output tuned" in (DOCS / page).read_text(encoding="utf-8"):
        shutil.rmtree("tuned")  # the page makes it
    for language, text in snippets(DOCS / page):
        if language == "python":
            torch.manual_seed(0)
            exec(compile(text, page, "exec"), names)
            ran += 1
        for each in commands(text) if language == "sh" else ():
            is_of_glue = not {"--task", "sst2", "rte"}.isdisjoint(each)
            glue = ["--data-dir", "GLUE"] * is_of_glue
            assert main([*each, *glue, *QUICK.get(each[0], "").split()]) == 0, each
            ran += 1
    assert ran
    said = capsys.readouterr()
    assert SAID.get(page, "") in said.out
    expected = WARNED.get(page, ())
    for line in said.err.splitlines():
        assert "warning" not in line or any(each in line for each in expected), line


def test_every_example_that_cuts_sees_text() -> None:
    for page in (*DOCS.rglob("*.md"), ROOT / "README.md"):
        for each in (each for _, text in snippets(page) for each in commands(text)):
            budgets = {"--compression", "--ranks", "--rel-error"}
            assert budgets.isdisjoint(each) or "--calibrate" in each, each


def test_the_site(tmp_path: Path) -> None:
    """Formulas are rendered, and pictures lie where pages look for them; links are lint's."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), plugins=["search"])
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    pages = list(tmp_path.rglob("*.html"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "arithmatex" not in text and "$$" not in text, page
        for picture in re.findall(r'<img [^>]*src="([^"]+)"', text):
            assert (page.parent / picture).is_file(), (page, picture)
    formulas = (tmp_path / "explanations/rows/index.html").read_text(encoding="utf-8")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in formulas
    reference = (tmp_path / "reference/command-line/index.html").read_text(encoding="utf-8")
    assert "usage: mpop squeeze" in reference
