"""Reads a run's configuration from YAML files and `key=value` overrides, and writes it back.

Scalars follow YAML 1.2's core rules, not PyYAML's 1.1 defaults, which read `1e-6` as text, `off` as false and `1:30`
as ninety. Every message is one line: where, which key, what it got, what was expected, the nearest name.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from longrl.config import AnyConfig
from longrl.files import write_whole
from longrl.flow_config import FlowConfig
from longrl.scoring_config import expand_preset

KINDS: dict[str, type[BaseModel]] = {
    model.model_fields["kind"].default: model for model in (*typing.get_args(typing.get_args(AnyConfig)[0]), FlowConfig)
}

_WHOLE = ("rewards",)
"""Mappings that are a choice, of which a file means all."""
Section = typing.TypeVar("Section", bound=BaseModel)
Origins = dict[tuple[str, ...], str]
"""Key path -> the file and line, or the override, that set it."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that looks like another type under either version of YAML."""


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_TAGS = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "str", "seq", "map")}
for _name, (_pattern, _first) in _SCALARS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def load_config(paths: Sequence[Path], overrides: Sequence[str] = ()) -> AnyConfig | FlowConfig:
    """Merges the files left to right (mappings deeply, everything else replaced), then the overrides, and validates.

    `rewards` is what it is last set to, not merged; the override `rewards.NAME=WEIGHT` changes one of those that apply,
    of a preset or by default too, and null removes it.

    Args:
        paths: YAML files.
        overrides: `key.sub=value`, the value read as YAML.

    Raises:
        ValueError: a file, an override or a value that cannot be used; one line.
    """
    merged: dict[str, Any] = {}
    origins: Origins = {}
    for path in paths:
        _merge(merged, _read(Path(path), origins), _WHOLE)
    for override in overrides:
        keys, value = _read_override(override, origins)
        if len(keys) == 2 and keys[0] in _WHOLE:
            _set_reward(merged, keys[1], value, override)
        else:
            _merge(
                merged, reduce(lambda inner, key: {key: inner}, reversed(keys), value), _WHOLE if len(keys) == 1 else ()
            )
    sources = ", ".join(map(str, paths)) or "the configuration"
    kind = merged.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        where = origins.get(("kind",), sources)
        got = f"got {_show(kind)}" if "kind" in merged else "missing"
        nearest = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{where}: kind: {got}, expected one of {', '.join(KINDS)}{hint}")
    try:
        # Through JSON, because strict Python input refuses a list where the schema has a tuple.
        return typing.cast(AnyConfig | FlowConfig, KINDS[kind].model_validate_json(json.dumps(merged), strict=True))
    except ValidationError as error:
        raise ValueError(_explain(error, KINDS[kind], origins, sources)) from None


def build_section(section: type[Section], values: dict[str, Any], name: str) -> Section:
    """A part of a configuration from Python values.

    Raises:
        ValueError: one of them is not allowed; one line.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error, section, {}, name)) from None


def load_arguments(arguments: Sequence[str], *kinds: str) -> Any:
    """Loads a configuration from command-line arguments: those with a `=` are overrides, the rest files.

    Args:
        arguments: as typed.
        kinds: what the command can run; none means anything.

    Raises:
        ValueError: as load_config; no file; a file of another kind.
    """
    paths = [Path(argument) for argument in arguments if "=" not in argument]
    if not paths:
        raise ValueError(f"no configuration file among the arguments ({' '.join(arguments)}); name at least one")
    config = load_config(paths, [argument for argument in arguments if "=" in argument])
    if kinds and config.kind not in kinds:
        files = ", ".join(map(str, paths))
        raise ValueError(f"{files}: kind: got {config.kind!r}, this command runs {' or '.join(kinds)}")
    return config


def save_config(config: BaseModel, path: Path) -> None:
    """Writes the resolved configuration as YAML that load_config reads back equal. Atomic.

    Raises:
        OSError: the file cannot be written; carries the path.
    """
    write_whole(path, yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, unvalidated.

    Raises:
        ValueError: missing, unreadable as text, malformed, or not a mapping.
    """
    return _read(path, {})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path, origins: Origins) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file (byte {error.start} is not UTF-8), expected YAML") from None
    tree = _parse(text, path, (), origins)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: got {_show(tree)}, expected a mapping (`key: value` lines)")
    return tree


def _read_override(override: str, origins: Origins) -> tuple[tuple[str, ...], Any]:
    """The key that it sets, in its parts, and the value."""
    key, equals, text = override.partition("=")
    section, _, name = key.partition(".")
    keys = (section, name) if name and section in _WHOLE else tuple(key.split("."))  # my_rewards.py:brevity
    if not equals or not all(keys):
        raise ValueError(f"override {override!r}: expected key=value, for example optim.lr=1e-6")
    where = f"override {override!r}"
    origins.update({keys[:length]: where for length in range(1, len(keys) + 1)})
    return keys, _parse(text, where, keys, origins)


