"""Which matrices of a checkpoint a layer of a served model holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from mpop.models.config import ModuleSpec

    Specs: TypeAlias = Mapping[str, ModuleSpec]


def find(specs: Specs, name: str) -> tuple[str, ModuleSpec] | None:
    """The matrix of this name, which a bare model has with a shorter or longer prefix."""
    for known, spec in specs.items():
        if known == name or name.endswith(f".{known}") or known.endswith(f".{name}"):
            return known, spec
    return None


def fused(
    specs: Specs, prefix: str, packed: Mapping[str, Sequence[str]]
) -> list[tuple[str, ModuleSpec | None]] | None:
    """The matrices of the linear layer ``prefix``, None for a dense one; None where all are.

    Args:
        packed: by the last part of a fused layer's name, those of its matrices in the checkpoint.
    """
    parent, _, leaf = prefix.rpartition(".")
    if leaf == "qkv_proj":
        # BERT's self-attention is built under the name of its neighbour.
        parent = re.sub(r"\.attention\.output$", ".attention.self", parent)
    names = [f"{parent}.{part}" for part in packed.get(leaf, [leaf])]
    found = [find(specs, name) for name in names]
    if not any(found):
        return None
    return [matrix or (name, None) for name, matrix in zip(names, found, strict=True)]


def table(specs: Specs, size: tuple[int, int]) -> tuple[str, ModuleSpec] | None:
    """The word embedding of this size ``(ids, dim)``: models build theirs without its name."""
    for name, spec in specs.items():
        if (spec.kind, spec.shape.in_features, spec.shape.out_features) == ("embedding", *size):
            return name, spec
    return None
