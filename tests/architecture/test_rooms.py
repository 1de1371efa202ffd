"""The rooms: imports point downward, nothing goes in a circle, no private name leaves its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"bench": "bench", "mpo_kernels": "mpo_kernels"} | {
    name: f"python/{name}" for name in ("mpop", "mpop_serving")
}
# From the top floor down; what is not named itself belongs to the room that it is in.
FLOORS = (
    *("bench.__main__", "bench.test_daily", "bench.gpu", "bench.glue", "bench.layer", "bench"),
    *("mpop_serving", "mpop.__main__", "mpop.cli", "mpop"),
    *("mpop.integrations", "mpop.finetuning", "mpop.compression", "mpop.checkpoints"),
    *("mpop.models", "mpop.data"),
    *("mpo_kernels.__main__", "mpo_kernels", "mpo_kernels.layers", "mpo_kernels.ops"),
    *("mpo_kernels.backends", "mpo_kernels.backends.cuda", "mpo_kernels.backends.triton"),
    *("mpo_kernels.backends.torch", "mpo_kernels.planning", "mpo_kernels.cores"),
)
MOST_MODULES = 10


class Import(NamedTuple):
    """One name that a module takes from another, None where it takes the module whole."""

    source: str
    target: str
    name: str | None


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages by its dotted name, a package by its own."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room_of(module: str) -> str:
    """The place in ``FLOORS`` that a module has."""
    while module not in FLOORS:
        module, _, _ = module.rpartition(".")
        assert module, "a module without a floor"
    return module


def imports_of(source: str, tree: ast.Module) -> Iterator[Import]:
    """Wherever they stand: in functions and for the type checker too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (whole := f"{node.module}.{alias.name}") in modules():
                    yield Import(source, whole, None)
                elif node.module in modules():
                    yield Import(source, node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    yield Import(source, alias.name, None)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and ast.unparse(node.func).endswith("import_module")
        ):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and argument.value in modules():
                    yield Import(source, argument.value, None)


def imports() -> list[Import]:
    return [found for name, tree in modules().items() for found in imports_of(name, tree)]


def test_the_walk_sees_the_code() -> None:
    assert len(modules()) > 100 and len(imports()) > 400
    assert Import("mpop.cli.export", "mpop", None) in imports()  # within a function
    assert {room_of(name) for name in modules()} == set(FLOORS)


def test_imports_point_downward() -> None:
    upward = {
        f"{found.source} -> {found.target}"
        for found in imports()
        if FLOORS.index(room_of(found.target)) < FLOORS.index(room_of(found.source))
    }
    assert not upward


def test_nothing_goes_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.target != found.source:
            graph[found.source].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_private_name_leaves_its_room() -> None:
    taken = {
        f"{found.source} takes {found.target}.{found.name}"
        for found in imports()
        if found.name and found.name.startswith("_") and room_of(found.source) != found.target
        if not found.name.startswith("__") and room_of(found.source) != room_of(found.target)
    }
    for name, tree in modules().items():
        outside = {
            alias.asname or alias.name.rpartition(".")[2]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (
                whole := alias.name
                if isinstance(node, ast.Import)
                else f"{node.module}.{alias.name}"
            )
            in modules()
            and room_of(whole) != room_of(name)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in outside
                and node.attr.startswith("_")
            ):
                taken.add(f"{name} reads {ast.unparse(node)}")
    assert not taken


def test_rooms_are_small_and_say_what_they_are_for() -> None:
    rooms: dict[str, list[str]] = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            rooms.setdefault(".".join((package, *inside)), []).append(path.name)
    for room, files in rooms.items():
        # What a room holds beside the lines that say what it is for.
        assert len(set(files) - {"__init__.py"}) <= MOST_MODULES, room
        assert ast.get_docstring(modules()[room]), room
        assert room in FLOORS, room
