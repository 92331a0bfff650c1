"""Settings of files and command lines: one set of fields, read, written, explained and refused by name."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from arrcoc.flags import add_flags, with_flags
from arrcoc.settings import (
    as_markdown,
    differences,
    documentation,
    leaves,
    read_settings,
    to_dict,
    updated,
)
from arrcoc.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inside.

    Args:
        rate: how fast,
            over two lines; 5 % is usual.
        low, high: limits.
        on: whether at all.
        owner: set from outside.
    """

    rate: float = 0.5
    low: int = 0
    high: int | None = None
    on: bool = False
    owner: str = "nobody"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outside.

    Args:
        name: what it is called.
        sizes: several numbers.
        options: anything.
        inner: a section.

    Raises:
        Nothing.
    """

    name: str = "x"
    sizes: tuple[float, ...] = (1.0,)
    options: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default=Inner(), metadata={"flags": {"rate": "speed"}, "hidden": ("owner",)})


def parse(*argv: str) -> Outer:
    parser = argparse.ArgumentParser()
    add_flags(parser, Outer())
    return with_flags(Outer(), parser.parse_args(argv))


def test_values_are_replaced_where_they_are_named() -> None:
    changed = updated(Outer(), {"sizes": [1, 2.5], "inner": {"rate": 2, "high": 3}})
    assert changed == Outer(sizes=(1.0, 2.5), inner=Inner(rate=2.0, high=3))
    assert isinstance(changed.inner.rate, float)
    assert updated(changed, {"inner": {"high": None}}).inner == Inner(rate=2.0)
    assert differences(changed, Outer()) == {
        "sizes": ((1.0, 2.5), (1.0,)),
        "inner.rate": (2.0, 0.5),
        "inner.high": (3, None),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nme": "y"}, r"unknown setting 'nme': did you mean 'name'\?"),
        ({"inner": {"rat": 1}}, r"unknown setting 'inner.rat': did you mean 'inner.rate'\?"),
        ({"inner": {"owner": "me"}}, "unknown setting 'inner.owner': "),
        ({"zzz": 1}, "unknown setting 'zzz': there are name, sizes, options, inner"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"sizes": 3}, "sizes must be a list, got 3"),
        ({"sizes": ["a"]}, "sizes must be a number, got 'a'"),
        ({"options": 3}, "options must be a table, got 3"),
        ({"inner": 3}, "inner must be a section, got 3"),
        ({"inner": {"rate": True}}, "inner.rate must be a number, got True"),
        ({"inner": {"low": 1.5}}, "inner.low must be a whole number, got 1.5"),
        ({"inner": {"high": "a"}}, "inner.high must be a whole number or nothing, got 'a'"),
        ({"inner": {"on": 1}}, "inner.on must be true or false, got 1"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        updated(Outer(), values)


def test_flags_are_the_fields() -> None:
    assert parse() == Outer()
    argv = "--name y --sizes 1 2 --options a=1 b=true c=word d=False e=None --speed 3 --low 4 --high 5 --on".split()
    expected = Outer(
        name="y",
        sizes=(1.0, 2.0),
        options={"a": 1, "b": True, "c": "word", "d": False, "e": None},
        inner=Inner(rate=3.0, low=4, high=5, on=True),
    )
    assert parse(*argv) == expected
    assert parse("--high", "none", "--no-on") == Outer()
    assert updated(Outer(), json.loads(json.dumps(to_dict(expected)))) == expected
    with pytest.raises(SystemExit, match="2"):
        parse("--owner", "me")


def test_help_is_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"rate": "how fast, over two lines; 5 % is usual.", "low": "limits.", "high": "limits."}
    assert texts.items() <= documentation(Inner).items()
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "--speed SPEED how fast, over two lines; 5 % is usual (default: 0.5)" in out
    assert "--high HIGH limits (default: none)" in out


def test_every_setting_of_a_run_is_explained_and_has_a_flag_of_its_own() -> None:
    flags = [leaf.flag for leaf in leaves(RunConfig())]
    assert len(flags) == len(set(flags)) > 50
    assert [leaf.path for leaf in leaves(RunConfig()) if not leaf.text] == []


def test_the_page_on_training_shows_every_setting_and_a_file_that_is_right() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert as_markdown(RunConfig()) in page, "put what as_markdown(RunConfig()) gives into docs/training.md"
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = updated(RunConfig(), tomllib.loads(example))
    assert (config.train.optimizer, config.train.optimizer_options, config.overlays) == ("asam", {"eta": 0.01}, 6)


@pytest.mark.parametrize(
    ("name", "text"), [("run.json", '{"name": "y", "inner": {"low": 2}}'), ("run.toml", 'name = "y"\n[inner]\nlow = 2')]
)
def test_files(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert updated(Outer(), read_settings(tmp_path / name)) == Outer(name="y", inner=Inner(low=2))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no settings file at"):
        read_settings(tmp_path / "a.toml")
    with pytest.raises(ValueError, match=r"a settings file must end with .json or .toml, got 'run.yaml'"):
        read_settings("run.yaml")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON: "):
        read_settings(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold settings by name, got list"):
        read_settings(tmp_path / "a.json")
