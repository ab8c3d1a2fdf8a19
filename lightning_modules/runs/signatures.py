"""Signatures and constants of classes, read from their source: to import torch and Lightning takes seconds."""

import ast
import builtins
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PLAIN = {"dataclass", "final", "staticmethod", "classmethod"}  # decorators that leave a signature as it is
_ABSTRACT = ("ABC", "Protocol", "Generic", "object")
_OWN_ROOMS = ("callbacks", "datamodules", "lightning_modules")  # in which all there is can be found
_visited: list[str] = []  # names and aliases that are being followed
_unfolded: list[str] = []


@dataclass(frozen=True)
class Found:
    """The definition that a dotted name leads to.

    Attributes:
        module: dotted name of the module in which it stands.
        node: the statement; the whole module, if it is one.
    """

    module: str
    node: ast.AST

    def inner(self, name: str) -> "Found | None":
        """Find a name in a module, or in a class and those from which it inherits."""
        if isinstance(self.node, ast.ClassDef):
            owners = (owner for owner in lineage(self) if any(_defines(each, name) for each in _body(owner)))
            owner = next(owners, None)
            defined = [each for each in _body(owner) if _defines(each, name)] if owner else []
            return Found(owner.module, defined[0]) if owner and len(defined) == 1 else None
        if not isinstance(self.node, ast.Module):
            return None
        defined = [each for each in _body(self) if _defines(each, name) or _imported(self.module, each, name)]
        if not defined:
            return locate_module(f"{self.module}.{name}")
        if len(defined) > 1:  # which of them counts is known when the module runs
            return None
        origin = _imported(self.module, defined[0], name)
        if origin is None:
            return Found(self.module, defined[0])
        return locate_module(origin) if origin == f"{self.module}.{name}" else locate(origin)


def locate(target: str) -> Found | None:
    """Find what a dotted name leads to, through imports from other modules; None if its source does not tell."""
    if target in _visited:  # modules that import from one another
        return None
    _visited.append(target)
    try:
        names = target.split(".")
        inner = next((end for end in range(len(names) - 1, 1, -1) if _file(".".join(names[:end]))), 1)  # package's last
        return _within(locate_module(".".join(names[:inner])), names[inner:])
    finally:
        _visited.pop()


def is_missing(target: str) -> bool:
    """Say if there is surely nothing of a dotted name: no package, or the source of its module has none."""
    module, _, name = target.rpartition(".")
    top = module.partition(".")[0]
    if not module or _is_nowhere(top):
        return True
    if top in sys.stdlib_module_names:
        return False
    return (top in _OWN_ROOMS and locate(module) is None) or not (_may_have(module, name) or _is_set(module, name))


def _may_have(module: str, name: str, follow: bool = True) -> bool:
    """Say if a module may have a name; `follow` looks into the modules from which it takes all names."""
    found = locate_module(module)
    if found is None or found.inner(name) is not None or f"'{name}'" in ast.dump(found.node):
        return True
    if any(_defines(each, "__getattr__") for each in _body(found)):
        return True
    starred = [origin.removesuffix(".*") for each in _body(found) if (origin := _imported(module, each, "*"))]
    there = [origin for origin in starred if any(_beside(origin))]  # others are imported under a condition
    return any(_may_have(origin, name, follow=False) for origin in there) if follow else bool(there)


def _is_set(module: str, name: str) -> bool:
    """Say if some module of the package around it may set a name of a module, as Lightning does with its old names."""
    files = (file for each in _beside(".".join(module.split(".")[:2])) for file in (each, *each.rglob("*.py")))
    texts = (file.read_text("utf-8", errors="replace") for file in files if file.suffix == ".py")
    return any("setattr(" in text and f'"{name}"' in text for text in texts)


def _beside(module: str) -> Iterator[Path]:
    """Yield the files and folders that a module may consist of, compiled or not."""
    package, _, last = module.rpartition(".")
    if package:
        file = _file(package)
        folder = file.parent if file and file.name == "__init__.py" else file
        yield from folder.glob(f"{last}*") if folder else ()
    elif file := _file(module):
        yield file.parent


