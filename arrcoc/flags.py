"""Settings from a command line: a flag for every value, read by its type and explained by its documentation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from typing import Any, TypeVar, get_args, get_origin

from arrcoc.settings import Leaf, leaves, required_type, shown, updated

Settings = TypeVar("Settings")

_CONSTANTS = {"True": "true", "False": "false", "None": "null"}  # the string "False" would be true


def add_flags(
    parser: argparse.ArgumentParser, settings: Any, *, only: str | None = None, without: Collection[str] = ()
) -> None:
    """Give a parser a flag for every value; what is not given on the command line is absent from the namespace.

    Args:
        parser: gets the flags, in a group for each section.
        settings: their types, defaults and meanings.
        only: the one section that gets flags; all of them if None.
        without: flags that are left out, by the names of their values.
    """
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for leaf in leaves(settings):
        section = leaf.path[:-1]
        if leaf.path[-1] in without or (only is not None and section != (only,)):
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(".".join(section))
        groups[section].add_argument(
            f"--{leaf.flag.replace('_', '-')}",
            dest=_destination(leaf),
            default=argparse.SUPPRESS,
            help=f"{leaf.text.rstrip('.').replace('``', '')} (default: {shown(leaf.default)})".replace("%", "%%"),
            **_reading(leaf),
        )


def with_flags(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """The settings with what the command line gave."""
    values: dict[str, Any] = {}
    for leaf in leaves(settings):
        if hasattr(arguments, _destination(leaf)):
            given = getattr(arguments, _destination(leaf))
            section = values
            for name in leaf.path[:-1]:
                section = section.setdefault(name, {})
            section[leaf.path[-1]] = dict(given) if get_origin(required_type(leaf.hint)[0]) is dict else given
    return updated(settings, values)


def _destination(leaf: Leaf) -> str:
    return ".".join(("settings", *leaf.path))


def _reading(leaf: Leaf) -> dict[str, Any]:
    """What argparse needs to read a value of this type."""
    hint, optional = required_type(leaf.hint)
    name = leaf.flag.upper()
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {"nargs": "+", "type": get_args(hint)[0], "metavar": name}
    if get_origin(hint) is dict:
        return {"nargs": "+", "type": _pair, "metavar": "KEY=VALUE"}
    return {"type": _optional(hint) if optional else hint, "metavar": name}


def _pair(text: str) -> tuple[str, Any]:
    """``momentum=0.9`` as ("momentum", 0.9); what is neither JSON nor a constant of Python is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(_CONSTANTS.get(value, value))
    except ValueError:
        return key, value


def _optional(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse shows it
    return read
