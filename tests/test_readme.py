"""The README's Python example runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"<!-- This example runs as a test. -->\n```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example.group(1), "README.md", "exec"), names)
    assert (tmp_path / "cup.png").is_file()
    assert len(names["kept"].keep_indices) == 32
    assert "torch.Size" in capsys.readouterr().out


def test_the_files_it_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_no_number_is_missing() -> None:
    for path in [ROOT / "README.md", *(ROOT / "assets").rglob("*.md")]:
        assert "@@" not in path.read_text(encoding="utf-8"), path
