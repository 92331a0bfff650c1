"""The benchmark of certificates runs, and its page holds what it prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_page_holds_the_table_of_digits(capsys, tmp_path):
    """The smallest model and sample; sums in another order may move the training a little."""
    import certificates

    page = (ROOT / "docs" / "certificates.md").read_text(encoding="utf-8").splitlines()
    picture = tmp_path / "folder" / "picture.png"
    options = ["--parts", "digits", "--widths", "0", "--num-samples", "350", "--picture", str(picture)]
    assert certificates.main(options) == 0
    assert picture.stat().st_size > 10_000
    head, rule, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert page[page.index(head) + 1] == rule
    assert len(rows) == len(certificates.PRIORS)
    for row in map(cells, rows):
        (shown,) = [cells(line) for line in page if line.startswith("| ") and cells(line)[:4] == row[:4]]
        for name, number, expected in zip(cells(head)[4:], row[4:], shown[4:], strict=True):
            limit = {"rel": 0.05, "abs": 2} if name == "KL" else {"abs": 0.03}
            assert float(number) == pytest.approx(float(expected), **limit), (row[:4], name)