def _is_nowhere(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ValueError:  # of one that was made by hand
        return False


def signature(target: str) -> dict[str, Any]:
    """List what a class or function takes, with annotations; `**` if it takes any name, nothing if that is unknown.

    A class in an annotation is a stand-in of its name, unless it belongs to Python itself.
    """
    return {name: hint for name, (hint, _) in _parameters(target).items()}


def required(target: str) -> list[str]:
    """List what a class or function has no default for, as far as that is known."""
    return [name for name, (_, is_required) in _parameters(target).items() if is_required]


@cache
def _parameters(target: str) -> dict[str, tuple[Any, bool]]:
    found = locate(target)
    if found is None or not _decorators(found) <= _PLAIN:  # others may change what is taken
        return {}
    if isinstance(found.node, ast.FunctionDef):
        owner = locate(target.rpartition(".")[0])
        within = owner is not None and isinstance(owner.node, ast.ClassDef)
        return _taken(found, bound=within and "staticmethod" not in _decorators(found))
    for owner in lineage(found) if isinstance(found.node, ast.ClassDef) else ():
        constructors = [each for each in _body(owner) if _defines(each, "__init__")]
        if constructors:
            is_one = len(constructors) == 1 and isinstance(constructors[0], ast.FunctionDef)
            return _taken(Found(owner.module, constructors[0]), bound=True) if is_one else {}
        if _is_dataclass(owner):
            owners = [each for each in reversed([*lineage(owner)]) if _is_dataclass(each)]
            return dict(field for each in owners for field in _fields(each))
    return {}


def constant(target: str, name: str, otherwise: Any) -> Any:
    """Return what a class says of itself in a plain value, or by its name; `otherwise` if it says nothing of these."""
    found = locate(target)
    said = found and found.inner(name)
    try:
        value = said.node.value  # type: ignore[union-attr]
        if isinstance(value, ast.Name) and found.inner(value.id) is None:  # type: ignore[union-attr]
            value = locate(f"{said.module}.{value.id}").node.value  # type: ignore[union-attr]
        return ast.literal_eval(value)
    except (AttributeError, TypeError, ValueError):
        return otherwise


def named_class(target: str, name: str) -> Found | None:
    """Find the class that a class calls by a name in its body, None if its source does not tell."""
    found = locate(target)
    said = found and found.inner(name)
    value = getattr(said and said.node, "value", None)
    named = locate(f"{said.module}.{value.id}") if said and isinstance(value, ast.Name) else None
    return named if named and isinstance(named.node, ast.ClassDef) else None


def lineage(found: Found) -> Iterator[Found]:
    """Yield a class and those from which it inherits, depth first; those without source are left out."""
    yield found
    for base in found.node.bases:  # type: ignore[attr-defined]
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        above = _within(locate_module(found.module), name.split("."))
        if above and isinstance(above.node, ast.ClassDef):
            yield from lineage(above)


@cache
def locate_module(name: str) -> Found | None:
    """Find a module by its dotted name, without importing it or the packages around it.

    Those of Python itself are taken for empty: what is asked of them is asked of the modules.
    """
    file = _file(name)
    is_read = file and not file.is_dir() and name.partition(".")[0] not in sys.stdlib_module_names
    try:
        return Found(name, ast.parse(file.read_bytes() if file and is_read else b"")) if file else None
    except (SyntaxError, ValueError):  # said when it is imported
        return None


@cache
def _file(module: str) -> Path | None:
    """Return the file of a module; the folder of a package that has no file."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # a module that was made while the program runs
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if str(spec.origin).endswith(".py") and spec.origin and not rest else None
    places = [Path(place, *rest) for place in spec.submodule_search_locations]
    files = [file for place in places for file in (place / "__init__.py", Path(f"{place}.py"))]
    folders = filter(Path.is_dir, places)  # packages without __init__.py
    return next((file for file in files if file.is_file()), next(folders, None))


def _within(found: Found | None, names: list[str]) -> Found | None:
    for name in names:
        found = found and found.inner(name)
    return found


def _body(found: Found) -> Iterator[ast.stmt]:
    """Yield the statements of a module or a class, those under a condition as well."""
    waiting: list[ast.stmt] = list(found.node.body)  # type: ignore[attr-defined]
    while waiting:
        statement = waiting.pop(0)
        if isinstance(statement, ast.If | ast.Try):
            handlers = statement.handlers if isinstance(statement, ast.Try) else []
            handled = [each for handler in handlers for each in handler.body]
            waiting = [*statement.body, *handled, *statement.orelse, *waiting]
        else:
            yield statement


def _defines(statement: ast.AST, name: str) -> bool:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return statement.name == name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(each, ast.Name) and each.id == name for each in targets)


def _imported(module: str, statement: ast.stmt, name: str) -> str | None:
    """Return the dotted name of what a statement imports under a name."""
    if isinstance(statement, ast.Import):
        names = {alias.asname or alias.name.partition(".")[0]: alias.name for alias in statement.names if alias.asname}
        plain = {alias.name.partition(".")[0] for alias in statement.names if not alias.asname}
        return names.get(name, name if name in plain else None)
    if not isinstance(statement, ast.ImportFrom):
        return None
    origin = statement.module or ""
    if statement.level:
        file = _file(module)
        inside = module.split(".")
        up = statement.level - (file is not None and file.name == "__init__.py")
        origin = ".".join([*inside[: len(inside) - up], *filter(None, [statement.module])])
    names = {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in statement.names}
    return names.get(name)


def _taken(found: Found, bound: bool) -> dict[str, tuple[Any, bool]]:
    """List the parameters of a function; the first of a bound one is the object or its class."""
    arguments: ast.arguments = found.node.args  # type: ignore[attr-defined]
    first = len(arguments.args) - len(arguments.defaults)  # that has a default
    named = [(each, place < first) for place, each in enumerate(arguments.args)][bound and not arguments.posonlyargs :]
    only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    named += [(each, default is None) for each, default in only]
    taken = {each.arg: (_annotation(found.module, each.annotation), is_required) for each, is_required in named}
    if arguments.kwarg:
        taken["**"] = (Any, False)
    return taken


def _decorators(found: Found) -> set[str]:
    """Return the names of decorators, without the modules that they are in and what they are given."""
    written: list[ast.expr] = getattr(found.node, "decorator_list", [])
    return {ast.unparse(each).partition("(")[0].rpartition(".")[2] for each in written}


def _is_dataclass(found: Found) -> bool:
    return "dataclass" in _decorators(found)


def _fields(found: Found) -> Iterator[tuple[str, tuple[Any, bool]]]:
    """Yield the fields of a dataclass that its constructor takes."""
    for statement in _body(found):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ast.unparse(statement)
            if "ClassVar" not in text and "init=False" not in text:
                yield statement.target.id, (_annotation(found.module, statement.annotation), statement.value is None)


def _annotation(module: str, node: ast.expr | None) -> Any:
    """Evaluate an annotation as it stands in a module; Any where that needs more than its source."""
    try:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        return eval(compile(ast.Expression(node), module, "eval"), {}, _Names(module)) if node else Any
    except Exception:  # of any kind: it is the code of another package
        return Any


class _Names(dict[str, Any]):
    """The names of a module, each found when it is first asked for."""

    def __init__(self, module: str) -> None:
        super().__init__(vars(builtins))
        self.module = module

    def __missing__(self, name: str) -> Any:
        inside = locate_module(self.module)
        imported = (_imported(self.module, statement, name) for statement in (_body(inside) if inside else ()))
        self[name] = _value(next(filter(None, imported), f"{self.module}.{name}"))
        return self[name]


def _value(target: str) -> Any:
    """Return an object of Python itself, the value of an alias, or a stand-in for a class of that name."""
    top, _, name = target.rpartition(".")
    if target.partition(".")[0] in sys.stdlib_module_names:
        return getattr(import_module(top), name) if top else import_module(name)
    found = locate(target)
    if found and isinstance(found.node, ast.Module):
        return _Module(found.module)
    if found and isinstance(found.node, ast.Assign | ast.AnnAssign) and target not in _unfolded:
        _unfolded.append(target)  # an alias may refer to itself
        try:
            return _annotation(found.module, found.node.value)
        finally:
            _unfolded.pop()
    if found and isinstance(found.node, ast.ClassDef) and all(map(_is_plain, lineage(found))):
        return type(target.rpartition(".")[2], (_StandIn,), {"__module__": found.module})
    return Any


def _is_plain(found: Found) -> bool:
    """Say if a class is none of Python's containers or numbers, which plain values may stand for."""
    inside = locate_module(found.module)
    for base in found.node.bases:  # type: ignore[attr-defined]
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        known = _within(inside, name.split("."))
        if name.rpartition(".")[2] not in _ABSTRACT and (known is None or known.module in sys.stdlib_module_names):
            return False
    return True


class _StandIn:
    """A class of that name, which may have parameters."""

    def __class_getitem__(cls, parameters: Any) -> type:
        return cls


class _Module:
    """A module whose attributes are found when they are asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return _value(f"{self._name}.{name}")
