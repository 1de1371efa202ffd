"""The operators as functions of x (or ids) and cores, after the checks that torch cannot make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from mpo_kernels.cores.chain import check_cores
from mpo_kernels.ops.eager import unobserved
from mpo_kernels.ops.schemas import computed


def checked_features(name: str, features: int | None, product: int) -> int:
    """``features``, by default the product of the factors, which it must not pass."""
    if features is None:
        return product
    if not 1 <= features <= product:
        raise ValueError(
            f"expected 1 <= {name} <= {product}, the product of the factors, got {features}"
        )
    return features


def check_input(x: Tensor, in_features: int) -> None:
    """Raise unless ``x`` is a floating-point tensor ``[..., in_features]``."""
    if not x.is_floating_point() or x.itemsize < 2:  # nothing is computed in eight bits
        raise TypeError(f"expected a floating-point x, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"expected x [..., {in_features}], got {list(x.shape)}")


def check_ids(ids: Tensor) -> None:
    """Raise unless ``ids`` is an int32 or int64 tensor; the operator looks at their range."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected int32 or int64 ids, got {ids.dtype}")


def of_nested(function: Callable[[Tensor], Tensor], x: Any, trailing: int) -> Tensor:
    """``function`` of the items of a nested tensor at once, ragged as ``x`` is.

    Args:
        trailing: the dimensions of an item: 1 of a row, 0 of an id.
    """
    if x.layout is torch.jagged:
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), x.offsets(), x.lengths(), x._ragged_idx
        )
    parts = x.unbind()
    leading = [part.shape[: part.dim() - trailing] for part in parts]
    items = [
        part.reshape(math.prod(sizes), *part.shape[len(sizes) :])
        for part, sizes in zip(parts, leading, strict=True)
    ]
    results = function(torch.cat(items)).split([len(each) for each in items])
    return torch.nested.as_nested_tensor(
        [y.view(*sizes, y.shape[-1]) for y, sizes in zip(results, leading, strict=True)]
    )


def linear(x: Tensor, cores: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """The operator after its checks of shape; at once where only its result can be seen.

    Dispatching to Python and back costs as much as a small layer.
    """
    if unobserved(x, cores, bias):
        return computed(x, cores, bias, out_features)
    return torch.ops.mpo_kernels.linear(x, cores, bias, out_features)


def interpolative(
    x: Tensor, coefficients: Tensor, pivots: Tensor, order: Tensor, bias: Tensor | None
) -> Tensor:
    """``x [..., n] -> [..., m]`` by r rows of a weight, and what makes the others of them.

    Args:
        coefficients: T ``[m − r, r]``.
        pivots: B ``[r, n]``.
        order: int64 ``[m]``: where in ``cat(x Bᵀ, x Bᵀ Tᵀ)`` each output stands.
        bias: ``[m]`` or None.
    """
    z = dense_linear(x, pivots)
    y = torch.cat((z, dense_linear(z, coefficients)), -1).index_select(-1, order)
    return y if bias is None else y + bias.to(y.dtype)


def mpo_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """``x · W + bias`` for the ``W [in, out]`` that ``cores`` stand for, which is never formed.

    Args:
        x: ``[..., in_features]``, any floating dtype, any strides; nested, in either layout.
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``, of x's dtype and device.
        bias: ``[out_features]``.
        in_features: true input size where the factors are padded; default ∏ i_k.
        out_features: true output size, likewise; default the bias's, or ∏ j_k.

    Returns:
        ``[..., out_features]``, contiguous, in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    check_cores(cores)
    outs = math.prod([core.shape[2] for core in cores])
    if out_features is None and bias is not None and bias.dim() == 1:
        out_features = bias.shape[0]
    out_features = checked_features("out_features", out_features, outs)
    ins = math.prod([core.shape[1] for core in cores])
    in_features = checked_features("in_features", in_features, ins)
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"expected a bias [{out_features}], got {list(bias.shape)}")
    if x.is_nested:
        function = partial(
            mpo_linear, cores=cores, bias=bias, in_features=in_features, out_features=out_features
        )
        return of_nested(function, x, 1)
    check_input(x, in_features)
    return linear(x, list(cores), bias, out_features)


def mpo_embedding(
    ids: Tensor,
    cores: Sequence[Tensor],
    padding_idx: int | None = None,
    *,
    num_embeddings: int | None = None,
    embedding_dim: int | None = None,
) -> Tensor:
    """Rows ``ids`` of the table ``W [num_embeddings, embedding_dim]`` that ``cores`` stand for.

    Only the rows asked for are formed, each distinct one once.

    Args:
        ids: ``[...]``, int32 or int64, in [0, num_embeddings); nested, in either layout.
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``, i over the table's rows, j over its columns.
        padding_idx: an id whose occurrences pass no gradient on.
        num_embeddings: true number of rows where the factors are padded; default ∏ i_k.
        embedding_dim: true row length, likewise; default ∏ j_k.

    Returns:
        ``[..., embedding_dim]`` in the cores' dtype.

    Raises:
        TypeError, ValueError: what was expected and what came. IndexError: an id out of range; on
            a CUDA device an assertion of the device's, as ``nn.Embedding`` has it.
    """
    check_cores(cores)
    ins = math.prod([core.shape[1] for core in cores])
    outs = math.prod([core.shape[2] for core in cores])
    num_embeddings = checked_features("num_embeddings", num_embeddings, ins)
    embedding_dim = checked_features("embedding_dim", embedding_dim, outs)
    if padding_idx is not None:
        if not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"expected padding_idx within {num_embeddings} rows, got {padding_idx}"
            )
        padding_idx %= num_embeddings
    if ids.is_nested:
        function = partial(
            mpo_embedding,
            cores=cores,
            padding_idx=padding_idx,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
        )
        return of_nested(function, ids, 0)
    return embedding(ids, cores, padding_idx, num_embeddings, embedding_dim)


def embedding(
    ids: Tensor,
    cores: Sequence[Tensor],
    padding_idx: int | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    """:func:`mpo_embedding` after its checks of shape: ids, padding, then the operator."""
    check_ids(ids)
    rows = torch.ops.mpo_kernels.embedding(ids, cores, num_embeddings, embedding_dim)
    if padding_idx is not None and rows.requires_grad:
        rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows
