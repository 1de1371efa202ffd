"""Work split over the processes that torchrun started; with one process, just done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_split() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized()


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
    rank, world = distributed.get_rank(), distributed.get_world_size()
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
