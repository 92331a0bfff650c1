"""The wheel by itself: what is in it, a score with the network cut, sam_core beside torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MAX_MEGABYTES = 40
SHIPPED = ("assets/embedded_clip", "assets/default_head", "assets/photos", "assets/textures")

SCORE = """
import socket
attempts = []
def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("the network is cut")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

import arrcoc
from arrcoc.assets import asset_path
photo = asset_path("photos") / "images" / "coffee.jpg"
result = arrcoc.load_scorer().score(photo, "a cup")
assert max(result.grid) == 16 and result.keep(32).num_kept == 32
assert attempts == [], attempts
print(arrcoc.__file__, photo, sep="\\n")
"""

# numpy is not among torch's requirements, so it is blocked as well.
SAM_CORE = """
import importlib, importlib.machinery, importlib.metadata, pkgutil, re, sys

def requirements(name, known):
    known.add(re.sub("[-_.]+", "-", name).lower())
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        other = re.match("[A-Za-z0-9._-]+", line)[0]
        if "extra ==" not in line and re.sub("[-_.]+", "-", other).lower() not in known:
            requirements(other, known)
    return known

allowed = requirements("torch", set())
blocked = {
    name for name, owners in importlib.metadata.packages_distributions().items()
    if not {re.sub("[-_.]+", "-", owner).lower() for owner in owners} & allowed
} - {"sam_core"} - set(sys.stdlib_module_names)
assert {"numpy", "arrcoc", "timm"} <= blocked and "torch" not in blocked

class Hiding(importlib.machinery.PathFinder):
    # Finds nothing of what is blocked, as if it were not installed: torch looks for numpy and goes on without.

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import torch, sam_core
for module in pkgutil.walk_packages(sam_core.__path__, "sam_core."):
    if not module.name.startswith("sam_core.integrations."):  # each needs the trainer that it is for
        importlib.import_module(module.name)
weight = torch.nn.Parameter(torch.ones(3))
optimizer = sam_core.SAM([weight], torch.optim.SGD, lr=0.1)

def closure():
    loss = weight.square().sum()
    loss.backward()
    return loss

optimizer.step(closure)
assert weight.square().sum() < 3
assert not set(sys.modules) & blocked
print(sam_core.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, behind it, what is installed here but for editable installs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=300)
    # Python reads no further .pth files in a folder that a .pth file adds, so the editable install stays outside.
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    return folder / "bin" / "python"


def run_outside(python: Path, code: str, folder: Path) -> list[str]:
    """Output lines of code run with nothing of the checkout, the caches or the user's settings in reach."""
    hidden = ("PYTHON", "HF_", "TRANSFORMERS_", "TORCH_", "XDG_")
    settings = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [python, "-I", "-W", "ignore", "-c", code],
        cwd=folder,
        env={**settings, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files(top: str) -> set[str]:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"arrcoc", "sam_core"}
    assert "arrcoc/assets/photos/instances.json" in names
    # Every file of the two packages and of the shipped assets, and nothing else.
    expected = {*files("arrcoc"), *files("sam_core"), *(f"arrcoc/{name}" for top in SHIPPED for name in files(top))}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {f"licenses/{name}" for name in ("LICENSE", "NOTICE")} <= {
        name.partition(".dist-info/")[2] for name in names if ".dist-info/licenses/" in name
    }


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_MEGABYTES * 1e6


def test_it_scores_a_photo_with_the_network_cut(python: Path, tmp_path: Path) -> None:
    for path in run_outside(python, SCORE, tmp_path):
        assert Path(path).is_relative_to(python.parents[1]), path


def test_sam_core_needs_torch_alone(python: Path, tmp_path: Path) -> None:
    (path,) = run_outside(python, SAM_CORE, tmp_path)
    assert Path(path).is_relative_to(python.parents[1])
