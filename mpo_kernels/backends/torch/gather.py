"""Rows of a table by the digits of their ids: distinct prefixes share their products.

The chain is read from whichever end costs less; mirrored, ids and columns have their digits
reversed. As long as there is one prefix the next core is selected from; one that no digit belongs
to is a product of all prefixes. A frozen table in the first core is thus never read but for its
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Distinct ids whose rows are formed together: their states stay within this many elements.
BLOCK = 2**22
# The plain form copies at most so many times what it gives.
COPIES = 16


def forward(ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
    """Rows ``[len(ids), embedding_dim]`` of the table, each distinct one formed once."""
    mirrored = _mirror_pays(len(ids), cores)
    if mirrored:
        ids, cores = _mirror_ids(ids, cores), _mirror_cores(cores)
    distinct, places = torch.unique(ids, return_inverse=True)
    rows = cores[0].new_empty(len(distinct), embedding_dim)
    for block in _id_blocks(distinct, cores):
        states, _ = _states(distinct[block], cores)
        formed = states[-1].flatten(1)
        if mirrored:
            formed = _mirror_columns(formed, [core.shape[2] for core in cores])
        rows[block] = formed[:, :embedding_dim]
    return rows[places]


def plain(ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
    """:func:`forward` with nothing written in place and no branch, whatever the ids."""
    mirrored = _mirror_pays(1, cores)
    if mirrored:
        ids, cores = _mirror_ids(ids, cores), _mirror_cores(cores)
    state = cores[0].new_ones(ids.shape[0], 1, 1)
    rest = math.prod(core.shape[1] for core in cores)
    for core in cores:
        d, i, j, r = core.shape
        rest //= i
        slices = core.transpose(0, 1).reshape(i, d, j * r)
        product = _by_digit(state, slices, ids // rest % i, COPIES * embedding_dim)
        state = product.view(ids.shape[0], state.shape[1] * j, r)
    rows = state.flatten(1)
    if mirrored:
        rows = _mirror_columns(rows, [core.shape[2] for core in cores])
    return rows[:, :embedding_dim]


def _by_digit(state: Tensor, slices: Tensor, digits: Tensor, limit: int) -> Tensor:
    """``state [n, J, D] × slices[digits] [n, D, m] -> [n, J, m]``, copying at most n × limit."""
    if len(slices) == 1:
        return state @ slices[0]
    if slices[0].numel() <= limit:
        return torch.bmm(state, slices[digits])
    # Where a slice is large, the ids of each digit share one product with it.
    places = [(digits == digit).nonzero().view(-1) for digit in range(len(slices))]
    products = [state[ids] @ matrix for ids, matrix in zip(places, slices, strict=True)]
    result = state.new_empty(*state.shape[:2], slices.shape[2])
    return result.index_copy(0, torch.cat(places), torch.cat(products))


def backward(
    grad: Tensor, ids: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the cores from ``grad [len(ids), embedding_dim]``."""
    if not len(ids):
        return [torch.zeros_like(c) if need else None for c, need in zip(cores, needs, strict=True)]
    outs = [core.shape[2] for core in cores]
    mirrored = _mirror_pays(len(ids), cores)
    if mirrored:
        ids, cores, needs = _mirror_ids(ids, cores), _mirror_cores(cores), needs[::-1]
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    sums = [
        torch.zeros_like(core, dtype=accumulate) if need else None
        for core, need in zip(cores, needs, strict=True)
    ]
    distinct, places = torch.unique(ids, return_inverse=True)
    of_rows = grad.new_zeros(len(distinct), math.prod(outs), dtype=accumulate)
    of_rows[:, : grad.shape[1]].index_add_(0, places, grad.to(accumulate))
    if mirrored:
        of_rows = _mirror_columns(of_rows, outs)
    first = min(k for k, need in enumerate(needs) if need)
    for block in _id_blocks(distinct, cores):
        states, levels = _states(distinct[block], cores)
        flow = of_rows[block].to(grad.dtype)
        for k in range(len(cores) - 1, first - 1, -1):
            state = states[k - 1] if k else None
            flow = _step_backward(flow, state, cores[k], levels[k], sums[k], k > first)
    grads = [
        None if total is None else total.to(core.dtype)
        for total, core in zip(sums, cores, strict=True)
    ]
    if mirrored:
        grads = [g if g is None else g.permute(3, 1, 2, 0).contiguous() for g in grads[::-1]]
    return grads


def _mirror_pays(count: int, cores: Sequence[Tensor]) -> bool:
    """Whether ``count`` ids cost fewer multiply-adds read from their last digit."""
    forwards, backwards = (sum(macs) for macs in _ways(count, cores))
    return backwards < forwards


