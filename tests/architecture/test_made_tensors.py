"""No tensor is made without a dtype and a device: defaults that a user sets must not reach it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKERS = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros"),
}


def made_without(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in MAKERS
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]


@pytest.mark.parametrize("package", ["mpo_kernels", "python/mpop", "python/mpop_serving"])
def test_dtype_and_device_are_named(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / package).rglob("*.py"))
        if (lines := made_without(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source", ["torch.zeros(3)", "torch.tensor(1.0, dtype=d)", "f(torch.randn(2, device=d))"]
)
def test_the_walk_finds_them(source: str) -> None:
    assert made_without(source)
