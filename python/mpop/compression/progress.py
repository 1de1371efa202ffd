"""How far work is that takes minutes: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

# Seconds between two lines, and before the first.
_EVERY = 30.0


def progress(work: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items of ``work``, as they are asked for; nothing is shown of what is done at once.

    Args:
        work: ``total`` of them, by default as many as it has, where it has a length.
        what: a word for it.
    """
    if sys.stderr.isatty():
        yield from tqdm(work, what, total, leave=False, delay=1)
        return
    if total is None and isinstance(work, Sized):
        total = len(work)
    start = said = time.monotonic()
    for done, item in enumerate(work, 1):
        yield item
        if (now := time.monotonic()) - said >= _EVERY:
            of = f" of {total}" if total is not None else ""
            print(f"{what}: {done}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)
            said = now
