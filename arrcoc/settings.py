"""Settings from files and command lines: nested frozen dataclasses, read and explained by their own fields.

A field's type says how it is read, its default what happens without it, and the ``Args`` of its class's docstring what
it means; so a file, a command line and the code cannot disagree. Nested settings are sections of a file; on a command
line (``flags``) the names of all fields stand side by side. The metadata of a field with nested settings may hold

    flags    {name of a field in it: what a command line calls it}
    hidden   names of fields in it that neither file nor command line sets, for whoever holds the settings does
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import tomllib
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")

_WORDS = {float: "a number", int: "a whole number", str: "a string", bool: "true or false"}


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts, as JSON has them; without what is hidden."""
    return _to_dict(settings, ())


def _to_dict(settings: Any, hidden: Collection[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            values[field.name] = _to_dict(value, field.metadata.get("hidden", ()))
        elif field.name not in hidden:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def differences(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Where two settings of one class differ: name, dotted where nested -> both values."""
    others = {leaf.path: leaf.default for leaf in leaves(second)}
    pairs = {".".join(leaf.path): (leaf.default, others[leaf.path]) for leaf in leaves(first)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def updated(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The settings with some values replaced; they check themselves anew.

    Args:
        settings: a dataclass, its fields plain values or such dataclasses again.
        values: field -> value, or a mapping for nested settings; lists stand for tuples.

    Raises:
        ValueError: for an unknown name or a value of the wrong type, with its name; and what the settings refuse.
    """
    return _updated(settings, values, "", ())


def _updated(settings: Settings, values: Mapping[str, Any], where: str, hidden: Collection[str]) -> Settings:
    hints = {name: hint for name, hint in get_type_hints(type(settings)).items() if name not in hidden}
    metadata = {field.name: field.metadata for field in fields(settings)}  # type: ignore[arg-type]
    changes = {}
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            guess = f"did you mean {where + close[0]!r}?" if close else f"there are {', '.join(hints)}."
            raise ValueError(f"unknown setting {where + name!r}: {guess}")
        current = getattr(settings, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            changes[name] = _updated(current, value, f"{where}{name}.", metadata[name].get("hidden", ()))
        else:
            changes[name] = _cast(value, hints[name], where + name)
    return replace(settings, **changes)  # type: ignore[type-var]


def _cast(value: Any, hint: Any, name: str) -> Any:
    hint, optional = required_type(hint)
    if optional and value is None:
        return None
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_cast(part, get_args(hint)[0], name) for part in value)
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    what = {tuple: "a list", dict: "a table"}.get(get_origin(hint)) or _WORDS.get(hint, "a section")
    raise ValueError(f"{name} must be {what}{' or nothing' if optional else ''}, got {value!r}.")


def required_type(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it had it."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (inner,) = (part for part in get_args(hint) if part is not type(None))
    return inner, True


def read_settings(path: str | Path) -> dict[str, Any]:
    """The values of a settings file, JSON or TOML by its ending.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it ends otherwise, or does not hold what its ending says.
    """
    path = Path(path)
    readers: dict[str, Callable[[str], Any]] = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise ValueError(f"a settings file must end with .json or .toml, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"no settings file at {path}.")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings by name, got {type(values).__name__}.")
    return values


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value of nested settings: where it is, how a command line calls it, its type, default and meaning."""

    path: tuple[str, ...]
    flag: str
    hint: Any
    default: Any
    text: str


def leaves(settings: Any) -> Iterator[Leaf]:
    """Every value of nested settings that is not hidden."""
    return _leaves(settings, (), {})


def _leaves(settings: Any, path: tuple[str, ...], metadata: Mapping[str, Any]) -> Iterator[Leaf]:
    hints, texts = get_type_hints(type(settings)), documentation(type(settings))
    for field in fields(settings):
        value, here = getattr(settings, field.name), (*path, field.name)
        if is_dataclass(value):
            yield from _leaves(value, here, field.metadata)
        elif field.name not in metadata.get("hidden", ()):
            flag = metadata.get("flags", {}).get(field.name, field.name)
            yield Leaf(path=here, flag=flag, hint=hints[field.name], default=value, text=texts.get(field.name, ""))


def documentation(kind: type) -> dict[str, str]:
    """Field -> its text in the ``Args`` section of the class's docstring and those of its bases."""
    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        section = re.search(
            r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(parent.__doc__ or ""), re.DOTALL | re.MULTILINE
        )
        for entry in re.split(r"\n(?=    \w)", section[1].rstrip()) if section else []:
            names, _, text = entry.partition(":")
            texts |= dict.fromkeys(re.split(r",\s*", names.strip()), " ".join(text.split()))
    return texts


def as_markdown(settings: Any) -> str:
    """A table of every value: its name in a file, its default and its meaning; a command line has the last name."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for leaf in leaves(settings):
        name = f"`{'.'.join(leaf.path)}`" + (f" (`--{leaf.flag}`)" if leaf.flag != leaf.path[-1] else "")
        rows.append(f"| {name} | {shown(leaf.default)} | {leaf.text.rstrip('.').replace('``', '`')} |")
    return "\n".join(rows)


def shown(value: Any) -> str:
    """A default as a reader is told of it."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None or value in ({}, "") else str(value)
