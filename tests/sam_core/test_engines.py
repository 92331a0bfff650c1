"""The table of methods and engines in docs/engines.md says what the engines' own tests find, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sam_core
import test_accelerate
import test_compile
import test_hf_trainer
import test_lightning
from fsdp_cases import FSDP2

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
M_SHARPNESS = [name for name, method in sam_core.METHODS.items() if hasattr(method, "step_m_sharpness")]


def refused(support: dict[str, str]) -> set[str]:
    return {method for method, answer in support.items() if answer.startswith("raises")}


#: By the words of the table's head: the methods that the tests of the engine find refused.
REFUSED = {
    "DDP": set(),  # test_ddp.py and test_dcp.py run every method, and parametrize over all
    "FSDP2": {method for method, reason in FSDP2.items() if reason.startswith("raises")},
    "distributed checkpoint": set(),
    "accelerate": refused(test_accelerate.SUPPORT),
    "Lightning": refused(test_lightning.SUPPORT),
    "Hugging Face": refused(test_hf_trainer.SUPPORT),
    "schedulers, averages": set(),
    "compiled model": set(test_compile.REFUSED["model"]),
    "compiled step": set(test_compile.REFUSED["step"]),
    "both passes one graph": set(test_compile.REFUSED["passes"]),
    "m-sharpness": set(sam_core.METHODS) - set(M_SHARPNESS),
}


def table() -> dict[str, dict[str, str]]:
    """Cells of the page by engine and method."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")
    ]
    head = next(line for line in PAGE.splitlines() if line.startswith("| | [DDP]"))
    engines = re.findall(r"\[([^\]]+)\]\(", head)
    cells = {row[0].strip("`").lower(): row[1:] for row in rows if row[0].strip("`").lower() in sam_core.METHODS}
    return {engine: {method: row[i] for method, row in cells.items()} for i, engine in enumerate(engines)}


def test_all_engines_and_methods_are_there():
    assert list(table()) == list(REFUSED)
    assert all(set(methods) == set(sam_core.METHODS) for methods in table().values())


@pytest.mark.parametrize("engine", REFUSED)
def test_each_cell_is_what_the_tests_find(engine):
    for method, cell in table()[engine].items():
        assert cell.startswith("–" if method in REFUSED[engine] else "✓"), (engine, method)


def test_all_notes_are_there_and_used():
    used = {int(n) for methods in table().values() for cell in methods.values() for n in re.findall(r"\d+", cell)}
    written = {int(n) for n in re.findall(r"^(\d+)\. ", PAGE, re.MULTILINE)}
    assert used == written
