"""Plain text as data: read from files or the hub, tokenised, and packed into full windows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mpop.data.glue import hub_reachable

SUFFIXES = (".txt", ".jsonl")
# Of a data set, characters read for each token asked for: a token has about four.
_CHARACTERS = 8


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    *,
    samples: int = 256,
    seqlen: int = 2048,
    seed: int = 0,
    batch_size: int = 1,
) -> list[dict[str, Tensor]]:
    """Text as `mpop.compress` calibrates with: windows of it, chosen at random.

    The text is tokenised as one, documents joined by a blank line, and cut into windows that do not
    overlap. What the tokenizer adds to a text by itself, such as BOS, stands in each of them.

    Args:
        source: what `read_text` reads.
        samples: windows, fewer where the text has fewer.
        seqlen: tokens of a window, those that the tokenizer adds among them; at most what the model
            has positions for.
        seed: of the choice; the windows are the same wherever it is.
        batch_size: windows of a batch; the last may have fewer.

    Returns:
        Batches `{"input_ids": [batch_size, seqlen]}`, int64, on the CPU.

    Raises:
        TypeError, ValueError: what `read_text` says, a number below 1, or fewer tokens than a
            window.
    """
    if min(samples, seqlen, batch_size) < 1:
        raise ValueError(
            "expected samples, seqlen and batch_size of at least 1, "
            f"got {samples}, {seqlen} and {batch_size}"
        )
    text = read_text(tokenizer, source, _CHARACTERS * samples * seqlen)
    ids = token_ids(tokenizer, text, is_whole=False)
    packed = windows(tokenizer, ids, source, samples=samples, seqlen=seqlen, seed=seed)
    return [{"input_ids": batch} for batch in packed.split(batch_size)]


def windows(
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    source: str | Path,
    *,
    samples: int | None,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Windows ``[samples, seqlen]`` of a text's tokens, as `text_batches` chooses them.

    Args:
        ids: ``[n]``, without what the tokenizer adds.
        source: what they are of, for an error.
        samples: None for all.

    Raises:
        ValueError: fewer tokens than a window, or a window of what the tokenizer adds alone.
    """
    before, after = _added(tokenizer)
    size = seqlen - len(before) - len(after)
    if size < 1:
        raise ValueError(
            f"expected a seqlen above the {seqlen - size} tokens that the tokenizer adds, "
            f"got {seqlen}"
        )
    count = len(ids) // size
    if count == 0:
        raise ValueError(
            f"{source}: expected at least the {size} tokens of one window, got {len(ids)}"
        )
    generator = random.Random(seed)
    start = generator.randint(0, len(ids) - count * size)
    chosen = generator.sample(range(count), min(samples or count, count))
    packed = ids[start : start + count * size].view(count, size)[chosen]
    ends = [_tensor(part).expand(len(packed), -1) for part in (before, after)]
    return torch.cat((ends[0], packed, ends[1]), dim=1)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, is_whole: bool) -> Tensor:
    """A text's tokens ``[n]``, however many, int64; a whole one has what the tokenizer adds."""
    return _tensor(_encode(tokenizer, text, is_whole))


def read_text(
    tokenizer: PreTrainedTokenizerBase, source: str | Path, characters: int | None = None
) -> str:
    """A text, or several joined by a blank line.

    Args:
        tokenizer: its chat template makes a text of `messages`.
        source: a .txt file; a .jsonl file, each line of which has a `text` or the `messages` of a
            chat; a folder of such files, read in the order of their names; or a data set of the
            hub, `owner/name` or `owner/name:configuration`, of whose `train` split the same columns
            are read. A file or folder of that name goes first.
        characters: of a data set, from its beginning, how many are enough; files are read whole.

    Raises:
        ValueError: a file that is missing, empty, not UTF-8 or malformed (named, with the line), a
            chat without a template for it, or a data set that cannot be loaded.
    """
    path = Path(source)
    if not str(source):
        raise ValueError("expected the name of a text, got an empty one")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path}: expected {' or '.join(SUFFIXES)} files in the folder")
        documents = [document for file in files for document in _documents(tokenizer, file)]
    elif path.exists() or path.suffix in SUFFIXES or path.is_absolute() or len(path.parts) > 2:
        documents = list(_documents(tokenizer, path))
    else:
        documents = list(_hub_documents(tokenizer, str(source), characters))
    text = "\n\n".join(documents)
    if not text.strip():
        raise ValueError(f"{source} is empty")
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, is_whole: bool) -> list[int]:
    # `verbose` would say that they are more than the model takes at a time.
    ids: list[int] = tokenizer(text, add_special_tokens=is_whole, verbose=False).input_ids
    return ids


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and after a text."""
    bare, whole = (_encode(tokenizer, "a", added) for added in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _documents(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[str]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a {' or '.join(SUFFIXES)} file or a folder of them")
    if not path.is_file():
        raise ValueError(f"missing file {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if "\0" in text:
        raise ValueError(f"{path}: expected text, got binary data")
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{place}: expected an object of JSON: {error}") from error
            yield _document(tokenizer, record, place)


def _document(tokenizer: PreTrainedTokenizerBase, record: Any, place: str) -> str:
    text = _text_of(tokenizer, record, place)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may escape half a character
        raise ValueError(f"{place}: expected text, got half of a surrogate pair") from error
    return text


def _text_of(tokenizer: PreTrainedTokenizerBase, record: Any, place: str) -> str:
    fields = record if isinstance(record, dict) else {}
    text, messages = fields.get("text"), fields.get("messages")
    if isinstance(text, str):
        return text
    if not isinstance(messages, list):
        kinds = [f"{name} of {type(value).__name__}" for name, value in fields.items()]
        got = ", ".join(kinds) or type(record).__name__
        raise ValueError(
            f"{place}: expected a text of str, or the messages of a chat, a list, got {got}"
        )
    if tokenizer.chat_template is None:
        raise ValueError(f"{place}: expected a tokenizer with a chat template for messages")
    try:
        made = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template may raise what it likes
        raise ValueError(f"{place}: messages that the chat template refuses: {error}") from error
    assert isinstance(made, str)
    return made


def _hub_documents(
    tokenizer: PreTrainedTokenizerBase, name: str, characters: int | None
) -> Iterator[str]:
    import huggingface_hub
    from datasets import load_dataset

    wanted = f"expected a {' or '.join(SUFFIXES)} file, a folder of them or a data set of the hub"
    # As in GLUE's: `load_dataset` itself retries for half a minute.
    if not huggingface_hub.is_offline_mode() and not hub_reachable():
        raise ValueError(f"{name}: {wanted}, which cannot be reached")
    repository, _, configuration = name.partition(":")
    try:
        rows = load_dataset(repository, configuration or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: {wanted}, got one that cannot be loaded ({reason})") from error
    read = 0
    for number, record in enumerate(rows):
        document = _document(tokenizer, record, f"{name}:{number}")
        yield document
        read += len(document)
        if characters is not None and read >= characters:
            return
