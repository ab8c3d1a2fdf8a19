"""What parts of a run refuse of their settings, by their own code, before that is imported with torch and Lightning.

Their source is run instead: a constructor, or a function that reads data, up to the first line that needs more than
this project and Python's own library.
"""

import ast
import builtins
import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.signatures import (
    Found,
    Names,
    body,
    decorators,
    file_of,
    is_dataclass,
    locate,
)

_ROOMS = ("callbacks", "datamodules", "lightning_modules")
_READING = ("datamodules.", "lightning_modules.backbone.loading.")  # where functions of the config only read
_KEPT = {"property", "cached_property", "staticmethod", "classmethod", "abstractmethod", "cache", "contextmanager"}


class _Untold(BaseException):
    """Source does not tell what comes next. No `except Exception` in the code that is run takes it for a fault."""


class _Unknown:
    """Stands for what only a run can make: whatever is asked of it is untold, but its class where that is known."""

    def __init__(self, kind: type | None = None) -> None:
        self._kind = kind

    def _ask(self, *args: object) -> Any:
        raise _Untold

    __getattr__ = __call__ = __getitem__ = __contains__ = __iter__ = __len__ = __bool__ = __hash__ = _ask
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _ask
    __class__ = property(lambda self: self._kind or self._ask())  # which isinstance asks


class _Base:
    """Stands for classes of other libraries, above one of this project."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python itself asks
            raise AttributeError(name)
        raise _Untold


def refuse_by_own_checks(parts: Mapping[str, Any], unresolved: Mapping[str, Any], untold: str = "") -> None:
    """Raise ValueError, naming the key, for a value, a file or a folder that one of the resolved `parts` refuses.

    `untold` is the key of a node that is made of more than its settings.
    """
    for name, node in parts.items():
        _made(node, name, unresolved, untold)


def _made(value: Any, key: str, unresolved: Mapping[str, Any], untold: str) -> Any:
    """Return what a value of the config becomes, as far as source tells."""
    if isinstance(value, list):
        return [_made(each, f"{key}.{place}", unresolved, untold) for place, each in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    made = {name: _made(each, f"{key}.{name}", unresolved, untold) for name, each in value.items()}
    if "_target_" not in made:
        return made
    place = defining_key(unresolved, key)
    if place == untold or not str(made["_target_"]).startswith(tuple(f"{room}." for room in _ROOMS)):
        return _Unknown()
    make = None
    try:
        make = _told(made["_target_"])
        if not isinstance(make, type) and not made["_target_"].startswith(_READING):
            return _Unknown()
        return make(**{name: each for name, each in made.items() if name != "_target_"})
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is None:  # the system's own are told where work starts
            raise ValueError(f"{error} (in {place})") from None
    except (Exception, _Untold):  # of any kind: it may come of what is untold
        pass
    return _Unknown(make if isinstance(make, type) else None)


@cache
def _names(module: str) -> Names:
    names = Names(module, _told)
    own = {**vars(builtins), "__import__": _import}
    names.update({"__builtins__": own, "__name__": module, "__file__": str(file_of(module))})
    return names


def _import(name: str, *args: Any) -> Any:
    """Import what a function imports while it runs, if that takes no time."""
    if name.partition(".")[0] not in sys.stdlib_module_names:
        raise _Untold
    return __import__(name, *args)


def _told(target: str) -> Any:
    """Make what a dotted name leads to: an object of Python's library, or one of this project from its source."""
    top, _, name = target.rpartition(".")
    if target.partition(".")[0] in sys.stdlib_module_names:
        return getattr(import_module(top), name) if top else import_module(name)
    found = locate(target)
    if found is None or found.module.partition(".")[0] not in _ROOMS:
        raise _Untold
    if isinstance(found.node, ast.FunctionDef):
        return _function(found.module, found.node)
    if isinstance(found.node, ast.ClassDef):
        return _class(found.module, found.node)
    value = getattr(found.node, "value", None)
    if not isinstance(value, ast.expr):
        raise _Untold
    names = _names(found.module)
    return eval(compile(ast.Expression(value), found.module, "eval"), names, names)


@cache
def _function(module: str, node: ast.FunctionDef) -> Any:
    return _executed(module, _plain(module, node))


@cache
def _class(module: str, node: ast.ClassDef) -> type:
    """Make a class of its fields, methods and constants, without those that other libraries decorate or compute."""
    names, found = _names(module), Found(module, node)
    kept: list[ast.stmt] = []
    for statement in body(found):
        try:
            if isinstance(statement, ast.FunctionDef):
                kept.append(_plain(module, statement))
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                kept.append(_field(module, statement))
        except _Untold:  # whoever asks for it will find out
            continue
    bases = [_base(module, base) for base in node.bases]
    above = list(dict.fromkeys(base for base in bases if base is not _Base)) or [_Base]
    names.update({f"_base_{place}": base for place, base in enumerate(above)})
    listed: list[ast.expr] = [ast.Name(f"_base_{place}", ast.Load()) for place in range(len(above))]
    made: type = _executed(module, ast.ClassDef(node.name, listed, [], kept or [ast.Pass()], []))
    return dataclass(made) if is_dataclass(found) else made


def _base(module: str, base: ast.expr) -> type:
    """Find a class that is inherited: one of this project, a container of Python's, or a stand-in for others."""
    base = base.value if isinstance(base, ast.Subscript) else base
    try:
        _touch(module, base)
        made = eval(compile(ast.Expression(base), module, "eval"), _names(module))
    except _Untold:
        return _Base
    return _Base if getattr(made, "__name__", "") in ("ABC", "Protocol", "Generic", "object") else made


def _field(module: str, statement: ast.Assign | ast.AnnAssign) -> ast.stmt:
    _touch(module, statement.value)
    if isinstance(statement, ast.Assign):
        return statement
    if "ClassVar" in ast.unparse(statement.annotation) and statement.value is not None:
        return ast.Assign([statement.target], statement.value)
    return ast.AnnAssign(statement.target, ast.Constant(None), statement.value, statement.simple)


def _plain(module: str, node: ast.FunctionDef) -> ast.FunctionDef:
    """Return a function without annotations; what its head needs is made now."""
    if not decorators(Found(module, node)) <= _KEPT:
        raise _Untold
    for needed in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
        _touch(module, needed)
    plain = copy.copy(node)
    plain.args, plain.returns = copy.deepcopy(node.args), None
    for each in ast.walk(plain.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return plain


def _touch(module: str, expression: ast.expr | None) -> None:
    """Make the names in an expression: a class body does not look further than what its module has."""
    for each in ast.walk(expression) if expression else ():
        if isinstance(each, ast.Name):
            _names(module)[each.id]


def _executed(module: str, node: ast.FunctionDef | ast.ClassDef) -> Any:
    names = _names(module)
    exec(compile(ast.fix_missing_locations(ast.Module([node], [])), module, "exec"), names)
    return names[node.name]
