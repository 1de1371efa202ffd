"""Reordering hidden units of feed-forward blocks, which leaves a model's function unchanged.

Between the two matrices of a block only an elementwise function acts, so their hidden units may
stand in any order. A chain of several input digits likes neighbours that are alike: units are
sorted by the leading singular vector of the matrix that reads them. Low rank does not care.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from mpop.models.matrices import Names, module_at, weight_of

# The end of the names of the matrices that write hidden units, and of the one that reads them.
_BLOCKS = (
    (("intermediate.dense",), "output.dense"),  # BERT and its relatives
    (("ffn",), "ffn_output"),  # ALBERT
    (("lin1",), "lin2"),  # DistilBERT
    (("c_fc",), "c_proj"),  # GPT-2
    (("gate_proj", "up_proj"), "down_proj"),  # Llama
    (("wi",), "wo"),  # T5
    (("wi_0", "wi_1"), "wo"),
)


def blocks(selected: Collection[Names]) -> Iterator[tuple[list[str], str]]:
    """The matrices that write and the one that reads the hidden units of each block."""
    names = {each[0] for each in selected if len(each) == 1}
    for writers, reader in _BLOCKS:
        for name in sorted(names):
            stem = name.removesuffix(reader)
            written = [f"{stem}{writer}" for writer in writers]
            if name.endswith(f".{reader}") and names.issuperset(written):
                yield written, name


@torch.no_grad()
def sort_hidden_units(model: nn.Module, selected: Collection[Names]) -> Callable[[], None]:
    """Sort the hidden units of every block whose matrices are all selected, in place.

    Returns:
        What puts them back as they were.
    """
    orders = []
    for written, reader in blocks(selected):
        weight = weight_of(module_at(model, reader)).detach().float()
        order = torch.linalg.eigh(weight.t() @ weight).eigenvectors[:, -1].argsort()
        _reorder(model, written, reader, order)
        orders.append((written, reader, order.argsort()))

    @torch.no_grad()
    def undo() -> None:
        for written, reader, order in orders:
            _reorder(model, written, reader, order)

    return undo


def _reorder(model: nn.Module, written: list[str], reader: str, order: Tensor) -> None:
    for name in written:
        module = module_at(model, name)
        weight_of(module).copy_(weight_of(module)[order])
        if module.bias is not None:
            module.bias.copy_(module.bias[order])
    read = weight_of(module_at(model, reader))
    read.copy_(read[:, order])
