"""Compressed models where transformers' own tools use them: generation, compile, pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_glue import save_bert
from tiny_models import build, logits

import mpop
from mpop.models.matrices import mpo_modules

HALF = mpop.CompressionConfig(compression=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    source = save_bert(path / "dense", dropout=0.0)
    model = hf.AutoModel.from_pretrained(source)
    mpop.compress(model, HALF)
    mpop.save(model, path / "mpo")
    hf.AutoTokenizer.from_pretrained(source).save_pretrained(path / "mpo")
    return path / "mpo"


@pytest.mark.parametrize("name", ["gpt2-lm", "llama", "llama-tied", "t5"])
def test_generation_with_a_cache_is_that_of_the_dense_weights(name: str, tmp_path: Path) -> None:
    model = build(name)
    mpop.compress(model, HALF)
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path).eval()
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(4))
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    found, uncached = (
        loaded.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached, **settings)
        for cached in (True, False)
    )
    dense = mpop.merge(model).eval()
    expected = dense.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert list(mpo_modules(loaded)) and torch.equal(found, expected)
    assert torch.equal(uncached, expected) and found.shape[1] >= 9


def test_compiled() -> None:
    model = build("llama")
    # A block: what compiling takes grows with their number.
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    mpop.compress(model, HALF)
    with torch.no_grad():
        expected = logits(model)
        torch.testing.assert_close(
            logits(torch.compile(model, fullgraph=True)), expected, atol=1e-5, rtol=1e-4
        )


def test_pipelines(folder: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    loaded = mpop.load(folder)
    pipeline = hf.pipeline("feature-extraction", model=str(folder), device="cpu")
    with torch.no_grad():
        expected = loaded(**tokenizer("the film is good .", return_tensors="pt"))
    found = torch.tensor(pipeline("the film is good ."))
    torch.testing.assert_close(found, expected.last_hidden_state)


def test_sentence_transformers(folder: Path, tmp_path: Path) -> None:
    words = Transformer(str(folder))
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    encoder = SentenceTransformer(modules=[words, pooling], device="cpu")
    texts = ["the film is good .", "a dog sat"]
    found = encoder.encode(texts, convert_to_tensor=True)
    batch = hf.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = mpop.load(folder)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(found, (hidden * mask).sum(1) / mask.sum(1))
    encoder.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert list(mpo_modules(again[0].model))
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), found)
