"""`mpop perplexity`: how well a decoder foretells a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpop.cli.options.parser import Parser, command


def add(commands: Any) -> None:
    """Its options."""
    parser: Parser = command(
        commands, "perplexity", "Measure how well a decoder foretells a text.", run
    )
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="a .txt or .jsonl file (text, or messages through the chat template), or a folder",
    )
    parser.number("--seqlen", 2048, "tokens of a window, at most what the model takes")
    parser.add_argument(
        "--against",
        metavar="DENSE",
        help="measure this model beside it, and the divergence from it",
    )
    parser.number("--batch-size", 1, "windows at a time")
    parser.add_device("measure")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of weights (as they were saved)"
    )


def run(
    model: str,
    text: str,
    seqlen: int,
    against: str | None,
    batch_size: int,
    device: str,
    precision: str | None,
) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    import torch

    import mpop
    from mpop.benchmark import DTYPES
    from mpop.checkpoints.opening import load_as_saved, load_tokenizer, shared_tokenizer
    from mpop.compression.report import table
    from mpop.data.text import read_text
    from mpop.language.perplexity import continuation, vocabulary_of

    if not Path(text).exists():
        raise ValueError(f"missing file {text}")
    tokenizer = shared_tokenizer(model, against) if against else load_tokenizer(model)
    content = read_text(tokenizer, text)
    encoded = tokenizer(content, verbose=False)
    tokens = torch.tensor(encoded.input_ids, dtype=torch.int64, device="cpu")
    models: list[Any] = [load_as_saved(name) for name in (model, against) if name]
    for each in models:
        each.to(device, dtype=DTYPES[precision] if precision else None)
    vocabulary_of(*models)
    try:
        found = mpop.perplexity(
            models[0],
            tokens,
            seqlen=seqlen,
            batch_size=batch_size,
            against=models[1] if against else None,
        )
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error
    num_bytes = None
    if tokenizer.is_fast:  # others do not tell where a token ends
        end = encoded.token_to_chars(found.tokens - 1)
        num_bytes = len(content[: end.end if end else None].encode())

    def measures(each: mpop.Perplexity) -> dict[str, float | None]:
        return {
            "perplexity": each.perplexity,
            "nats_per_token": each.nats,
            "bits_per_byte": num_bytes and each.bits_per_byte(num_bytes),
        }

    read = tokens[: found.tokens].tolist()
    begins = [at for at, token in enumerate(read) if token == tokenizer.bos_token_id]
    # A chat's template may put it before every message.
    bos = "BOS before the text only" if begins == [0] else f"{len(begins) or 'no'} BOS"
    protocol = (
        f"tokenised once, {found.windows:,} windows of {found.seqlen} that do not overlap, the "
        f"{found.dropped:,} tokens that remain dropped; {found.seqlen - 1} targets a window; "
        f"{bos}; exp(sum of losses / targets)"
    )
    result: dict[str, Any] = {
        "model": model,
        "text": text,
        "protocol": protocol,
        "seqlen": found.seqlen,
        "windows": found.windows,
        "tokens": found.tokens,
        "targets": found.targets,
        "dropped_tokens": found.dropped,
        "bytes": num_bytes,
        "precision": str(models[0].dtype).removeprefix("torch."),
        **measures(found),
    }
    columns = ["", "compressed" if found.against else "model"]
    rows = [measures(found)]
    samples: list[str] = []
    if found.against:
        prompt = tokens[: min(32, found.seqlen // 2)]
        texts = [tokenizer.decode(continuation(each, prompt, len(prompt))) for each in models]
        result["against"] = {"model": against, **measures(found.against)}
        result["divergence"] = found.divergence
        result["prompt"] = tokenizer.decode(prompt)
        result["continuation"], result["against"]["continuation"] = texts
        columns.append("dense")
        rows.append(measures(found.against))
        nats = max(found.divergence or 0.0, 0.0)  # not the sum's rounding
        samples = [
            f"mean KL(dense || compressed) of a token: {nats:.4f} nats",
            f"after {result['prompt']!r}:",
            *(f"  {name:<12}{made!r}" for name, made in zip(columns[1:], texts, strict=True)),
        ]
    lines = [
        (
            name.replace("_", " "),
            *("–" if row[name] is None else f"{row[name]:,.4f}" for row in rows),
        )
        for name in rows[0]
    ]
    return result, "\n".join([table(tuple(columns), lines, []), f"{text}: {protocol}", *samples])
