"""What was probably meant by a name that names nothing: the end of an error message."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

_LOADED_BY = (("open_clip_config.json", "open_clip:local-dir:"), ("config.json", "hf:"))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """ ", did you mean 'a' or 'b'?" for the known words close to a word; empty if nothing is close."""
    return _question(get_close_matches(word, known, n=3, cutoff=0.6))


def did_you_mean_folder(path: str | Path) -> str:
    """ ", did you mean 'hf:FOLDER'?" if there is a model of that format, or of open_clip's, in a folder."""
    return _question([f"{prefix}{path}" for file, prefix in _LOADED_BY if (Path(path) / file).is_file()][:1])


def did_you_mean_spec(spec: str, kinds: Sequence[str]) -> str:
    """The same for a spec of no known kind: a folder, a name without its library, or a misspelt library."""
    kind, colon, _ = spec.partition(":")
    if folder := did_you_mean_folder(spec):
        return folder
    if not colon and "/" in spec and not spec.startswith(("/", ".", "~")):
        return _question([f"open_clip:{spec}", f"hf:{spec}"])
    return "" if kind in kinds and colon else did_you_mean(kind, kinds)


def _question(specs: Sequence[str]) -> str:
    return f", did you mean {' or '.join(map(repr, specs))}?" if specs else ""
