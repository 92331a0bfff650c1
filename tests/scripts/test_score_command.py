"""score_tokens over many pictures: what it writes, prints and refuses."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import arrcoc
import score_tokens
from arrcoc.assets import asset_path
from arrcoc.scoring import read_scores
from tiny_open_clip import CONVOLUTION, write_folder

PHOTOS = asset_path("photos") / "images"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"open_clip:local-dir:{write_folder(tmp_path_factory.mktemp('model'), CONVOLUTION)}"


def score(spec: str, output: Path, *argv: str | Path) -> int:
    return score_tokens.main([*map(str, argv), "--model", spec, "--output", str(output)])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = [
        {"image": str(PHOTOS / "rocket.jpg"), "name": "rocket", "text": "a rocket"},
        {"image": "absent.png", "text": "dog"},
        {"image": str(PHOTOS / "coffee.jpg"), "name": "coffee", "queries": [{"text": "a cup"}, {"text": "dog"}]},
    ]
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_folder_becomes_a_table(spec: str, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--query", "a cup", "dog", "--overlays", "1", "--format", format, "--workers", "1"]
    assert score(spec, tmp_path / "out", PHOTOS, *options) == 0
    records = list(read_scores(tmp_path / "out"))
    names = sorted(str(path) for path in PHOTOS.glob("*.jpg"))
    assert [(record["image"], record["query"]) for record in records] == [
        (name, query) for name in names for query in ("a cup", "dog")
    ]
    result = arrcoc.load_scorer(spec).score(names[1], "dog")
    assert records[3]["kept"] == result.keep(0.25).keep_indices.tolist()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"part-00000.{format}", "run.json", "overlays"}
    drawn = {path.name for path in (tmp_path / "out" / "overlays").iterdir()}
    assert drawn == {"000_astronaut_00_a-cup_overlay.png", "000_astronaut_01_dog_overlay.png"}
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("4 pictures scored, 8 records; 4 pictures in ") and out[0].endswith(" pictures/s")
    assert out[1] == f"records are in {tmp_path / 'out'}/part-*.{format}"


def test_a_manifest_asks_for_itself_and_broken_pictures_are_listed(
    spec: str, tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--on-error", "skip", "--logits", "--precision", "float16", "--overlays", "3", "--workers", "0"]
    assert score(spec, tmp_path / "out", manifest, *options) == 0
    records = list(read_scores(tmp_path / "out"))
    asked = [("rocket", "a rocket"), ("coffee", "a cup"), ("coffee", "dog")]
    assert [(record["image"], record["query"]) for record in records] == asked
    assert all("logits" in record for record in records)
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "1 skipped: picture missing"
    assert out[3] == f"skipped pictures are listed in {tmp_path / 'out'}/skipped.jsonl"


def test_a_stopped_run_is_resumed(
    spec: str, tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--part-size", "1", "--workers", "0"]
    assert score(spec, out, manifest, *options) == 2
    assert "absent.png' does not exist." in refusal(capsys)
    assert score(spec, out, manifest, *options) == 2
    assert "is not empty: resume the run that is in it" in refusal(capsys)
    assert score(spec, out, manifest, *options, "--resume", "--query", "dog") == 2
    assert "queries must be None, as in the run that is resumed" in refusal(capsys)
    assert score(spec, out, manifest, *options, "--resume", "--on-error", "skip") == 0
    out = capsys.readouterr().out
    assert "2 pictures scored, 3 records; 2 pictures in " in out and "(1 were done before)" in out


def test_ctrl_c_says_how_to_go_on(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(arrcoc.RelevanceScorer, "score_images", stop)
    with pytest.raises(SystemExit) as caught:
        score(spec, tmp_path / "out", PHOTOS, "--query", "dog", "--workers", "0")
    assert caught.value.code == 130
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().err


def test_queries_come_from_a_file(spec: str, tmp_path: Path) -> None:
    # As Windows writes it; one line holds a separator of Unicode that is not the end of a line.
    (tmp_path / "queries.txt").write_bytes("\ufeffa cup\r\n\r\n dog \na\u2028b\n".encode())
    score(spec, tmp_path / "out", PHOTOS / "coffee.jpg", "--queries", tmp_path / "queries.txt", "--format", "jsonl")
    assert [record["query"] for record in read_scores(tmp_path / "out")] == ["a cup", "dog", "a\u2028b"]


def test_queries_of_another_encoding_are_refused(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "queries.txt").write_bytes("café".encode("latin-1"))
    argv = [str(PHOTOS / "coffee.jpg"), "--model", spec, "--queries", str(tmp_path / "queries.txt")]
    assert score_tokens.main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "--queries must be UTF-8, " in capsys.readouterr().err


def test_shards_ask_for_themselves(spec: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("coffee", "rocket"):
            (tmp_path / "text").write_text(f"a {name}")
            (tmp_path / "json").write_text('{"width": 8}')  # of another program
            tar.add(PHOTOS / f"{name}.jpg", f"{name}.jpg")
            tar.add(tmp_path / "text", f"{name}.txt")
            tar.add(tmp_path / "json", f"{name}.json")
    options = ["--shard-texts", "txt", "--overlays", "1"]
    assert score(spec, tmp_path / "own", tmp_path / "0.tar", *options) == 0
    asked = [(record["image"], record["query"]) for record in read_scores(tmp_path / "own")]
    assert asked == [("coffee.jpg", "a coffee"), ("rocket.jpg", "a rocket")]
    assert len(list((tmp_path / "own" / "overlays").iterdir())) == 1
    assert score(spec, tmp_path / "given", tmp_path / "0.tar", "--query", "dog") == 0
    assert [record["query"] for record in read_scores(tmp_path / "given")] == ["dog", "dog"]


def test_pictures_of_a_manifest_on_request(spec: str, tmp_path: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().splitlines()[2])
    assert score(spec, tmp_path / "out", manifest, "--format", "pictures") == 0
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {
        "000_coffee_00_a-cup.json",
        "000_coffee_01_dog.json",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photo.jpg"], "--query or --queries must be given: only manifests and shards bring queries of their own."),
        ([str(PHOTOS)], "--query or --queries must be given: only manifests and shards bring queries of their own."),
        (["photo.jpg", "--query", "a", "--resume"], "--resume is for tables; add --format jsonl or --format parquet."),
        (["photo.jpg", "--query", "a", "--batch-size", "2"], "--batch-size is for tables; add --format jsonl"),
        (["photo.jpg", "--query", "a", "--queries", "b"], "argument --queries: not allowed with argument --query"),
        (["photo.jpg", "--query", "a", "--workers", "-1"], "argument --workers: must be a whole number >= 0, got '-1'"),
        (["no.jsonl"], "there is no manifest 'no.jsonl'."),
        (["photo.jpg", "--query", " ", "--format", "jsonl"], "a query must be a non-empty string, got ' '."),
        (["photo.jpg", "--queries", "/no/such"], "No such file or directory: '/no/such'"),
        (["photo.jpg", "--queries", "/dev/null"], "--queries must hold one text a line, got none in '/dev/null'."),
    ],
)
def test_refusals(spec: str, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = score(spec, tmp_path / "new", *argv)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "new").exists()
