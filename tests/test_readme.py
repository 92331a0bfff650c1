"""The examples in README and docs run as written, and what they link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"<!-- This example runs as a test. -->\n```python\n(.*?)```", re.DOTALL)


def run_examples(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names that a page's marked examples leave, run one after the other in an empty folder."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for example in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        exec(compile(example, page.name, "exec"), names)
    return names


def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_examples(ROOT / "README.md", tmp_path, monkeypatch)
    assert (tmp_path / "cup.png").is_file()
    assert len(names["kept"].keep_indices) == 32
    assert "torch.Size" in capsys.readouterr().out


# Lightning's: what it uses of torch and torch is about to remove, and advice that does not fit five batches.
@pytest.mark.filterwarnings("ignore:.*treespec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_files_it_links_to_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_no_number_is_missing() -> None:
    for path in [*PAGES, *(ROOT / "assets").rglob("*.md")]:
        assert "@@" not in path.read_text(encoding="utf-8"), path
