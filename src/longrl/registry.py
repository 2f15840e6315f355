"""Names in a configuration: a key of a plain dict; for code outside, `package.module:attr` or `file.py:attr`."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def resolve(name: str, registry: Mapping[str, Any], what: str) -> Any:
    """Look `name` up in `registry`, or import it when it is written `package.module:attr` or `file.py:attr`.

    Args:
        name: As in the configuration. A relative file starts at the working directory.
        registry: The built-in ones by name.
        what: The kind of thing, for messages ("reward", "loss").

    Raises:
        ValueError: Nothing has this name; the message gives the nearest.
    """
    if ":" in name:
        source, _, attribute = name.rpartition(":")
        try:
            module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise _cannot_be_imported(name, what, cause) from error
        if not hasattr(module, attribute):
            raise _cannot_be_imported(name, what, f"there is no {attribute!r} in {module.__file__ or source}")
        return getattr(module, attribute)
    require_name(name, registry, what)
    return registry[name]


def require_name(name: str, known: Iterable[str], what: str) -> None:
    """Looks up `name` as far as that can be done without importing anything.

    Raises:
        ValueError: as resolve.
    """
    source, is_outside, attribute = name.rpartition(":")
    if not is_outside:
        if name not in (names := sorted(known)):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "or write `package.module:attr` or `file.py:attr`"
            raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(names)}; {hint}")
        return
    if source.endswith(".py"):
        file = Path(source).resolve()
        cause = None if file.is_file() else f"there is no file {file}"
    else:
        spec = _find(source)
        file = Path(spec.origin) if spec and spec.origin and not _find(f"{source}.{attribute}") else None
        cause = None if spec else f"there is no module {source!r}"
    if cause is None and file is not None and file.suffix == ".py":
        cause = _lacks(file, attribute)
    if cause:
        raise _cannot_be_imported(name, what, cause)


def _find(source: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is, without importing the packages around it."""
    first, *inner = source.split(".")
    spec = None if first == "__main__" else importlib.util.find_spec(first)  # which is longrl's own
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{name}", spec.submodule_search_locations)
    return spec


_NAMING = frozenset(("*", "__dict__", "__getattr__", "exec", "globals", "locals", "modules", "setattr", "vars"))
"""Where one of these is, a module may have names that its text does not show."""


def _lacks(file: Path, attribute: str) -> str | None:
    """Why a file of Python cannot have an attribute, by its text; None: it may."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        return " ".join(str(error).split())
    names: set[str] = set()
    for node in ast.walk(tree):  # functions too, which may say `global`
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.MatchAs | ast.MatchStar):
            names.add(node.name or "")
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.MatchMapping):
            names.add(node.rest or "")
        elif isinstance(node, ast.Attribute):  # sys.modules[__name__].name = ...
            names |= {node.attr} & _NAMING
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in _NAMING):
            names.add(node.id)
    if attribute in names or names & _NAMING:
        return None
    near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.5)
    return f"there is no {attribute!r} in {file}" + (f", did you mean {near[0]!r}?" if near else "")


def _cannot_be_imported(name: str, what: str, cause: str) -> ValueError:
    return ValueError(f"{what} {name!r} cannot be imported: {cause}; expected `package.module:attr` or `file.py:attr`")


def _from_file(path: Path) -> ModuleType:
    """The same module each time, under a name that no other file has."""
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, path  # it ends in .py
        assert spec.loader is not None, path
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
