"""The best tile for a problem: what was measured on this device, else what the model says.

With ``MPO_KERNELS_TUNE=1`` a problem met for the first time is measured on random data, and the
fastest of the model's first candidates is kept (``planning/measured.py``). The key names the row
bucket, never the rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from mpo_kernels.backends.triton import tiles
from mpo_kernels.backends.triton.device import source_hash
from mpo_kernels.backends.triton.tiles import Chain, Limits, TwoParts
from mpo_kernels.planning import measured

logger = logging.getLogger(__name__)

TILES: dict[str, Callable[..., tuple[tuple[float, Any], ...]]] = {
    "chain": tiles.chain_tiles,
    "matrix": tiles.matrix_tiles,
    "matrix_gradient": partial(tiles.matrix_tiles, gradient=True),
    "gather": tiles.gather_tiles,
    "gather_gradient": partial(tiles.gather_tiles, gradient=True),
}
# How many of the model's candidates are measured.
CANDIDATES = 12


class Best(NamedTuple):
    """A tile, the seconds it takes, and whether those were measured on the device."""

    seconds: float
    tile: Any
    measured: bool


def best(
    kernel: str, problem: Chain | TwoParts, rows: int, dtype: torch.dtype, limits: Limits
) -> Best | None:
    """The best tile that is known, or None where no tile fits the device.

    Args:
        kernel: a key of ``TILES``.
        problem: what is computed.
        rows: a bucket, a power of two.
        dtype: of the operands.
        limits: of the device, and its name.
    """
    key = f"{kernel} {tuple(problem)} {rows} {dtype}".replace("torch.", "")
    candidates = TILES[kernel](problem, rows, dtype.itemsize, limits)
    if not candidates:
        return None
    if known := _stored(limits.name, key, type(candidates[0][1])):
        return known
    if _may_measure(limits.name):
        timed = _measure(kernel, problem, rows, dtype, candidates[:CANDIDATES])
        if timed:
            found = Best(*min(timed), True)
            value = {"seconds": found.seconds, "tile": found.tile._asdict()}
            measured.put(limits.name, section(), key, value)
            return found
    return Best(*candidates[0], False)


def section() -> str:
    """What was measured holds for the kernels as they are."""
    return f"tiles {source_hash()}"


def _stored(name: str, key: str, kind: type[Any]) -> Best | None:
    stored = measured.get(name, section(), key)
    try:
        return stored and Best(float(stored["seconds"]), kind(**stored["tile"]), True)
    except (TypeError, ValueError, KeyError) as error:
        logger.warning("what was measured for %s is not used: %s", key, error)
        return None


def _may_measure(name: str) -> bool:
    """Asked for, on the device that computes, and not within a graph's capture."""
    return (
        os.environ.get("MPO_KERNELS_TUNE") == "1"
        and torch.cuda.is_available()
        and measured.device_name(torch.device("cuda", torch.cuda.current_device())) == name
        and not torch.cuda.is_current_stream_capturing()
    )


def _measure(
    kernel: str,
    problem: Any,
    rows: int,
    dtype: torch.dtype,
    candidates: tuple[tuple[float, Any], ...],
) -> list[tuple[float, Any]]:
    """Seconds of the tiles that run, none where there is no memory for the operands."""
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    timed: list[tuple[float, Any]] = []
    try:
        run = runner(kernel, problem, rows, dtype, device)
        for _, tile in candidates:
            try:
                milliseconds = do_bench(partial(run, tile), warmup=5, rep=20, return_mode="median")
                timed.append((milliseconds / 1e3, tile))
            except RuntimeError as error:  # a tile that the model thought would fit
                logger.info("%s", error)
    except torch.OutOfMemoryError as error:
        logger.warning("%s is not tuned: %s", kernel, error)
    return timed


def runner(
    kernel: str, problem: Any, rows: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Any], Any]:
    """A call of ``kernel`` on fresh random operands, for a tile."""
    from mpo_kernels.backends.triton.chain import chain
    from mpo_kernels.backends.triton.gather import gather, gather_gradient
    from mpo_kernels.backends.triton.matrix import matrix_chain, matrix_gradient

    # A generator of its own: tuning must not change what the caller draws next.
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    p = problem
    x, y = random(rows, p.in_features), random(rows, p.out_features)
    a_in, a_out, b_in, b_out, rank = p[:5]
    a, b = random(a_in, a_out, rank), random(b_in, b_out, rank)
    if kernel == "chain":
        return lambda tile: chain(x, a, b, None, p, tile)
    if kernel == "matrix":
        return lambda tile: matrix_chain(x, a, b, None, p, tile)
    if kernel == "matrix_gradient":
        return lambda tile: matrix_gradient(x, y, a, p, tile)
    ids = torch.randint(
        p.in_features, (rows,), dtype=torch.int64, device=device, generator=generator
    )
    if kernel == "gather":
        return lambda tile: gather(ids, a, b, p, tile)
    return lambda tile: gather_gradient(y, ids, b, True, p, tile)
