"""sam_core needs torch alone, lists what it offers, and its documented examples run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sam_core

MODULES = [
    module.name
    for module in pkgutil.walk_packages(sam_core.__path__, "sam_core.")
    if not module.name.startswith("sam_core.integrations.")  # each needs its trainer, and is tested beside it
]

BLOCKED = """
import importlib.abc, importlib, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)

sys.path.insert(0, {root!r})
sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
assert not set(sys.modules) & {blocked}
"""


def test_imports_with_torch_alone():
    blocked = {"arrcoc", "open_clip", "timm", "transformers", "torchvision", "einops", "PIL", "matplotlib", "numpy"}
    blocked |= {"safetensors", "tqdm", "scipy", "sklearn", "skimage"}
    root = str(Path(sam_core.__file__).parents[1])
    code = BLOCKED.format(blocked=blocked, root=root, modules=["sam_core", *MODULES])
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_table_of_contents_is_complete():
    assert len(set(sam_core.__all__)) == len(sam_core.__all__)
    assert all(hasattr(sam_core, name) for name in sam_core.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "SAM": sam_core.SAM})
    assert result.failed == 0


def test_methods_are_named_by_their_class():
    assert {"sam": sam_core.SAM, "asam": sam_core.ASAM}.items() <= sam_core.METHODS.items()
    assert all(name == method.__name__.lower() for name, method in sam_core.METHODS.items())
    assert all(issubclass(method, torch.optim.Optimizer) for method in sam_core.METHODS.values())


def test_public_names_have_an_example():
    bases = {"METHODS", "OptimizerWrapper", "VacuousBoundWarning"}  # a table, a base class, a mark
    assert [n for n in sam_core.__all__ if n not in bases and ">>>" not in (getattr(sam_core, n).__doc__ or "")] == []
