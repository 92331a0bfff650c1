"""Tables of relevance: what is written is read again, in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from arrcoc.scoring import read_scores
from arrcoc.scoring.tables import WRITERS, Layout, Score, part_name


def score(number: int, grid: tuple[int, int] = (2, 3), kept: int = 2) -> Score:
    rng = np.random.default_rng(number)
    return Score(
        number=number,
        image=f"Bücher/{number}.jpg",
        query='a "red"\ncup',
        relevance=rng.random(grid, np.float32),
        logits=rng.normal(0, 10, grid).astype(np.float32),
        kept=np.arange(kept, dtype=np.int32),
    )


SCORES = [score(0), score(1, (3, 1), 0), score(2, (1, 1), 1)]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 6e-7), ("float16", 3e-4)])
def test_round_trip(tmp_path: Path, format: str, precision: str, tolerance: float) -> None:
    layout = Layout(precision=precision, logits=True, kept=True)
    for number in (0, 1):
        WRITERS[format](tmp_path / part_name(number, format), SCORES[number * 2 : number * 2 + 2], layout)
    records = list(read_scores(tmp_path))
    assert len(records) == 3
    for record, expected in zip(records, SCORES, strict=True):
        assert (record["number"], record["image"], record["query"]) == (expected.number, expected.image, expected.query)
        assert record["grid"] == list(expected.relevance.shape)
        assert record["kept"] == (expected.kept.tolist() if expected.kept is not None else None)
        assert record["peak"] == pytest.approx(expected.relevance.max(), abs=tolerance)
        for name, values in (("relevance", expected.relevance), ("logits", expected.logits)):
            read = np.reshape(record[name], record["grid"])
            np.testing.assert_allclose(read, values, atol=tolerance, rtol=5e-4 if precision == "float16" else 1e-7)


def test_columns_are_those_of_the_layout_even_without_rows(tmp_path: Path) -> None:
    names = ["number", "image", "query", "grid", "peak", "relevance"]
    for layout, more in ((Layout(), []), (Layout(logits=True, kept=True), ["logits", "kept"])):
        WRITERS["parquet"](tmp_path / "part-00000.parquet", [], layout)
        schema = pyarrow.parquet.read_schema(tmp_path / "part-00000.parquet")
        assert schema.names == names + more
        WRITERS["parquet"](tmp_path / "part-00000.parquet", SCORES, layout)
        assert pyarrow.parquet.read_schema(tmp_path / "part-00000.parquet").equals(schema)
    WRITERS["parquet"](tmp_path / "part-00000.parquet", SCORES, Layout(precision="float16"))
    relevance = pyarrow.parquet.read_schema(tmp_path / "part-00000.parquet").field("relevance")
    assert str(relevance.type) in ("list<element: halffloat>", "list<item: halffloat>")


def test_json_is_one_object_a_line_with_rows_of_the_map(tmp_path: Path) -> None:
    WRITERS["jsonl"](tmp_path / "part-00000.jsonl", SCORES[:2], Layout(precision="float16"))
    first = json.loads((tmp_path / "part-00000.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["relevance"] == np.round(SCORES[0].relevance.astype(float), 4).tolist()


def test_a_table_that_fails_leaves_nothing(tmp_path: Path) -> None:
    wrong = Score(number=0, image="a", query="b", relevance=np.full((1, 1), np.nan, np.float32), logits=None, kept=None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        WRITERS["jsonl"](tmp_path / "part-00000.jsonl", [wrong], Layout())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"holds no scores: there is no part-\*\.jsonl and no part-\*\.parquet"):
        next(read_scores(tmp_path))
