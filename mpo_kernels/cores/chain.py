"""Chains of cores [D_k, i_k, j_k, D_{k+1}]: checks, merging, canonical form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def merge_cores(cores: Sequence[Tensor]) -> Tensor:
    """Contract neighbouring cores into one: ``[D_a, ∏ i, ∏ j, D_b]``."""
    merged = cores[0]
    for core in cores[1:]:
        d, i, j, bond = merged.shape
        _, ik, jk, dk = core.shape
        product = merged.reshape(-1, bond) @ core.reshape(bond, -1)
        product = product.view(d, i, j, ik, jk, dk).transpose(2, 3)
        merged = product.reshape(d, i * ik, j * jk, dk)
    return merged


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖A − B‖_F / ‖A‖_F of the matrices that two chains of the same factors stand for, in fp64."""

    def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        state = a[0].new_ones(1, 1, dtype=torch.float64)
        for x, y in zip(a, b, strict=True):
            state = torch.einsum("ab,aijc,bijd->cd", state, x.double(), y.double())
        return float(state)

    whole = product(a, a)
    square = whole - 2 * product(a, b) + product(b, b)
    return math.sqrt(max(square, 0.0) / whole) if whole > 0 else 0.0


def check_finite(cores: Sequence[Tensor]) -> None:
    """Raise a ValueError that names the first of ``cores`` with a NaN or an Inf in it."""
    for k, core in enumerate(cores):
        if not torch.isfinite(core).all():
            raise ValueError(f"expected finite cores, got NaN or Inf in core {k}")


def check_cores(cores: Sequence[Tensor]) -> None:
    """Raise a ValueError unless ``cores`` are 4-dimensional and chain from bond 1 to bond 1."""
    shapes = [tuple(core.shape) for core in cores]
    if (
        not shapes
        or any(len(shape) != 4 for shape in shapes)
        or not shapes[0][0] == shapes[-1][3] == 1
        or any(a[3] != b[0] for a, b in pairwise(shapes))
    ):
        raise ValueError(
            f"expected cores [D_k, i_k, j_k, D_k+1] that chain from 1 to 1, got {shapes}"
        )


def move_centre(cores: list[Tensor], k: int, to: int) -> None:
    """Make core k orthogonal towards its neighbour ``to``, which takes what is left of it."""
    d, i, j, r = cores[k].shape
    if to > k:
        q, carry = torch.linalg.qr(cores[k].reshape(d * i * j, r))
        cores[k], cores[to] = q.reshape(d, i, j, -1), torch.tensordot(carry, cores[to], dims=1)
    else:
        q, carry = torch.linalg.qr(cores[k].reshape(d, i * j * r).t())
        cores[k] = q.t().reshape(-1, i, j, r)
        cores[to] = torch.tensordot(cores[to], carry.t(), dims=1)


def orthogonalise(cores: Sequence[Tensor], stop: int) -> list[Tensor]:
    """Make the cores right of ``stop`` right-orthogonal, carrying the remainder left to it."""
    cores = list(cores)
    for k in range(len(cores) - 1, stop, -1):
        move_centre(cores, k, k - 1)
    return cores
