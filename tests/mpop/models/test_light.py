"""Light fine-tuning: what is frozen, and the paper's counts of parameters."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_models import build, logits

import mpop
from mpop.models.matrices import mpo_modules
from mpop.models.selection import plan
from mpop.models.swapping import empty_mpo, swap


def _albert_base() -> hf.PreTrainedModel:
    """ALBERT-base with two labels, without values."""
    config = hf.AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    with torch.device("meta"):
        return hf.AlbertForSequenceClassification(config)


def test_counts_of_the_paper_for_albert_base() -> None:
    model = _albert_base()
    assert round(mpop.count_parameters(model).total / 1e6, 3) == 11.685
    # The paper leaves the projection from the embedding's 128 to 768 dense.
    config = mpop.CompressionConfig(exclude=["*.embedding_hidden_mapping_in"])
    for matrix in plan(model, config):
        dense = model.get_submodule(matrix.names[0])
        swap(model, matrix.names, empty_mpo(dense, matrix.shape))
    count = mpop.freeze_central(model)
    assert round(count.total / 1e6, 3) == 12.695
    assert round(count.trainable / 1e6, 3) == 1.188
    assert mpop.unfreeze(model) == (count.total, count.total)


@pytest.mark.parametrize("name", ["bert-mlm", "t5", "albert", "gpt2-lm"])
def test_counts_are_those_of_the_tensors(name: str) -> None:
    model = build(name)
    mpop.compress(model)
    distinct = {id(p): p.numel() for p in model.parameters()}
    count = mpop.freeze_central(model)
    central = {id(m.cores[m.central]): m.cores[m.central].numel() for _, m in mpo_modules(model)}
    assert count.total == sum(distinct.values())
    assert count.trainable == count.total - sum(central.values())
    assert mpop.count_parameters(model) == count
    mpop.quantize_centres(model)
    assert mpop.count_parameters(model) == count


def test_only_central_tensors_go_without_a_gradient() -> None:
    model = build("bert-mlm")
    mpop.compress(model)
    mpop.freeze_central(model)
    logits(model).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"{name}.cores.{m.central}" for name, m in mpo_modules(model)}


def test_a_frozen_dense_tensor_is_never_counted_as_trained() -> None:
    model = build("bert")
    mpop.compress(model, mpop.CompressionConfig(embeddings=False))
    words = model.bert.embeddings.word_embeddings.weight
    before = mpop.freeze_central(model)
    words.requires_grad_(False)
    after = mpop.count_parameters(model)
    assert after == (before.trainable - words.numel(), before.total)
    assert mpop.freeze_central(model) == after
    mpop.unfreeze(model)
    assert not words.requires_grad


def test_an_optimizer_of_the_trainable_ones_moves_exactly_them() -> None:
    model = build("bert")
    mpop.compress(model)
    count = mpop.freeze_central(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == count.trainable
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits(model).square().sum().backward()
    optimizer.step()
    central = {f"{name}.cores.{m.central}" for name, m in mpo_modules(model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in central), name


@pytest.mark.parametrize("name", ["bert-mlm", "t5", "gpt2-lm"])
def test_balancing_changes_the_tensors_and_no_output(name: str) -> None:
    model = build(name).eval()
    mpop.compress(model)
    expected, before = logits(model), [p.clone() for p in model.parameters()]
    mpop.balance(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    cores = {id(core) for _, module in mpo_modules(model) for core in module.cores}
    changed = {id(p) for p, b in zip(model.parameters(), before, strict=True) if not p.equal(b)}
    assert changed and changed <= cores


def test_a_dense_model_has_nothing_to_freeze() -> None:
    for function in (mpop.freeze_central, mpop.unfreeze, mpop.balance):
        with pytest.raises(ValueError, match="expected a compressed model"):
            function(build("bert"))
