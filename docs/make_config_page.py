"""Writes config.md beside this file from the configuration schema and its docstrings: `make docs`."""

from __future__ import annotations

import inspect
import json
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from longrl.config_files import KINDS

PAGE = Path(__file__).with_name("config.md")
INTRO = """# Configuration

<!-- Made by `make docs` from src/longrl/config.py and the *_config.py beside it. Do not edit. -->

A run is one or more YAML files, merged left to right, and `key=value` overrides:
`longrl rl a.yaml b.yaml rollout.group_size=16`. Sections are merged key by key, but `rewards`: a file or
`rewards={...}` names all of them; `rewards.NAME=0.5` changes or adds one, `rewards.NAME=null` removes it. `kind` says
which command a file is for. Unknown keys are errors. `longrl check` validates without running. The run directory
receives the resolved configuration as `config.yaml`, which is itself a file that these commands take.
"""
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}


def make_page() -> str:
    """The whole page: a table for each kind, then one for each section that they use."""
    parts, sections = [INTRO], dict[str, type[BaseModel]]()
    for kind, model in KINDS.items():
        parts.append(f"## kind: {kind}\n\n{_describe(model)}")
        _collect_sections(model, sections)
    parts += [f"## {name}\n\n{_describe(model)}" for name, model in sections.items()]
    return "\n".join(parts)


def _collect_sections(model: type[BaseModel], into: dict[str, type[BaseModel]]) -> None:
    for name, field in model.model_fields.items():
        section = _section(field)
        if section:
            assert into.setdefault(name, section) is section, f"two sections are called {name}"
            _collect_sections(section, into)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """What a key holds that is a section, or a section or null."""
    parts = (field.annotation, *typing.get_args(field.annotation))
    return next((part for part in parts if _is_model(part) and part not in KINDS.values()), None)


def _describe(model: type[BaseModel]) -> str:
    doc = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    rows = [
        f"| `{name}` | {_type(name, field)} | {_default(field)} | {_meaning(field)} |" for name, field in _fields(model)
    ]
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    return f"{doc}\n\n{table}\n" if doc else f"{table}\n"


def _fields(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return sorted(model.model_fields.items(), key=lambda item: item[0] != "kind")


def _type(name: str, field: FieldInfo) -> str:
    if _section(field):
        if typing.get_origin(field.annotation) is dict:
            return f"mapping of names to [sections](#{name})"
        return f"[section](#{name})" + (" or null" if not _is_model(field.annotation) else "")
    return ", ".join([_annotation(field.annotation), *_bounds(field.metadata)])


def _annotation(annotation: object) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        constraints = [bound for extra in arguments[1:] for bound in _bounds(getattr(extra, "metadata", [extra]))]
        return ", ".join([_annotation(arguments[0]), *constraints])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _annotation(part) for part in arguments)
    if origin is dict:
        return f"mapping of {_annotation(arguments[0])} to {_annotation(arguments[1])}"
    if origin is tuple and arguments[-1] is ...:
        return f"list of {_annotation(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_annotation(arguments[0])}"
    if _is_model(annotation):
        kind = annotation.model_fields["kind"].default
        return f"[a run of kind {kind}](#kind-{kind})"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]  # type: ignore[index]


def _bounds(metadata: list[object]) -> list[str]:
    found = [(text, getattr(item, name)) for item in metadata for name, text in BOUNDS.items() if hasattr(item, name)]
    return [text.format(value) for text, value in found if value is not None]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    return "" if isinstance(field.default, BaseModel) else f"`{json.dumps(field.default)}`"


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _is_model(annotation: object) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
