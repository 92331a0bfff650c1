"""What the command lines share: errors as one line, arguments, the scorer that they name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arrcoc import RelevanceScorer

DEVICE_HELP = "e.g. cpu or cuda (default: cpu)"


def run(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Run a command on the parsed arguments; 0 on success, 2 and one line for what the user must change."""
    arguments = parser.parse_args(argv)
    try:
        command(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def add_scorer_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``load_scorer`` reads."""
    add = parser.add_argument
    add("--model", default="embedded", help="backbone, e.g. open_clip:ViT-B-16/openai, or a folder (default: embedded)")
    add("--head", default="default", help="default, none (zero-shot) or a folder (default: default)")
    add("--mode", help="how patch tokens are read off a transformer, e.g. clearclip (default: the backbone's own)")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="sizes at which the picture is seen")
    add("--device", help=DEVICE_HELP)


def load_scorer(arguments: argparse.Namespace) -> RelevanceScorer:
    """The scorer that the arguments name."""
    import arrcoc

    check_device(arguments.device)
    return arrcoc.load_scorer(
        arguments.model,
        head=head_argument(arguments.head),
        device=arguments.device,
        mode=arguments.mode,
        scales=tuple(arguments.scales),
    )


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that this machine has, got {device!r}.") from error


def head_argument(text: str) -> str | None:
    """The head argument of load_scorer from that of a command line, where "none" is zero-shot."""
    return None if text == "none" else text


def positive(text: str) -> int:
    """A whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def budget(text: str) -> float:
    """A number of tokens as int, a share of them as float: the type says which."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if "." not in text or not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number of tokens, or a share in (0, 1] such as 0.25, got {text!r}")
    return share
