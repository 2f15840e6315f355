"""Names in a configuration: a key of a plain dict, or `package.module:attr` for code outside the project."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any


def resolve(name: str, registry: Mapping[str, Any], what: str) -> Any:
    """Look `name` up in `registry`, or import it when it is written `package.module:attr`.

    Args:
        name: As in the configuration.
        registry: The built-in ones by name.
        what: The kind of thing, for messages ("reward", "loss").

    Raises:
        ValueError: Nothing has this name; the message gives the nearest.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{what} {name!r} cannot be imported: {error}; expected `package.module:attr`") from error
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "or write `package.module:attr`"
        raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(sorted(registry))}; {hint}")
    return registry[name]
