"""Which weights a model computes with by itself, as found in the source of its modules.

Most modules call their layers; some multiply by `layer.weight`, which an MPO layer does not have.
The forward of each module is walked, in all its branches: what expressions stand for is a set of
modules, or nothing. Where one stands for a layer and its weight is used for more than its dtype or
size, the model reads that weight. What the walk cannot follow is refused when it is computed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from types import FunctionType, MethodType
from typing import Any, TypeAlias

from torch import nn

from mpo_kernels import InterpolativeLinear, MPOEmbedding, MPOLinear
from mpo_kernels.layers.blockwise import BlockwiseEmbedding, BlockwiseLinear
from mpo_kernels.layers.quantized import QuantizedLayer

# What an expression stands for: modules, or functions bound to them.
Found: TypeAlias = frozenset[Any]
_NOTHING: Found = frozenset()

# Attributes and methods of a weight that tell of it without its values.
_QUESTIONS = {
    *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "itemsize", "nbytes"),
    *("is_cuda", "is_meta", "size", "dim", "numel", "nelement", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_sparse", "is_quantized"),
}
_ASKING = {"isinstance", "hasattr", "id", "type", "len"}
_ITERATING = {"enumerate", "zip", "reversed", "iter", "list", "tuple", "next", "sorted"}
# Torch's own layers, and those that take their place: a forward of theirs reads no other's weight.
_LEAVES = tuple(
    layer.forward
    for layer in (
        *(nn.Linear, MPOLinear, InterpolativeLinear, QuantizedLayer, BlockwiseLinear),
        *(nn.Embedding, MPOEmbedding, BlockwiseEmbedding),
    )
)


def weights_read(model: nn.Module, leaves: Iterable[Any] = ()) -> dict[nn.Module, str]:
    """The modules whose weight is computed with, and the function that does: `Mixer.forward`.

    Args:
        leaves: forwards, beside those of torch's layers, of what a layer can take the place of.
    """
    walk = _Walk(frozenset((*_LEAVES, *leaves)))
    for module in list(model.modules()):
        forward = _function(type(module), "forward")
        if forward is not None:
            walk.call(forward, {_own_name(forward): frozenset([module])}, type(module))
    return walk.read


class _Walk:
    def __init__(self, leaves: frozenset[Any]) -> None:
        self.leaves = leaves
        self.read: dict[nn.Module, str] = {}
        self.returning: list[Any] = []
        self._seen: set[Any] = set()

    def call(self, function: Any, given: Mapping[str, Found], cls: type | None) -> None:
        """Walk a function whose arguments stand for `given`."""
        key = (function, cls, frozenset(given.items()))
        if function is None or function in self.leaves or key in self._seen:
            return
        self._seen.add(key)
        if (source := _source(function)) is not None:
            _Body(self, function, cls, dict(given)).visit(source)


class _Body(ast.NodeVisitor):
    """One function with what its names stand for; later lines may add to it."""

    def __init__(self, walk: _Walk, function: Any, cls: type | None, names: dict[str, Found]):
        self.walk, self.function, self.cls, self.names = walk, function, cls, names
        self.own = names.get(_own_name(function), _NOTHING)

    def generic_visit(self, node: ast.AST) -> None:
        for part in _parts(node):
            self.visit(part)

    # What an expression stands for.

    def found(self, node: ast.AST | None) -> Found:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, _NOTHING)
        if isinstance(node, ast.Attribute):
            return _attribute(self.found(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return _items(self.found(node.value), node.slice)
        if isinstance(node, ast.Call):
            return self._result(node)
        if isinstance(node, ast.IfExp):
            return self.found(node.body) | self.found(node.orelse)
        if isinstance(node, ast.BoolOp):
            return self._all(node.values)
        if isinstance(node, ast.NamedExpr | ast.Starred | ast.Await):
            return self.found(node.value)
        if isinstance(node, ast.Tuple | ast.List):
            return self._all(node.elts)
        return _NOTHING

    def _all(self, nodes: Iterable[ast.AST]) -> Found:
        return _NOTHING.union(*(self.found(node) for node in nodes))

    def _result(self, node: ast.Call) -> Found:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "getattr" and len(node.args) > 1:
            held, key = self.found(node.args[0]), node.args[1]
            if isinstance(key, ast.Constant):
                return _attribute(held, str(key.value))
            return _NOTHING.union(*(_children(module) for module in held))
        if name in _ITERATING:
            return _NOTHING.union(*(_elements(self.found(a)) or self.found(a) for a in node.args))
        return _NOTHING.union(*(self._returned(*callee) for callee in self._callees(node.func)))

    def _returned(self, callee: Any, cls: type | None, own: Found) -> Found:
        """Modules that a method gives, as `get_input_embeddings` does."""
        values = _returns(callee) if own and callee not in self.walk.leaves else ()
        if not values or callee in self.walk.returning:
            return _NOTHING
        self.walk.returning.append(callee)
        body = _Body(self.walk, callee, cls, {_own_name(callee): own})
        found = _NOTHING.union(*(body.found(value) for value in values))
        self.walk.returning.pop()
        return found

    # Where names come from.

    def _bind(self, target: ast.AST, found: Found) -> None:
        if isinstance(target, ast.Name) and found:
            self.names[target.id] = self.names.get(target.id, _NOTHING) | found
        elif isinstance(target, ast.Tuple | ast.List):
            for each in target.elts:
                self._bind(each, found)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                self._bind(name, self.found(value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, self.found(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._each(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, self._each(node.iter))
        self.generic_visit(node)

    def _each(self, node: ast.AST) -> Found:
        found = self.found(node)
        is_call = isinstance(node, ast.Call | ast.Tuple | ast.List)
        return found if is_call else _elements(found)

    def _comprehended(self, node: Any) -> None:
        for generator in node.generators:  # before the element that uses its names
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehended

    # Weights that are used, and calls that pass modules on.

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Attribute) and node.attr in _QUESTIONS:
            self.visit(node.value.value)  # `layer.weight.dtype`
            return
        if node.attr == "weight":
            self._reads(node.value)
        self.generic_visit(node)

    def _reads(self, owner: ast.AST) -> None:
        for module in self.found(owner):
            self.walk.read.setdefault(module, self.function.__qualname__)

    def visit_If(self, node: ast.If) -> None:
        holds = self._known(node.test)
        self.visit(node.test)
        for line in node.body if holds is not False else ():
            self.visit(line)
        for line in node.orelse if not holds else ():
            self.visit(line)

    def _known(self, node: ast.expr) -> bool | None:
        """Whether a condition holds, where the settings of the module decide it."""
        if isinstance(node, ast.BoolOp):
            values = [self._known(each) for each in node.values]
            decides = isinstance(node.op, ast.Or)
            if decides in values:
                return decides
            return None if None in values else not decides
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._known(node.operand)
            return None if inner is None else not inner
        settings: dict[str, Any] = {}
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id != _own_name(self.function):
                return None
            if isinstance(part, ast.Call | ast.Subscript):
                return None
        if len(self.own) != 1:
            return None
        settings[_own_name(self.function)] = _Settings(*self.own)
        try:
            return bool(eval(compile(ast.Expression(node), "", "eval"), {}, settings))
        except (_Unknown, AttributeError, TypeError):
            return None

    def visit_Compare(self, node: ast.Compare) -> None:
        is_identity = all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
        if not is_identity:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in _ASKING:
            return
        if name == "getattr" and len(node.args) > 1 and ast.unparse(node.args[1]) == "'weight'":
            self._reads(node.args[0])
        for callee, cls, own in self._callees(node.func):
            self._pass(callee, cls, own, node)
        self.generic_visit(node)

    def _callees(self, func: ast.AST) -> Iterable[tuple[Any, type | None, Found]]:
        """Functions that a call may reach, the class they are looked up in, and their self."""
        if isinstance(func, ast.Name) and func.id not in self.names:
            function = getattr(self.function, "__globals__", {}).get(func.id)
            if isinstance(function, FunctionType):
                yield function, None, _NOTHING
            return
        if isinstance(func, ast.Attribute):
            owner = func.value
            if isinstance(owner, ast.Call) and _is_super(owner):
                for module in self.own:
                    yield _above(type(module), self.function, func.attr), None, frozenset([module])
                return
            for module in self.found(owner):
                if (function := _function(type(module), func.attr)) is not None:
                    yield function, type(module), frozenset([module])
        for module in self.found(func):
            yield _function(type(module), "forward"), type(module), frozenset([module])

    def _pass(self, callee: Any, cls: type | None, own: Found, node: ast.Call) -> None:
        if callee is None or not hasattr(callee, "__code__"):
            return
        code = inspect.unwrap(callee).__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = dict(zip(parameters[:1], [own], strict=False)) if own else {}
        for parameter, value in zip(parameters[len(given) :], node.args, strict=False):
            given[parameter] = self.found(value)
        for keyword in node.keywords:
            if keyword.arg in parameters:
                given[str(keyword.arg)] = self.found(keyword.value)
        given = {parameter: found for parameter, found in given.items() if found}
        if given:
            self.walk.call(callee, given, cls)


class _Unknown(Exception):
    pass


class _Settings:
    """The plain values of a module or configuration; what changes from call to call is unknown."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._owner, name)
        if name == "training" or not isinstance(value, bool | int | float | str | None):
            if name != "config":
                raise _Unknown(name)
            return _Settings(value)
        return value


