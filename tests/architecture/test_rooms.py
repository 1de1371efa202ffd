"""The rooms: imports point downward, nothing goes in a circle, no private name leaves its room."""

from __future__ import annotations

import ast
import re
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
    *(
        "bench.__main__",
        "bench.figures",
        "bench.train_step",
        "bench.gpu",
        "bench.language",
        "bench.glue",
        "bench.layer",
        "bench",
    ),
    *("mpop_serving", "mpop.__main__", "mpop.cli", "mpop.cli.options", "mpop"),
    *("mpop.integrations", "mpop.language", "mpop.finetuning", "mpop.compression"),
    *("mpop.checkpoints", "mpop.models", "mpop.data"),
    *("mpo_kernels.__main__", "mpo_kernels", "mpo_kernels.layers", "mpo_kernels.ops"),
    *("mpo_kernels.backends", "mpo_kernels.backends.cuda", "mpo_kernels.backends.triton"),
    *("mpo_kernels.backends.torch", "mpo_kernels.planning", "mpo_kernels.cores"),
)
MOST_MODULES = 10


class Import(NamedTuple):
    """What a module takes from another: a name, None for the module itself; and by what name."""

    source: str
    target: str
    name: str | None
    alias: str


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
    """Wherever they stand: in functions, for the type checker, and by ``import_module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                called = alias.asname or alias.name
                if (whole := f"{node.module}.{alias.name}") in modules():
                    yield Import(source, whole, None, called)
                elif node.module in modules():
                    yield Import(source, node.module, alias.name, called)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    yield Import(source, alias.name, None, alias.asname or alias.name)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
            # By name: what stands in braces may be any.
            parts = getattr(node.args[0], "values", node.args[:1])
            texts = [p.value if isinstance(p, ast.Constant) else None for p in parts]
            wanted = "".join(r"\w+" if text is None else re.escape(str(text)) for text in texts)
            for name in filter(re.compile(wanted).fullmatch, modules() if any(texts) else ()):
                yield Import(source, name, None, name)


@cache
def imports() -> list[Import]:
    return [found for name, tree in modules().items() for found in imports_of(name, tree)]


def leaves(found: Import) -> bool:
    return room_of(found.source) != room_of(found.target)


def test_the_walk_sees_the_code() -> None:
    assert len(modules()) > 100 and len(imports()) > 400
    assert Import("mpop.cli.export", "mpop", None, "mpop") in imports()  # within a function
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
    """Neither imported nor read of what was, a module's or a class's."""
    private = re.compile(r"_(?!_)")
    taken = [found for found in filter(leaves, imports()) if private.match(found.name or "")]
    for name, tree in modules().items():
        outside = {found.alias for found in imports() if found.source == name and leaves(found)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private.match(node.attr):
                read = ast.unparse(node.value)
                if any(read == alias or read.startswith(f"{alias}.") for alias in outside):
                    taken.append((name, ast.unparse(node)))
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
