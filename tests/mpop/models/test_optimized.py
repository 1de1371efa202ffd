"""Models laid out for serving: the same logits and ties, other cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import build, logits
from torch import Tensor
from transformers import PreTrainedModel

import mpop
from mpo_kernels import InterpolativeLinear, MPOEmbedding, MPOLinear
from mpo_kernels.backends.cuda.thin import laid_out
from mpo_kernels.backends.torch.backend import TorchBackend
from mpop.models.matrices import compressed_matrices, module_at

EXACT = {"atol": 2e-4, "rtol": 2e-4}


def compressed(name: str, **options: object) -> PreTrainedModel:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(**options))
    return model


@pytest.fixture
def laid_out_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a back end on a device gives them."""
    served = TorchBackend.served

    def give(*arguments: object) -> list[Tensor]:
        return [laid_out(part, from_left=True) for part in served(*arguments)]

    monkeypatch.setattr(TorchBackend, "served", give)


@pytest.mark.usefixtures("laid_out_cores")
@pytest.mark.parametrize("name", ["bert-mlm", "gpt2-lm", "llama", "llama-tied", "t5"])
@torch.no_grad()
def test_logits_ties_and_what_is_saved(name: str, tmp_path: Path) -> None:
    model = compressed(name, num_cores=5)
    expected, names = logits(model), compressed_matrices(model)
    cores = {n: len(module_at(model, n[0]).cores) for n in names}
    merged = {
        n: list(layer.merged(2).cores)
        for n in names
        if isinstance(layer := module_at(model, n[0]), MPOLinear)
    }
    mpop.optimize_for_inference(model, rows=2)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    assert compressed_matrices(model) == names
    assert any(len(module_at(model, n[0]).cores) < cores[n] for n in merged)
    for n, parts in merged.items():
        held = list(module_at(model, n[0]).cores)
        assert all(map(torch.equal, held, parts)) and not any(c.requires_grad for c in held)
        assert [c.stride() for c in held] == [c.stride() for c in parts]
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path)
    assert compressed_matrices(loaded) == names
    torch.testing.assert_close(logits(loaded), expected, **EXACT)


def test_a_tied_head_decides_and_a_lone_table_stays() -> None:
    tied, apart = compressed("llama-tied", num_cores=5), compressed("llama", num_cores=5)
    table, head = apart.model.embed_tokens, tied.lm_head
    parts = list(head.merged(3).cores)
    for model in (tied, apart):
        mpop.optimize_for_inference(model, rows=3)
    assert apart.model.embed_tokens is table
    now = tied.model.embed_tokens
    assert isinstance(now, MPOEmbedding) and len(now.cores) < 5
    assert all(a is b for a, b in zip(now.cores, tied.lm_head.cores, strict=True))
    assert all(map(torch.equal, tied.lm_head.oriented_cores(), parts))


@pytest.mark.usefixtures("laid_out_cores")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2-lm"])
@torch.no_grad()
def test_bytes_are_laid_out(name: str, tmp_path: Path) -> None:
    model = compressed(name, num_cores=2)
    mpop.quantize(model)
    expected, kinds = logits(model), {n: type(m) for n, m in model.named_modules()}
    before = model.state_dict()
    mpop.optimize_for_inference(model)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    after = model.state_dict()
    assert before.keys() == after.keys()
    codes = [key for key in before if "int8_core" in key]
    assert codes and all(torch.equal(before[key], after[key]) for key in codes)
    mpop.save(model, tmp_path)
    torch.testing.assert_close(logits(mpop.load(tmp_path)), expected, **EXACT)


def test_interpolative_form_is_left_where_that_is_faster(tmp_path: Path) -> None:
    """The layer says which; here ranks are so low that the order of the outputs is most of it."""
    model = build("llama")
    mpop.compress(model, mpop.CompressionConfig(factors="interpolative", compression=0.1))
    expected = logits(model.eval())
    held = [m for m in model.modules() if isinstance(m, InterpolativeLinear)]
    wanted = [type(layer.merged(64)) for layer in held]
    mpop.optimize_for_inference(model, rows=64)
    linears = [m for m in model.modules() if isinstance(m, InterpolativeLinear | MPOLinear)]
    assert [type(layer) for layer in linears] == wanted and MPOLinear in wanted
    torch.testing.assert_close(logits(model), expected, **EXACT)
    mpop.save(model, tmp_path)
    torch.testing.assert_close(logits(mpop.load(tmp_path)), expected, **EXACT)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = compressed("llama-tied", num_cores=3)
    cores = list(model.parameters())
    with pytest.raises(ValueError, match=r"expected a model in evaluation mode, .* model\.eval"):
        mpop.optimize_for_inference(model.train())
    with pytest.raises(ValueError, match="expected at least one row, got 0"):
        mpop.optimize_for_inference(model.eval(), rows=0)
    assert all(a is b for a, b in zip(cores, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="expected a compressed model, got a dense Llama"):
        mpop.optimize_for_inference(build("llama"))
    mpop.freeze_central(model)
    mpop.quantize_centres(model)
    with pytest.raises(ValueError, match="the centres are quantised"):
        mpop.optimize_for_inference(model)