def _own_name(function: Any) -> str:
    """What a method calls the module that it is of."""
    names = inspect.unwrap(function).__code__.co_varnames
    return names[0] if names else ""


def _attribute(held: Found, name: str) -> Found:
    values = (getattr(module, name, None) for module in held)
    return frozenset(value for value in values if isinstance(value, nn.Module))


def _children(module: nn.Module) -> Found:
    return frozenset(module.children())


def _elements(held: Found) -> Found:
    return _NOTHING.union(*(_children(module) for module in held))


def _items(held: Found, index: ast.AST) -> Found:
    try:
        key = ast.literal_eval(index)
        return frozenset(module[key] for module in held)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return _elements(held)


def _function(cls: type, name: str) -> Any:
    value = inspect.getattr_static(cls, name, None)
    return value if isinstance(value, FunctionType) else None


def _above(cls: type, function: Any, name: str) -> Any:
    """What `super().name` is inside `function`."""
    defined = [each for each in cls.__mro__ if inspect.unwrap(function).__code__ in _codes(each)]
    above = cls.__mro__[cls.__mro__.index(defined[0]) + 1 :] if defined else ()
    found = (vars(each)[name] for each in above if name in vars(each))
    value = next(found, None)
    return value if isinstance(value, FunctionType) else None


def _codes(cls: type) -> list[Any]:
    functions = (value for value in vars(cls).values() if isinstance(value, FunctionType))
    return [inspect.unwrap(function).__code__ for function in functions]


def _is_super(call: ast.Call) -> bool:
    is_bare = not call.args and not call.keywords
    return is_bare and isinstance(call.func, ast.Name) and call.func.id == "super"


@cache
def _source(function: Any) -> ast.AST | None:
    """The tree of a function's definition; None where there is no source."""
    function = inspect.unwrap(function)
    if isinstance(function, MethodType):
        function = function.__func__
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


@cache
def _returns(function: Any) -> tuple[ast.expr, ...]:
    """What a function returns, and those inside it."""
    source = _source(function)
    nodes = () if source is None else ast.walk(source)
    return tuple(node.value for node in nodes if isinstance(node, ast.Return) and node.value)


# Without parts that could stand for anything.
_PLAIN = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Constant)


@cache
def _parts(node: ast.AST) -> list[ast.AST]:
    """The children of a node of a source, which is kept, that there is something to find in."""
    return [part for part in ast.iter_child_nodes(node) if not isinstance(part, _PLAIN)]
