"""Pictures for the tower: batches of one shape with bounded waiting, workers without weights."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrcoc import load_backbone
from arrcoc.images import as_images
from arrcoc.scoring import prepare as module
from arrcoc.scoring.prepare import Broken, Prepared, Task, batches_of_one_shape, prepare
from scoring_cases import draw, tiny_scorer, write_pictures


def picture(number: int, side: int) -> Prepared:
    return Prepared(number=number, name=str(number), queries=("red",), levels=(np.zeros((side, 8, 3), np.uint8),))


@pytest.mark.parametrize(
    ("sides", "batch_size", "max_waiting", "expected"),
    [
        ([1, 1, 1, 1, 1], 2, 9, [[0, 1], [2, 3], [4]]),
        ([1, 2, 1, 2], 2, 9, [[0, 2], [1, 3]]),
        ([1, 2, 3, 2, 1], 3, 9, [[0, 4], [1, 3], [2]]),
        ([1, 2, 2, 3], 3, 3, [[1, 2], [0], [3]]),  # three wait: the shape with the most goes
        ([1, 2, 3, 4], 3, 3, [[0], [1], [2], [3]]),  # of equals the one that came first
        ([], 2, 2, []),
    ],
)
def test_batches(sides: list[int], batch_size: int, max_waiting: int, expected: list[list[int]]) -> None:
    pictures = (picture(number, side) for number, side in enumerate(sides))
    batches = batches_of_one_shape(pictures, batch_size=batch_size, max_waiting=max_waiting)
    assert [[item.number for item in batch] for batch in batches] == expected


def test_no_more_than_promised_wait() -> None:
    rng = np.random.default_rng(0)
    taken, given = 0, []

    def stream() -> Any:
        nonlocal taken
        for number in range(500):
            taken += 1
            yield picture(number, int(rng.integers(1, 40)))

    for batch in batches_of_one_shape(stream(), batch_size=4, max_waiting=12):
        assert len({item.shape for item in batch}) == 1 and len(batch) <= 4
        given += [item.number for item in batch]
        assert taken - len(given) < 12
    assert sorted(given) == list(range(500))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_are_those_of_the_scorer_to_the_bit(tmp_path: Path, num_workers: int) -> None:
    scorer = tiny_scorer((0.5, 1.0))
    paths = [*write_pictures(tmp_path, 7), tmp_path / "absent.png"]
    broken = Broken(number=8, name="line", queries=(), reason="bad", error=ValueError("bad"))
    tasks = [Task(number=n, name=path.name, queries=("red",), image=path) for n, path in enumerate(paths)]
    ready = list(prepare([*tasks, broken], scorer.model.backbone, scorer.scales, num_workers=num_workers))
    assert [item.number for item in ready] == list(range(9))
    for path, item in zip(paths, ready[:7], strict=False):
        assert isinstance(item, Prepared) and item.queries == ("red",)
        for scale, pixels in zip(scorer.scales, item.levels, strict=True):
            assert torch.equal(as_images(pixels[None]), scorer.preprocess(path, scale=scale))
    assert [item.reason for item in ready[7:] if isinstance(item, Broken)] == ["picture missing", "bad"]


def test_the_stream_is_read_no_further_than_needed() -> None:
    taken = []

    def tasks() -> Any:
        for number in range(100):
            taken.append(number)
            yield Task(number=number, name=str(number), queries=("red",), image=draw(number, (8, 8)))

    ready = prepare(tasks(), tiny_scorer().model.backbone, (1.0,), num_workers=1)
    next(ready)
    assert len(taken) <= 4  # two ahead
    ready.close()


def test_workers_get_settings_without_weights() -> None:
    backbone = load_backbone("embedded")
    light = module._without_weights(backbone)
    assert len(pickle.dumps(light)) < 5000 and not hasattr(light, "model")
    copied = pickle.loads(pickle.dumps(light))
    for size in ((30, 50), (500, 17), (224, 224)):
        assert copied.input_size(*size, scale=1.4) == backbone.input_size(*size, scale=1.4)
    assert list(backbone.parameters())  # still there


KILLED = """
import multiprocessing, os, pathlib, signal, sys
import numpy as np
from arrcoc.scoring.prepare import Task, prepare
from models import TinyBackbone

pictures = (np.zeros((2000, 2000, 3), np.uint8) for _ in range(100))  # more than fits into a pipe
tasks = (Task(number=n, name=str(n), image=picture, queries=("red",)) for n, picture in enumerate(pictures))
ready = prepare(tasks, TinyBackbone(), (1.0,), num_workers=1)
next(ready)
(worker,) = multiprocessing.active_children()
pathlib.Path(sys.argv[1]).write_text(str(worker.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_process_that_they_work_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process says no farewell, and its worker would wait for ever with a copy of the model."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path / "pid"], check=False).returncode == -signal.SIGKILL
    worker = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for yet does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
