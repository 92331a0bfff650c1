"""Where the files that ship with the package are: inside a wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path


def asset_path(name: str) -> Path:
    """Path of a shipped file or folder, e.g. ``"embedded_clip"``.

    Raises:
        FileNotFoundError: if it is neither in the installed package nor in the checkout.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "assets" / name, package.parent / "assets" / name]
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(f"asset {name!r} is missing; looked at {', '.join(map(str, candidates))}.")