def _ways(count: int, cores: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Multiply-adds core by core of ``count`` distinct ids, from the first digit and the last."""

    def macs(shapes: Sequence[Sequence[int]]) -> list[int]:
        each: list[int] = []
        prefixes, columns = 1, 1
        for d, i, j, r in shapes:
            prefixes *= i
            # The first core is selected from, not multiplied.
            each.append(min(count, prefixes) * columns * d * j * r if each else 0)
            columns *= j
        return each

    shapes = [core.shape for core in cores]
    return macs(shapes), macs([(r, i, j, d) for d, i, j, r in reversed(shapes)])


def macs(count: int, cores: Sequence[Tensor], needs: Sequence[bool] | None = None) -> int:
    """Multiply-adds of :func:`forward`, or with ``needs`` of :func:`backward`, at most.

    Args:
        count: ids, of which no two are taken to be alike.
    """
    mirrored = _mirror_pays(count, cores)
    each = _ways(count, cores)[mirrored]
    if needs is None:
        return sum(each)
    needs = needs[::-1] if mirrored else needs
    first = min(k for k, need in enumerate(needs) if need)
    of_cores = sum(cost for cost, need in zip(each, needs, strict=True) if need)
    return sum(each) + of_cores + sum(each[first + 1 :])


def _mirror_cores(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same chain from its other end, digits and columns in reverse order."""
    return [core.permute(3, 1, 2, 0) for core in reversed(cores)]


def _mirror_ids(ids: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The numbers with the digits of ``ids`` reversed."""
    mirrored = torch.zeros_like(ids)
    for core in reversed(cores):
        factor = core.shape[1]
        mirrored, ids = mirrored * factor + ids % factor, ids // factor
    return mirrored


def _mirror_columns(rows: Tensor, outs: Sequence[int]) -> Tensor:
    """``rows [n, ∏ outs]`` with the digits of the column numbers reversed."""
    digits = rows.view(-1, *outs)
    return digits.permute(0, *range(len(outs), 0, -1)).reshape(rows.shape)


def _id_blocks(distinct: Tensor, cores: Sequence[Tensor]) -> Iterator[slice]:
    """Blocks of sorted ids; neighbours share most of their digits, so little is formed twice."""
    columns, largest = 1, 1
    for core in cores:
        columns *= core.shape[2]
        largest = max(largest, columns * core.shape[3])
    size = max(1, BLOCK // largest)
    for start in range(0, len(distinct), size):
        yield slice(start, start + size)


class _Level(NamedTuple):
    """Prefixes whose last digits are selected at once: the children, each of a parent before."""

    digits: Tensor  # one of each child, or one of them all
    children: Tensor | slice
    parents: Tensor | slice


_ALL = slice(None)


def _of_digits(core: Tensor, digits: Tensor) -> Tensor:
    """``core [D, i, j, r]`` at these i; of one a view: selecting copies a mirrored core whole."""
    return core.index_select(1, digits) if len(digits) > 1 else core[:, int(digits), None]


def _states(ids: Tensor, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[list[_Level]]]:
    """Products of the leading cores for each distinct prefix of the digits of sorted ids.

    Returns:
        states: state k is ``[prefixes of k + 1 digits, ∏ j done, D_{k+1}]``.
        levels: for each core a single one where no digit is chosen, or all have one parent; else
            one wherever a digit occurs.
    """
    states: list[Tensor] = []
    levels = []
    rest = math.prod(core.shape[1] for core in cores)
    prefixes = ids.new_zeros(1)
    for core in cores:
        d, i, j, r = core.shape
        rest //= i
        longer = torch.unique_consecutive(ids // rest) if i > 1 else prefixes
        digits = longer % i
        if len(prefixes) == 1:
            level = [_Level(digits, _ALL, _ALL)]
            chosen = core.index_select(1, digits)  # [D, n, j, r]
            if states:
                product = states[-1][0] @ chosen.reshape(d, -1)
                chosen = product.view(-1, len(digits), j, r)
            state = chosen.transpose(0, 1).reshape(len(digits), -1, r)
        elif i == 1:
            level = [_Level(digits[:1], _ALL, _ALL)]
            state = (states[-1] @ core.reshape(d, j * r)).view(len(longer), -1, r)
        else:
            level, parents = [], torch.searchsorted(prefixes, longer // i)
            state = core.new_empty(len(longer), states[-1].shape[1] * j, r)
            for digit in digits.unique().split(1):
                children = (digits == digit).nonzero().view(-1)
                level.append(_Level(digit, children, parents[children]))
                matrix = _of_digits(core, digit).reshape(d, j * r)
                product = states[-1][parents[children]] @ matrix
                state[children] = product.view(len(children), -1, r)
        states.append(state)
        levels.append(level)
        prefixes = longer
    return states, levels


def _step_backward(
    flow: Tensor,
    state: Tensor | None,
    core: Tensor,
    levels: Sequence[_Level],
    total: Tensor | None,
    pass_on: bool,
) -> Tensor:
    """Add one core's gradient to ``total``; the gradient of the state before it.

    Args:
        flow: gradient of the state after it.
        state: the one before it, None before the first core, whose gradient is the flow itself.
    """
    d, _, j, r = core.shape
    if state is None:
        if total is not None:
            total.index_add_(1, levels[0].digits, flow.view(1, -1, j, r).to(total))
        return flow
    before = torch.zeros_like(state) if pass_on else state
    for digits, children, parents in levels:
        of_product, n = flow[children], len(digits)
        if n > 1:  # of one parent: [J, (n j r)]
            of_product = of_product.view(n, -1, j * r).transpose(0, 1)
        of_product = of_product.reshape(-1, n * j * r)
        if total is not None:
            product = state[parents].reshape(-1, d).t() @ of_product
            total.index_add_(1, digits, product.view(d, n, j, r).to(total))
        if pass_on:
            product = of_product @ _of_digits(core, digits).reshape(d, -1).t()
            product = product.view(-1, *state.shape[1:])
            if isinstance(parents, Tensor):
                before.index_add_(0, parents, product)
            else:
                before = product
    return before
