"""How well a decoder foretells a text, alone or beside its dense self."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mpop.data.lengths import longest

# Positions whose logits are in fp32 at a time.
CHUNK = 256


@dataclass(frozen=True)
class Perplexity:
    """What a model loses on a text.

    Attributes:
        nats: mean negative log-likelihood of a target.
        seqlen: tokens of a window, of which all but the first are targets.
        windows: how many.
        dropped: tokens after the last full window.
        against: the same of the model that it was compared with; None without.
        divergence: mean KL(against || model) of a target's distribution, in nats; None without.
    """

    nats: float
    seqlen: int
    windows: int
    dropped: int
    against: Perplexity | None = None
    divergence: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def tokens(self) -> int:
        return self.seqlen * self.windows

    @property
    def targets(self) -> int:
        return (self.seqlen - 1) * self.windows

    def bits_per_byte(self, num_bytes: int) -> float:
        """Of the text, whose tokens within the windows spell so many bytes."""
        return self.nats * self.tokens / num_bytes / math.log(2)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seqlen: int = 2048,
    batch_size: int = 1,
    against: PreTrainedModel | None = None,
) -> Perplexity:
    """exp(mean negative log-likelihood) of a tokenised text, by the protocol of GPTQ and SVD-LLM.

    Windows do not overlap, and what is left after the last full one is dropped; each of them
    foretells its own tokens but the first. Nothing is put before a window: BOS stands where the
    tokens have it. Sums run over all targets alike, in float64, of logits in float32.

    Args:
        model: a decoder with a language modelling head, in any mode; it is as it was afterwards.
        tokens: ids ``[n]`` of the whole text, on any device.
        seqlen: tokens of a window, at most what the models have positions for.
        batch_size: windows at a time.
        against: a model of the same vocabulary, such as the dense one, on the same windows.

    Raises:
        TypeError: tokens that are no integers.
        ValueError: another kind of model, tokens of another vocabulary, or fewer than a window.
        FloatingPointError: a loss with NaN or Inf in it.
    """
    models = [model] if against is None else [model, against]
    vocabulary_of(*models)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"expected integer tokens, got {tokens.dtype}")
    if tokens.dim() != 1:
        raise ValueError(f"expected tokens [n] of one text, got {list(tokens.shape)}")
    if seqlen < 2 or batch_size < 1:
        raise ValueError(
            f"expected a seqlen of at least 2 and a batch_size of at least 1, got {seqlen} and "
            f"{batch_size}"
        )
    seqlen = min(seqlen, *(longest(each) or seqlen for each in models))
    windows = len(tokens) // seqlen
    if windows == 0:
        raise ValueError(f"expected at least the {seqlen} tokens of one window, got {len(tokens)}")
    check_tokens(model, tokens)
    packed = tokens[: windows * seqlen].view(windows, seqlen).long()
    totals = [0.0] * (2 * len(models) - 1)
    with ExitStack() as modes:
        for each in models:
            modes.callback(each.train, each.training)
            each.eval()
        for start in range(0, windows, batch_size):
            batch = packed[start : start + batch_size].to(model.device)
            logits = [_logits(each, batch) for each in models]
            for row, ids in enumerate(batch):
                sums = _sums(ids[1:], *(each[row, :-1] for each in logits))
                if not all(map(math.isfinite, sums)):
                    raise FloatingPointError(
                        f"expected finite losses, got {sums[0]} in window {start + row + 1} of "
                        f"{windows}"
                        + (f" and {sums[1]} of the model beside it" if len(sums) > 1 else "")
                    )
                totals = [total + value for total, value in zip(totals, sums, strict=True)]
    nats, *others = (total / (windows * (seqlen - 1)) for total in totals)
    shape = (seqlen, windows, len(tokens) - windows * seqlen)
    if not others:
        return Perplexity(nats, *shape)
    return Perplexity(nats, *shape, Perplexity(others[0], *shape), others[1])


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Check that a decoder knows the ids of a text.

    Raises:
        ValueError: tokens that its vocabulary does not have.
    """
    vocabulary = vocabulary_of(model)
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"expected tokens below {vocabulary:,}, the model's vocabulary, "
            f"got {int(tokens.max()):,}"
        )


def continuation(model: PreTrainedModel, prompt: Tensor, count: int = 32) -> Tensor:
    """At most `count` tokens ``[k]`` that a decoder puts greedily after a prompt ``[n]``."""
    ids: Any = prompt[None].to(model.device)
    made = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,  # one text needs none, and without one transformers says so
    )
    return made[0, len(prompt) :]


def vocabulary_of(*models: PreTrainedModel) -> int:
    """Its size, of one or two decoders with a head over it.

    Raises:
        ValueError: another kind of model, or two of different vocabularies.
    """
    for model in models:
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise ValueError(
                "expected a decoder with a language modelling head, such as AutoModelForCausalLM "
                f"loads, got {type(model).__name__}"
            )
    sizes: list[int] = [model.config.get_text_config().vocab_size for model in models]
    if sizes[-1] != sizes[0]:
        raise ValueError(
            f"expected two models of one vocabulary, got {sizes[0]:,} and {sizes[1]:,} tokens"
        )
    return sizes[0]


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=batch.to(model.device), use_cache=False).logits
    return logits.to(batch.device)


def _sums(targets: Tensor, logits: Tensor, against: Tensor | None = None) -> list[float]:
    """Over one window's targets ``[n]``: the loss, the other's, and the divergence from it."""
    sums: list[list[Tensor]] = []
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        own = logits[part].float().log_softmax(-1)
        found = [functional.nll_loss(own, targets[part], reduction="sum")]
        if against is not None:
            other = against[part].float().log_softmax(-1)
            found.append(functional.nll_loss(other, targets[part], reduction="sum"))
            found.append(functional.kl_div(own, other, reduction="sum", log_target=True))
        sums.append(found)
    return torch.stack([torch.stack(found) for found in sums]).double().sum(0).tolist()
