"""Perplexity and divergence beside sums over fp64 logits, and what is said of bad arguments."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import build
from tiny_text import llama
from torch.distributions import Categorical, kl_divergence

import mpop
from mpop.language import perplexity as module

TOKENS = torch.randint(0, 25, (7 * 13 + 5,), generator=torch.Generator().manual_seed(0))


def other() -> torch.nn.Module:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


def reference(model: torch.nn.Module, seqlen: int) -> torch.Tensor:
    """Log-probabilities `[windows, seqlen − 1, vocabulary]` in fp64, a window at a time."""
    exact = copy.deepcopy(model).double()
    windows = TOKENS[: len(TOKENS) // seqlen * seqlen].view(-1, seqlen)
    with torch.no_grad():
        return torch.stack([exact(row[None]).logits[0, :-1] for row in windows]).log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_against_fp64(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)  # does not divide 12
    model, dense = llama().train(), other()
    found = mpop.perplexity(model, TOKENS, seqlen=13, batch_size=batch_size, against=dense)
    assert (found.windows, found.tokens, found.targets, found.dropped) == (7, 91, 84, 5)
    own, theirs = reference(model, 13), reference(dense, 13)
    targets = TOKENS[:91].view(7, 13)[:, 1:, None]
    assert found.nats == pytest.approx(-own.gather(-1, targets).mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert found.against is not None
    assert found.against.nats == pytest.approx(-theirs.gather(-1, targets).mean().item(), rel=1e-5)
    expected = kl_divergence(Categorical(logits=theirs), Categorical(logits=own)).mean().item()
    assert found.divergence == pytest.approx(expected, rel=1e-4)
    assert found.bits_per_byte(300) == pytest.approx(found.nats / math.log(2) * 91 / 300)
    assert model.training and not dense.training
    alone = mpop.perplexity(model, TOKENS, seqlen=13)
    assert alone.nats == pytest.approx(found.nats, rel=1e-6) and alone.divergence is None
    # A compressed model at full rank is the same one.
    mpop.compress(model)
    again = mpop.perplexity(model, TOKENS.int(), seqlen=13, against=llama())
    assert again.nats == pytest.approx(found.nats, rel=1e-4)
    assert again.divergence == pytest.approx(0, abs=1e-6)


def test_a_window_is_at_most_what_the_model_takes() -> None:
    found = mpop.perplexity(llama(), TOKENS)
    assert (found.seqlen, found.windows, found.dropped) == (64, 1, 32)


def test_what_is_not_finite_is_an_error() -> None:
    model = llama()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="expected finite losses, got nan in window 1 of"):
        mpop.perplexity(model, TOKENS, seqlen=13)
    with pytest.raises(FloatingPointError, match="window 1 of 7 and nan of the model beside it"):
        mpop.perplexity(llama(), TOKENS, seqlen=13, against=model)


def test_bad_arguments() -> None:
    model = llama()
    for kind in ("bert-mlm", "t5"):
        with pytest.raises(ValueError, match="expected a decoder with a language modelling head"):
            mpop.perplexity(build(kind), TOKENS)
    with pytest.raises(ValueError, match="one vocabulary, got 25 and 50 tokens"):
        mpop.perplexity(model, TOKENS, against=llama(50))
    with pytest.raises(TypeError, match=r"expected integer tokens, got torch.float32"):
        mpop.perplexity(model, TOKENS.float())
    with pytest.raises(ValueError, match=r"expected tokens \[n\] of one text, got \[1, 96\]"):
        mpop.perplexity(model, TOKENS[None])
    with pytest.raises(ValueError, match=r"expected tokens below 25, the model's vocab.*, got 25"):
        mpop.perplexity(model, torch.full((64,), 25))
    with pytest.raises(ValueError, match="expected at least the 64 tokens of one window, got 63"):
        mpop.perplexity(model, TOKENS[:63])
    for options in ({"seqlen": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected a seqlen of at least 2 and a batch_size"):
            mpop.perplexity(model, TOKENS, **options)


def test_the_continuation_is_the_greedy_one() -> None:
    model, prompt = llama(), TOKENS[:9]
    ids = prompt.tolist()
    for _ in range(6):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == model.config.eos_token_id:
            break
    assert module.continuation(model, prompt, 6).tolist() == ids[9:]
