"""What shares a matrix, and what does not, whatever the configuration says of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from saved import edit_tensors
from tiny_models import build, inputs, logits
from torch import nn

import mpop
from mpo_kernels import MPOEmbedding, MPOLinear
from mpop.models.matrices import compressed_matrices


def _apart(model: hf.PreTrainedModel, name: str) -> None:
    """Give a module parameters of its own, and train it."""
    part = copy.deepcopy(model.get_submodule(name))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    model.set_submodule(name, part)


def _no_tie(model: hf.PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False


def _share(model: hf.PreTrainedModel) -> None:
    """Tie a head that the configuration does not."""
    model.lm_head.weight = model.model.embed_tokens.weight


def _head_of_another_kind(model: hf.PreTrainedModel) -> None:
    weight = torch.randn(model.config.vocab_size, model.config.hidden_size)
    model.lm_head = nn.Linear(*weight.shape[::-1], bias=False)
    model.lm_head.weight = nn.Parameter(weight)


Change = Callable[[hf.PreTrainedModel], Any]


def _compress(**options: Any) -> Change:
    return lambda model: mpop.compress(model, mpop.CompressionConfig(num_cores=3, **options))


def _copied(*names: str) -> Change:
    return lambda model: [_apart(model, name) for name in names]


DENSE_EMBEDDINGS = _compress(embeddings=False)
HEAD = ("lm_head",)
CASES: dict[str, tuple[str, list[Change]]] = {
    "an embedding trained apart": ("llama-tied", [_compress(), _copied("model.embed_tokens")]),
    "a head trained apart": ("llama-tied", [_compress(), _copied(*HEAD)]),
    "and so configured": ("llama-tied", [_compress(), _copied(*HEAD), _no_tie]),
    "before it is compressed": ("llama-tied", [_copied(*HEAD), _compress()]),
    "both compressed": ("llama-tied", [_copied(*HEAD), _compress(include=["lm_head", "*embed*"])]),
    "the head alone": ("llama-tied", [_copied(*HEAD), _compress(include=["lm_head"])]),
    "both dense": ("llama-tied", [_copied(*HEAD), DENSE_EMBEDDINGS]),
    "a dense head in its place": ("llama-tied", [_compress(), _head_of_another_kind]),
    "copied and the same": (
        "llama-tied",
        [_compress(), lambda model: model.set_submodule("lm_head", copy.deepcopy(model.lm_head))],
    ),
    "tied and not so configured": ("llama", [_share, _compress()]),
    "tied, dense, and not so configured": ("llama", [_share, DENSE_EMBEDDINGS]),
    "T5 1.1": ("t5", [_copied(*HEAD), _compress()]),
    "T5, later": ("t5", [_compress(), _copied(*HEAD)]),
    "T5, encoder and decoder": (
        "t5",
        [_compress(), _copied("encoder.embed_tokens", "decoder.embed_tokens")],
    ),
    "T5, the table that all share": ("t5", [_compress(), _copied("shared")]),
    "BERT": ("bert-mlm", [_compress(), _copied("cls.predictions.decoder")]),
    "BERT, dense": ("bert-mlm", [_copied("cls.predictions.decoder"), _compress()]),
    "MobileBERT": (
        "mobilebert-mlm",
        [_compress(), _copied("mobilebert.embeddings.word_embeddings")],
    ),
}


def _built(case: str) -> hf.PreTrainedModel:
    name, changes = CASES[case]
    torch.manual_seed(0)
    model = build(name)
    for change in changes:
        change(model)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_what_is_apart_in_memory_is_apart_when_loaded(case: str, tmp_path: Path) -> None:
    model = _built(case)
    expected = logits(model)
    mpop.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    for loaded in (mpop.load(tmp_path / "a"), type(model).from_pretrained(tmp_path / "b")):
        assert torch.equal(logits(loaded), expected)
        assert len(list(loaded.parameters())) >= len(list(model.parameters()))
        loaded.save_pretrained(tmp_path / "c")
        assert torch.equal(logits(mpop.load(tmp_path / "c")), expected)
        loaded.tie_weights()  # as a Trainer does
        assert torch.equal(logits(loaded), expected)
    merged = mpop.merge(mpop.load(tmp_path / "a"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(again), logits(merged))


def test_a_configuration_whose_ties_are_all_broken_says_so(tmp_path: Path) -> None:
    for case, ties in (("a head trained apart", False), ("T5 1.1", True), ("BERT", False)):
        model = _built(case)
        mpop.save(model, tmp_path / case)
        config = hf.AutoConfig.from_pretrained(tmp_path / case)
        assert config.tie_word_embeddings is ties  # of T5 two are kept


def test_what_is_tied_is_written_once_and_tied_when_loaded(tmp_path: Path) -> None:
    model = build("t5")
    mpop.compress(model)
    _apart(model, "lm_head")
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path)
    assert loaded.encoder.embed_tokens.cores[0] is loaded.shared.cores[0]
    assert loaded.lm_head.cores[0] is not loaded.shared.cores[0]
    assert len(load_file(tmp_path / "model.safetensors")) == len(list(model.parameters()))
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["t5", "llama-tied", "bert-mlm"])
@pytest.mark.parametrize("apart", [False, True])
def test_compressed_while_loading(name: str, apart: bool, tmp_path: Path) -> None:
    """A dense file may have both names: as copies, or because they are apart."""
    model = build(name)
    head = "cls.predictions.decoder" if name == "bert-mlm" else "lm_head"
    weight = model.get_submodule(head).weight.detach().clone()
    if apart:
        _apart(model, head)
        weight = model.get_submodule(head).weight.detach()
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"{head}.weight": weight}))
    config = mpop.CompressionConfig(num_cores=3)
    loaded = type(model).from_pretrained(
        tmp_path, quantization_config=mpop.MPOConfig(compress=config)
    )
    expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    tied = max(len(names) for names in compressed_matrices(loaded))
    assert (tied == 1 or name == "t5") if apart else tied > 1
    assert isinstance(loaded.get_input_embeddings(), MPOEmbedding)
    assert isinstance(loaded.get_submodule(head), nn.Linear if apart else MPOLinear)
    loaded.save_pretrained(tmp_path / "mpo")
    assert torch.equal(logits(mpop.load(tmp_path / "mpo")), logits(loaded))


def test_compressed_while_loading_a_file_with_the_heads_name_only(tmp_path: Path) -> None:
    model = build("llama-tied")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    config = mpop.MPOConfig(compress=mpop.CompressionConfig(num_cores=3))
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(loaded.model.embed_tokens, MPOEmbedding)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_a_resumed_training_loads_a_head_that_is_apart(tmp_path: Path) -> None:
    model = _built("a head trained apart")
    model.save_pretrained(tmp_path)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    found = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(logits(model), expected) and inputs(model)
