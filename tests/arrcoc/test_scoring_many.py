"""Scoring of many pictures: the records are those of one at a time, in order, whole, and a run that was cut goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import arrcoc.scoring.many as many
from arrcoc import RelevanceScorer
from arrcoc.data.records import Record
from arrcoc.scoring import read_scores, score_many
from scoring_cases import QUERIES, contents, draw, map_of, tiny_scorer, write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 23)


# ---- equal to one at a time


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize(("scales", "num_workers"), [((1.0,), 0), ((1.0,), 2), ((0.5, 1.0, 2.0), 2)])
def test_records_are_those_of_score(
    pictures: list[Path], tmp_path: Path, scales: tuple[float, ...], num_workers: int, format: str
) -> None:
    scorer = tiny_scorer(scales)
    options: dict[str, Any] = {"format": format, "num_workers": num_workers, "batch_size": 3, "part_size": 9}
    summary = score_many(scorer, pictures, QUERIES, output=tmp_path, budget=0.25, logits=True, **options)
    records = list(read_scores(tmp_path))
    assert (summary.num_pictures, summary.num_scored, summary.num_records) == (23, 23, 46)
    assert summary.num_skipped == {} and summary.pictures_per_second == 23 / summary.seconds
    expected = [(number, str(path), query) for number, path in enumerate(pictures) for query in QUERIES]
    assert [(record["number"], record["image"], record["query"]) for record in records] == expected
    for record in records:
        result = scorer.score(record["image"], record["query"])
        assert tuple(record["grid"]) == result.grid
        # batching changes the last bits of float32, six decimals half a unit of the last
        torch.testing.assert_close(map_of(record), result.relevance, atol=2e-6, rtol=0)
        torch.testing.assert_close(map_of(record, "logits"), result.logits, atol=1e-5, rtol=1e-6)
        assert record["kept"] == result.keep(0.25).keep_indices.tolist()
        assert record["peak"] == pytest.approx(result.relevance.max().item(), abs=2e-6)


def test_workers_change_nothing(pictures: list[Path], tmp_path: Path) -> None:
    for num_workers in (0, 1, 2):
        score_many(tiny_scorer(), pictures, QUERIES, output=tmp_path / str(num_workers), num_workers=num_workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_pictures_of_one_shape_share_a_pass_and_texts_are_encoded_once(tmp_path: Path) -> None:
    scorer = tiny_scorer()
    records = [
        Record(name=str(n), image=draw(n, (32, 32)), queries=dict.fromkeys(["red", "blue"][: n % 2 + 1]))
        for n in range(10)
    ]
    score_many(scorer, records, output=tmp_path, batch_size=4, num_workers=0)
    backbone: Any = scorer.model.backbone
    assert (backbone.num_image_passes, backbone.num_encoded_texts) == (3, 2)


def test_each_picture_has_its_own_queries_unless_there_are_some_for_all(tmp_path: Path) -> None:
    records = [
        Record(name="file", image=b"", queries={"red": None}),
        Record(name="picture", image=draw(1, (40, 20)), queries={"green": None, "blue": ()}),
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    records[0] = Record(name="file", image=(tmp_path / "p.png").read_bytes(), queries={"red": None})
    score_many(tiny_scorer(), records, output=tmp_path / "own", num_workers=2)
    asked = [(record["image"], record["query"]) for record in read_scores(tmp_path / "own")]
    assert asked == [("file", "red"), ("picture", "green"), ("picture", "blue")]
    score_many(tiny_scorer(), records, ["blue"], output=tmp_path / "all", num_workers=0)
    assert [record["query"] for record in read_scores(tmp_path / "all")] == ["blue", "blue"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_names_of_any_bytes(tmp_path: Path, format: str) -> None:
    path = tmp_path / os.fsdecode(b"f\xff\xe2\x80\xa8.png")  # not UTF-8, and with a line separator
    draw(0, (8, 8)).save(path.with_name("a.png"))
    path.with_name("a.png").rename(path)
    path.with_name(path.name + "x.png").write_bytes(b"words")
    options: dict[str, Any] = {"format": format, "on_error": "skip", "part_size": 1, "num_workers": 1}
    score_many(tiny_scorer(), tmp_path, ["red"], output=tmp_path / "out", **options)
    score_many(tiny_scorer(), tmp_path, ["red"], output=tmp_path / "out", resume=True, **options)
    (record,) = read_scores(tmp_path / "out")
    assert record["image"] == (str(path) if format == "jsonl" else str(path).replace("\udcff", r"\udcff"))
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == str(path) + "x.png"


def test_the_global_generator_is_left_alone(pictures: list[Path], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    score_many(tiny_scorer(), pictures[:3], QUERIES, output=tmp_path, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- cut and resumed


def run(inputs: Sequence[Path | Record], output: Path, scorer: RelevanceScorer | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"num_workers": 0, "batch_size": 3, "part_size": 5, "budget": 3}
    return score_many(scorer or tiny_scorer(), inputs, QUERIES, output=output, **(defaults | options))


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_run_that_is_cut_goes_on_where_it_was(pictures: list[Path], tmp_path: Path, format: str) -> None:
    run(pictures, tmp_path / "whole", format=format)
    scorer = tiny_scorer()
    plain, calls = scorer.score_images, []

    def cut(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt("cut")
        return plain(*arguments)

    scorer.score_images = cut  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="cut"):
        run(pictures, tmp_path / "cut", scorer, format=format)
    done = contents(tmp_path / "cut")
    assert {name for name in done if name.startswith("part")} == {f"part-{n:05d}.{format}" for n in range(2)}

    fresh = tiny_scorer()
    summary = run(pictures, tmp_path / "cut", fresh, format=format, resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert (summary.num_resumed, summary.num_pictures, summary.num_records) == (10, 23, 46)
    line = str(summary)
    assert line.startswith("23 pictures scored, 46 records; 13 pictures in ") and line.endswith("(10 were done before)")
    backbone: Any = fresh.model.backbone
    assert backbone.num_image_passes <= 13


def test_a_finished_run_is_finished(pictures: list[Path], tmp_path: Path) -> None:
    run(pictures, tmp_path)
    before, scorer = contents(tmp_path), tiny_scorer()
    summary = run(pictures, tmp_path, scorer, resume=True)
    assert (summary.num_resumed, summary.num_pictures) == (23, 23)
    assert contents(tmp_path) == before
    assert scorer.model.backbone.num_image_passes == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_around_the_note_of_a_part(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A part, or a line of skipped.jsonl, that run.json does not name yet is written again and stands once."""
    inputs = [*pictures[:7], tmp_path / "absent.png", *pictures[7:]]
    run(inputs, tmp_path / "whole", on_error="skip")
    with monkeypatch.context() as patch:
        name = "add_part" if when == "before" else "_write"
        plain, calls = getattr(many.RunState, name), []

        def cut(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == (2 if when == "before" else 3):
                (tmp_path / "cut" / ".part-00002.x.jsonl").write_text("what a killed run was writing")
                raise KeyboardInterrupt("cut")
            return plain(*arguments)

        patch.setattr(many.RunState, name, cut)
        with pytest.raises(KeyboardInterrupt, match="cut"):
            run(inputs, tmp_path / "cut", on_error="skip")
    assert (tmp_path / "cut" / "part-00001.jsonl").exists()
    assert (tmp_path / "cut" / "skipped.jsonl").exists() == (when == "after")
    assert run(inputs, tmp_path / "cut", on_error="skip", resume=True).num_resumed == 5
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_first_run_may_be_called_a_resumed_one(pictures: list[Path], tmp_path: Path) -> None:
    assert run(pictures, tmp_path / "new", resume=True).num_resumed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 4}, "budget must be '3', as in the run that is resumed .*, got '4'"),
        ({"budget": 1.0}, r"budget must be '3', as in the run that is resumed .*, got '1\.0'"),
        ({"format": "parquet"}, "format must be 'jsonl', as in the run that is resumed .*, got 'parquet'"),
        ({"precision": "float16"}, "precision must be 'float32', as in the run that is resumed .*, got 'float16'"),
        ({"logits": True}, "logits must be False, as in the run that is resumed .*, got True"),
        ({"part_size": 6}, "part_size must be 5, as in the run that is resumed .*, got 6"),
        (
            {"scorer": tiny_scorer((0.5, 1.0))},
            r"scales must be \[1\.0\], as in the run that is resumed .*, got \[0\.5, 1\.0\]",
        ),
        (
            {"scorer": RelevanceScorer(tiny_scorer().model.zero_shot())},
            "head must be '.{16}', as in the run that is resumed .*, got None",
        ),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(
    pictures: list[Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run(pictures[:7], tmp_path)
    with pytest.raises(ValueError, match=message):
        run(pictures[:7], tmp_path, resume=True, **change)


def test_a_run_is_resumed_with_its_own_queries_model_and_pictures(pictures: list[Path], tmp_path: Path) -> None:
    run(pictures[:12], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"queries must be \['red', 'blue'\], as in the run that is resumed .*, got \['red'\]"
    ):
        score_many(tiny_scorer(), pictures[:12], ["red"], output=tmp_path, budget=3, part_size=5, resume=True)
    other = tiny_scorer()
    with torch.no_grad():
        other.model.backbone.model.basis.mul_(2)
    with pytest.raises(ValueError, match=r"backbone must be '.{16}', as in the run that is resumed .*, got '"):
        run(pictures[:12], tmp_path, other, resume=True)
    swapped = [*pictures[:6], pictures[7], pictures[6], *pictures[8:12]]
    for inputs, range_ in ((swapped, "5 to 9"), (pictures[:9], "5 to 9"), (pictures[:13], "10 to 11")):
        with pytest.raises(ValueError, match=f"pictures {range_}, or their queries, are not the same"):
            run(inputs, tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_nothing_is_overwritten(pictures: list[Path], tmp_path: Path) -> None:
    run(pictures[:3], tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(FileExistsError, match="is not empty: resume the run that is in it, or choose another folder"):
        run(pictures[:3], tmp_path / "a")
    assert contents(tmp_path / "a") == before
    with pytest.raises(ValueError, match=r"holds no run to resume: run\.json is missing"):
        run(pictures[:3], pictures[0].parent, resume=True)
    with pytest.raises(FileExistsError, match="output must be a folder, got the file"):
        run(pictures[:3], pictures[0])
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        run(pictures[:3], tmp_path / "a", resume=True)
    (tmp_path / "a" / "run.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"run\.json must have format 'arrcoc-scores-1', got 'other'"):
        run(pictures[:3], tmp_path / "a", resume=True)


KILLED = """
import sys, time
from pathlib import Path
from arrcoc.scoring import score_many
from scoring_cases import tiny_scorer
scorer = tiny_scorer()
plain = scorer.score_images
def slow(*arguments):
    time.sleep(0.05)
    return plain(*arguments)
scorer.score_images = slow
score_many(scorer, sys.argv[1], ["red", "blue"], output=sys.argv[2], batch_size=3, part_size=10, resume=True)
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 120)
    options: dict[str, Any] = {"batch_size": 3, "part_size": 10}
    score_many(tiny_scorer(), tmp_path / "pictures", QUERIES, output=tmp_path / "whole", **options)
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "pictures"), str(tmp_path / "cut")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for part in (2, 5):
        process = subprocess.Popen(argv, env=environment)
        deadline = time.monotonic() + 120
        while not (tmp_path / "cut" / f"part-{part:05d}.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "part-00011.jsonl").exists()
    subprocess.run(argv, env=environment, check=True, timeout=120)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# ---- broken pictures


@pytest.fixture
def broken(pictures: list[Path], tmp_path: Path) -> list[Path]:
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:60])
    return [
        pictures[0],
        tmp_path / "absent.png",
        pictures[1],
        tmp_path / "words.png",
        tmp_path / "half.png",
        pictures[2],
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_pictures_are_listed_and_counted(broken: list[Path], tmp_path: Path, num_workers: int) -> None:
    summary = run(broken, tmp_path / "out", on_error="skip", part_size=2, num_workers=num_workers)
    assert summary.num_skipped == {"picture missing": 1, "picture unreadable": 2}
    assert (summary.num_pictures, summary.num_scored, summary.num_records) == (6, 3, 6)
    assert str(summary).splitlines()[1:] == ["1 skipped: picture missing", "2 skipped: picture unreadable"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["number"], line["image"]) for line in lines] == [(n, str(broken[n])) for n in (1, 3, 4)]
    assert [line["reason"] for line in lines] == ["picture missing", "picture unreadable", "picture unreadable"]
    for line, words in zip(lines, ("does not exist", "is not a picture", "is damaged"), strict=True):
        assert words in line["error"]
    assert [record["number"] for record in read_scores(tmp_path / "out")] == [0, 0, 2, 2, 5, 5]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_pictures_stop_the_run_and_it_can_go_on_without_them(
    broken: list[Path], tmp_path: Path, num_workers: int
) -> None:
    run(broken, tmp_path / "whole", on_error="skip", part_size=1)
    with pytest.raises(FileNotFoundError, match=r"image '.*absent\.png' does not exist"):
        run(broken, tmp_path / "out", part_size=1, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"image '.*words\.png' is not a picture"):
        run(broken[2:], tmp_path / "other", part_size=1, num_workers=num_workers)
    assert run(broken, tmp_path / "out", part_size=1, on_error="skip", resume=True).num_resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("record", "budget", "reason", "message"),
    [
        (
            Record(name="it", image=b"words", queries={}),
            None,
            "picture unreadable",
            "it: image of 5 bytes is not a picture",
        ),
        (
            Record(name="it", image=draw(0, (32, 32)), queries={}),
            17,
            "budget above the grid",
            r"it: budget must be in \[0, 16\]",
        ),
    ],
)
def test_other_ways_to_be_broken(record: Record, budget: int | None, reason: str, message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budget": budget, "num_workers": 0}
    with pytest.raises(ValueError, match=message):
        score_many(tiny_scorer(), record, ["red"], output=tmp_path / "a", **options)
    summary = score_many(tiny_scorer(), record, ["red"], output=tmp_path / "b", on_error="skip", **options)
    assert summary.num_skipped == {reason: 1} and list(read_scores(tmp_path / "b")) == []


def test_skipped_pictures_are_listed_in_order(tmp_path: Path) -> None:
    """Some are found out before the tower, some after it."""
    sizes = {0: (32, 8), 1: (32, 32), 3: (32, 8)}  # 4, 16 and 4 tokens
    records = [Record(name=str(n), image=draw(n, size), queries={}) for n, size in sizes.items()]
    records.insert(2, Record(name="2", image=b"words", queries={}))
    summary = run(records, tmp_path, budget=5, on_error="skip")
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["number"], line["image"]) for line in lines] == [(0, "0"), (2, "2"), (3, "3")]
    assert summary.num_skipped == {"picture unreadable": 1, "budget above the grid": 2}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_lines_of_a_manifest_are_listed(pictures: list[Path], tmp_path: Path, num_workers: int) -> None:
    manifest = tmp_path / "data.jsonl"
    manifest.write_text(json.dumps({"image": str(pictures[0]), "text": "red"}) + "\nbroken{\n")
    summary = score_many(tiny_scorer(), manifest, output=tmp_path / "out", on_error="skip", num_workers=num_workers)
    assert (summary.num_scored, summary.num_skipped) == (1, {"line unreadable": 1})
    (line,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert line["image"].endswith("data.jsonl, line 2") and "the line is not JSON" in line["error"]


def test_a_picture_without_a_query(pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000\.png: queries must hold at least one text, got none"):
        score_many(tiny_scorer(), pictures, output=tmp_path / "a", num_workers=0)
    records = [
        Record(name="a", image=draw(0, (8, 8)), queries={" ": None}),
        Record(name="b", image=draw(0, (8, 8)), queries={"red": None}),
    ]
    summary = score_many(tiny_scorer(), records, output=tmp_path / "b", num_workers=0, on_error="skip")
    assert summary.num_skipped == {"no query": 1} and summary.num_scored == 1


def test_maps_that_are_not_finite_stop_the_run(pictures: list[Path], tmp_path: Path) -> None:
    scorer = tiny_scorer()
    with torch.no_grad():
        scorer.model.backbone.model.basis.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"000\.png: the relevance logits are not finite"):
        run(pictures, tmp_path, scorer, on_error="skip")


# ---- size


def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    scorer = tiny_scorer()

    def peak(num: int) -> int:
        stream = (Record(name=str(n), image=draw(n, (400 + n % 7, 20 + 5 * (n % 30))), queries={}) for n in range(num))
        tracemalloc.start()
        score_many(scorer, stream, ["red"], output=tmp_path / str(num), num_workers=0, batch_size=4, part_size=20)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(20)  # what is set up once
    small, large = peak(60), peak(300)
    assert large < small + 100_000, (small, large)


# ---- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format must be one of jsonl, parquet, got 'csv'"),
        ({"precision": "int8"}, "precision must be one of float32, float16, got 'int8'"),
        ({"on_error": "ignore"}, 'on_error must be "raise" or "skip", got \'ignore\''),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"part_size": 0}, "part_size must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be >= 0, got -1"),
        ({"budget": 1.5}, r"budget must be a share in \(0, 1\], got 1\.5"),
        ({"budget": -1}, r"budget must be in \[0, \d+\] tokens, got -1"),
    ],
)
def test_settings_are_checked(pictures: list[Path], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pictures, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_inputs_and_queries_are_checked(pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inputs must hold at least one picture, got none"):
        run([], tmp_path / "new")
    with pytest.raises(ValueError, match="got the single string 'red'"):
        score_many(tiny_scorer(), pictures, "red", output=tmp_path / "new")
    with pytest.raises(ValueError, match="queries must hold at least one text, got none"):
        score_many(tiny_scorer(), pictures, [], output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_parquet_without_pyarrow(pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow: pip install 'arrcoc\[parquet\]'\."):
        run(pictures, tmp_path / "new", format="parquet")
    assert not (tmp_path / "new").exists()


def test_progress_is_shown_on_request(pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(pictures, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    run(pictures, tmp_path / "bar", progress=True)
    assert "23 pictures" in capsys.readouterr().err
