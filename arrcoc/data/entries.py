"""What is asked of a picture, as JSON says it: in a manifest line, a row of a table or a member of a shard.

{"text": "a red cup", "boxes": [[10, 20, 64, 48]]}
{"queries": [{"text": "dog", "polygons": [[4, 4, 80, 6, 40, 90]]}, {"text": "cat", "absent": true}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from arrcoc.data.pictures import PictureSource
from arrcoc.data.regions import KINDS, Region
from arrcoc.data.skips import ItemError

QUERY_KEYS = ("text", "absent", *KINDS)

Queries = dict[str, tuple[Region, ...] | None]


def parse_queries(entry: Mapping[str, Any], open_mask: Callable[[Any], PictureSource]) -> Queries:
    """The texts and regions of a manifest line, or of anything that is written like one.

    Args:
        entry: has "text", or "queries" with a list of {"text": ...}, or neither. Beside a text stand any of "mask",
            "boxes", "polygons" and "rle", whose union is the answer; or "absent": true; or nothing, if the text can
            only be scored.
        open_mask: what "mask" holds -> the mask picture.

    Returns:
        as the ``queries`` of a `Record`.

    Raises:
        ItemError: if a key is unknown, a text is empty or stands twice, or a value has the wrong type.
    """
    queries: Queries = {}
    if entry.get("queries") is None:
        parts = [entry] if any(entry.get(key) is not None for key in QUERY_KEYS) else []
    else:
        parts = entry["queries"]
        beside = [key for key in QUERY_KEYS if entry.get(key) is not None]
        if beside:
            raise ItemError(f'"{beside[0]}" must stand inside "queries", not beside it.', reason="bad key")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise ItemError(f'"queries" must be a list of {{"text": ...}}, got {parts!r}.', reason="bad value")
        for part in parts:
            check_keys(part, QUERY_KEYS)
    for part in parts:
        text = part.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ItemError(f'"text" must be a text that is not empty, got {text!r}.', reason="no text")
        add_queries(queries, {text.strip(): _regions(part, open_mask)})
    return queries


def parse_object(text: str, what: str, *, reason: str) -> dict[str, Any]:
    """A JSON object whose keys all differ.

    Args:
        text: the JSON.
        what: the message calls it.
        reason: of the error.

    Raises:
        ItemError: if it is no such object.
    """
    try:
        entry = json.loads(text, object_pairs_hook=_object)
    except ItemError:
        raise
    except json.JSONDecodeError as error:
        raise ItemError(f"{what} is not JSON: {error.msg} at character {error.pos + 1}.", reason=reason) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise ItemError(f"{what} cannot be read: {error}.", reason=reason) from error
    if not isinstance(entry, dict):
        raise ItemError(f"{what} must be a JSON object, got {entry!r}.", reason=reason)
    return entry


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = ", ".join(key for key, _ in pairs)
        raise ItemError(f"each key must stand there once, got {keys}.", reason="bad key")
    return entry


def add_queries(queries: Queries, more: Queries) -> None:
    """Put further texts of the same picture to the others; a text may stand once."""
    for text, regions in more.items():
        if text in queries:
            message = f"{text!r} is asked for twice; give all its regions in one place."
            raise ItemError(message, reason="query twice")
        queries[text] = regions


def check_keys(entry: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that nobody reads, and say which one may have been meant."""
    for key in entry:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known keys are {', '.join(known)}."
            raise ItemError(f"unknown key {key!r}; {hint}", reason="bad key")


def _regions(part: Mapping[str, Any], open_mask: Callable[[Any], PictureSource]) -> tuple[Region, ...] | None:
    regions = []
    for kind in KINDS:
        value = part.get(kind)
        if value is None:
            continue
        if kind == "mask":
            regions.append(Region(kind=kind, value=open_mask(value)))
            continue
        if not isinstance(value, list | Mapping) or not value:
            hint = 'for a text that names nothing in the picture write "absent": true'
            raise ItemError(f'"{kind}" must not be empty, got {value!r}; {hint}.', reason="region broken")
        several = kind == "rle" and isinstance(value, list)
        regions += [Region(kind=kind, value=one) for one in (value if several else [value])]
    absent = part.get("absent")
    if absent not in (None, True, False):
        raise ItemError(f'"absent" must be true or false, got {absent!r}.', reason="bad value")
    if absent and regions:
        raise ItemError(f'"absent": true and "{regions[0].kind}" exclude each other.', reason="bad value")
    return tuple(regions) if regions or absent else None