def _set_reward(merged: dict[str, Any], name: str, weight: Any, override: str) -> None:
    """Changes or adds one of those that apply, also of a preset or by default; a weight of None removes it."""
    field = getattr(KINDS.get(str(merged.get("kind"))), "model_fields", {}).get("rewards")
    default = {} if field is None or field.is_required() else field.default
    try:
        rewards = expand_preset(merged.get("rewards", default))
    except ValueError as error:
        raise ValueError(f"rewards: {error}") from None
    if not isinstance(rewards, Mapping):
        raise ValueError(f"rewards: got {_show(rewards)}, expected names with weights, or a preset")
    if weight is None and name not in rewards:
        there = ", ".join(rewards) or "none"
        raise ValueError(f"override {override!r}: there is no such reward to remove; those that are set: {there}")
    merged["rewards"] = {**rewards, name: weight}
    if weight is None:
        del merged["rewards"][name]


def _merge(into: dict[str, Any], update: dict[str, Any], whole: Collection[str] = ()) -> None:
    """whole: keys that replace a mapping."""
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and key not in whole:
            _merge(into[key], value)
        else:
            into[key] = value


def _parse(text: str, source: Path | str, prefix: tuple[str, ...], origins: Origins) -> Any:
    """The value that the text holds; remembers in origins where each key stands."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _build(loader, node, source, prefix, origins)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{_at(source, mark)}:{mark.column + 1}" if mark and isinstance(source, Path) else source
        raise ValueError(f"{at}: malformed YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: malformed YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply; an anchor (&name) may not hold its own alias (*name)") from None


def _at(source: Path | str, mark: yaml.Mark) -> str:
    return f"{source}:{mark.line + 1}" if isinstance(source, Path) else source


def _build(loader: _Loader, node: yaml.Node, source: Path | str, path: tuple[str, ...], origins: Origins) -> Any:
    if node.tag not in _TAGS:
        at = _at(source, node.start_mark)
        raise ValueError(f"{at}: {'.'.join(path)}: tag {node.tag!r} is not supported; write a plain value")
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, source, path, {}) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        at = _at(source, key_node.start_mark)
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"{at}: key {_show(key)} is not text; put it in quotes")
        if key in tree:
            raise ValueError(f"{at}: duplicate key {'.'.join((*path, key))!r}; keep one")
        origins[(*path, key)] = at
        tree[key] = _build(loader, value_node, source, (*path, key), origins)
    return tree


def _explain(error: ValidationError, model: type[BaseModel], origins: Origins, sources: str) -> str:
    """All problems, in one line."""
    said: list[str] = []
    problems = error.errors(include_url=False)
    for problem in sorted(problems, key=lambda problem: problem["type"] != "extra_forbidden"):
        path = tuple(str(part) for part in problem["loc"])
        key = ".".join(path)
        where = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), sources)
        if problem["type"] == "extra_forbidden":
            text = f"unknown key {key!r}{_nearest_key(path, model)}"
        elif problem["type"] == "missing":
            if any(f"did you mean {key!r}?" in text for text in said):  # a misspelt key is also a missing one
                continue
            text = f"{key}: missing; every configuration of kind {model.model_fields['kind'].default} sets it"
        elif problem["type"] == "value_error":
            text = (f"{key}: " if key else "") + problem["msg"].removeprefix("Value error, ")
        else:
            expected = problem["msg"].replace("Input should be ", "expected ").replace("an object", "a mapping")
            text = f"{key}: got {_show(problem['input'])}, {expected[0].lower()}{expected[1:]}"
        said.append(f"{where}: {text}")
    return "; ".join(said)


def _nearest_key(path: tuple[str, ...], model: type[BaseModel]) -> str:
    parent, name = path[:-1], path[-1]
    siblings = [key[-1] for key in _keys(model) if _fits(key[:-1], parent)]
    if nearest := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {'.'.join((*parent, nearest[0]))!r}?"
    elsewhere = [repr(".".join(key)) for key in _keys(model) if key[-1] == name]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else f"; the keys here are {', '.join(siblings)}"


def _fits(schema: tuple[str, ...], path: tuple[str, ...]) -> bool:
    return len(schema) == len(path) and all(key in ("*", part) for key, part in zip(schema, path, strict=True))


def _keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key path of the schema; `*` for names of the user's own."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        own = ("*",) if typing.get_origin(field.annotation) is dict else ()
        for part in (field.annotation, *typing.get_args(field.annotation)):  # a section, or `section | None`
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys(part, (*prefix, name, *own))


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
