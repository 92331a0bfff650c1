"""The benchmark of the dense modes: its FLOPs are those of the formulas, and its table is whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from arrcoc.backbones.dense import MODES

PATH = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "dense_modes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dense_modes_script", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attention_is_counted_fused_or_not(script: ModuleType) -> None:
    """Two products of [T, K] and [K, T] a head, and four projections of [T, C]."""
    heads = torch.zeros(1, 2, 50, 16)
    attention = 2 * 2 * 2 * 50 * 50 * 16
    assert script._flops(lambda: F.scaled_dot_product_attention(heads, heads, heads)) == attention
    tokens, layer = torch.zeros(1, 50, 32), torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    with torch.no_grad():
        counted = script._flops(lambda: layer(tokens, tokens, tokens, need_weights=False))
    assert counted == attention + 4 * 2 * 50 * 32 * 32
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_table_names_every_mode(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--quick", "--repeats", "1"]) == 0
    output = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in output.out.splitlines()]
    assert len(rows) == 2 + len(MODES) and {len(row) for row in rows} == {7}
    assert [row[0] for row in rows[2:]] == list(MODES)
    flops = {row[0]: float(row[1]) for row in rows[2:]}
    assert flops["clearclip"] <= flops["raw"] <= flops["surgery"] < flops["gem"]
    assert "224 pixels: plain forward" in output.err and "448 pixels" in output.err


def test_a_mode_without_its_figure_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(script.THEIRS, "gem")
    assert script.main(["--quick"]) == 2
    assert "error: THEIRS must name the dense modes [" in capsys.readouterr().err
