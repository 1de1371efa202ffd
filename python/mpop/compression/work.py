"""Work over many items: split over the processes that torchrun started, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch import distributed
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds between two lines of progress, and before the first.
_EVERY = 30.0


def is_split() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized()


def _rank() -> int:
    return distributed.get_rank() if is_split() else 0


def over_processes(
    items: Sequence[Item], work: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in order and on every process, computed by one of them.

    Raises:
        Exception: what `work` raised on any process, on all of them.
    """
    if not is_split():
        yield from ((item, work(item)) for item in items)
        return
    rank, world = _rank(), distributed.get_world_size()
    for start in range(0, len(items), world):
        share = items[start : start + world]
        mine: tuple[Any, Exception | None] = (None, None)
        if rank < len(share):
            try:
                mine = work(share[rank]), None
            except Exception as failure:
                mine = None, failure
        results: list[Any] = [None] * world
        distributed.all_gather_object(results, mine)
        for item, (result, error) in zip(share, results, strict=False):
            if error is not None:
                raise error
            yield item, result


def sum_over_processes(tensor: torch.Tensor) -> None:
    """Add up a tensor of all processes, in place."""
    if is_split():
        distributed.all_reduce(tensor)


def is_everywhere(fact: bool, device: torch.device) -> bool:
    """Whether it is so on all processes."""
    failures = torch.tensor(int(not fact), dtype=torch.int64, device=device)
    sum_over_processes(failures)
    return not int(failures)


def progress(work: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items of ``work``, as they are asked for; nothing is shown of what is done at once.

    A bar on a terminal, elsewhere a line now and then; of several processes by the first.

    Args:
        work: ``total`` of them, by default as many as it has, where it has a length.
        what: a word for it.
    """
    if sys.stderr.isatty():
        yield from tqdm(work, what, total, leave=False, delay=1, disable=_rank() > 0)
        return
    if total is None and isinstance(work, Sized):
        total = len(work)
    start = said = time.monotonic()
    for done, item in enumerate(work, 1):
        yield item
        if (now := time.monotonic()) - said >= _EVERY and _rank() == 0:
            of = f" of {total}" if total is not None else ""
            print(f"{what} {done}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)
            said = now
