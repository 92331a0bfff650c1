"""Imports go downward only: each file has a level, and imports from lower levels of its package alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEVELS: dict[str, dict[str, int]] = {
    "sam_core": {
        "_checks": 0,
        "_dtensors": 0,
        "_gathered": 1,
        "_tracing": 0,
        "_tensors": 1,
        "ascent": 2,
        "weights": 2,
        "optimizers.wrapper": 1,
        "optimizers.guarded": 2,
        "optimizers.two_pass": 3,
        "optimizers.sam": 4,
        "optimizers.asam": 5,
        "optimizers.averaged": 4,
        "optimizers.checkpointed": 5,
        "optimizers.efficient": 4,
        "optimizers.friendly": 5,
        "optimizers.gsam": 4,
        "optimizers.looksam": 4,
        "optimizers.momentum": 5,
        "optimizers.msam": 3,
        "optimizers.wsam": 4,
        "training.batchnorm": 1,
        "training.checkpointing": 1,
        "training.accumulation": 2,
        "training.ranks": 1,
        "training.loops": 5,
        "training.distributed": 6,
        "integrations.lightning": 5,
        "integrations.hugging_face": 5,
        "tuning.schedule": 5,
        "tuning.layers": 1,
        "tuning.plot": 0,
        "tuning.results": 1,
        "tuning.sweep": 2,
        "planning.costs": 1,
        "planning.memory": 2,
        "planning.communication": 3,
        "planning.recording": 4,
        "bounds.divergences": 1,
        "bounds.risk_certificate": 0,
        "bounds._losses": 0,
        "bounds.pac_bayes": 2,
        "bounds.curvature": 3,
        "bounds.poincare": 3,
        "bounds.certificate": 3,
        "bounds.description_length": 1,
        "sharpness._random": 0,
        "sharpness._batches": 0,
        "sharpness._loss": 1,
        "sharpness.hessian": 2,
        "sharpness.plot": 0,
        "sharpness.lanczos": 0,
        "sharpness.neighborhood": 3,
        "sharpness.landscape": 2,
        "sharpness.trace": 3,
        "sharpness.average": 4,
        "sharpness.density": 4,
        "sharpness.spectrum": 4,
    },
    "arrcoc": {
        "_files": 0,
        "assets": 0,
        "config": 0,
        "settings": 0,
        "flags": 1,
        "tokens": 0,
        "images": 0,
        "viz": 1,
        "data.vocabulary": 0,
        "data.masks": 0,
        "data.sample": 0,
        "data.skips": 0,
        "data.splits": 1,
        "data.queries": 2,
        "data.augment": 1,
        "data.pictures": 1,
        "data.selection": 2,
        "data.regions": 2,
        "data.entries": 3,
        "data.records": 3,
        "data.streams": 4,
        "data.writers": 1,
        "data.manifest": 5,
        "data.folder": 6,
        "data.hugging_face": 6,
        "data.webdataset": 6,
        "data.spec": 7,
        "data.shapes": 1,
        "data.backgrounds": 1,
        "data.layout": 2,
        "data.coco_records": 4,
        "data.coco": 5,
        "data.scenes": 3,
        "data.photos": 6,
        "backbones.dense": 0,
        "backbones.positions": 0,
        "backbones.inputs": 0,
        "backbones.specs": 0,
        "backbones.towers": 1,
        "backbones.base": 2,
        "backbones.sharing": 0,
        "backbones.wrapped": 3,
        "backbones.timm_towers": 2,
        "backbones.convolutional_tower": 2,
        "backbones.open_clip_towers": 3,
        "backbones.open_clip": 4,
        "backbones.hf_towers": 2,
        "backbones.hf_files": 3,
        "backbones.hf": 4,
        "backbones": 5,
        "model.head": 1,
        "model.allocation": 1,
        "model.robustness": 1,
        "model.similarity": 3,
        "model.multiscale": 4,
        "model.saving": 3,
        "model.relevance": 6,
        "evaluation.metrics": 2,
        "evaluation.perturbations": 2,
        "evaluation.results": 2,
        "evaluation.report": 3,
        "evaluation.orientation": 4,
        "scorer": 7,
        "scoring.tables": 1,
        "scoring.state": 1,
        "scoring.prepare": 3,
        "scoring.inputs": 8,
        "scoring.part": 8,
        "scoring.many": 9,
        "evaluation.benchmark": 8,
        "training.batches": 0,
        "training.distributed": 0,
        "training.schedule": 0,
        "training.averaging": 0,
        "training.stopping": 0,
        "training.losses": 1,
        "training.checkpoint": 1,
        "training.record_store": 0,
        "training.token_cache": 1,
        "training.run_log": 1,
        "training.calibration": 2,
        "training.images": 3,
        "training.workers": 1,
        "training.tokens": 7,
        "training.validation": 8,
        "training.part": 8,
        "training.update": 9,
        "training.run_config": 9,
        "training.overlays": 9,
        "training.state": 10,
        "training.trainer": 11,
        "training.run": 12,
    },
}
#: Modules of sam_core that only their users import, and what those need beside torch.
ALSO_NEEDS: dict[str, set[str]] = {
    "integrations.lightning": {"lightning", "pytorch_lightning"},
    "integrations.hugging_face": {"transformers"},
    "tuning.plot": {"matplotlib"},  # imported by the function that draws
    "sharpness.plot": {"matplotlib"},
}
TABLES_OF_CONTENTS = {
    "",
    "data",
    "model",
    "training",
    "evaluation",
    "scoring",
    "optimizers",
    "bounds",
    "sharpness",
    "integrations",
    "tuning",
    "planning",
}


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not (path.name == "__init__.py" and name in TABLES_OF_CONTENTS):
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs; what stands under TYPE_CHECKING is not run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def owner(name: str, package: str, levels: dict[str, int]) -> str | None:
    """The listed module that an imported name belongs to."""
    parts = name.removeprefix(f"{package}.").split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in levels), None)


@pytest.mark.parametrize("package", LEVELS)
def test_every_file_has_a_level(package: str) -> None:
    assert set(modules(package)) == set(LEVELS[package])


@pytest.mark.parametrize("package", LEVELS)
def test_imports_go_downward(package: str) -> None:
    levels = LEVELS[package]
    for name, path in modules(package).items():
        for imported in imports(path):
            if imported.split(".")[0] != package:
                continue
            target = owner(imported, package, levels)
            assert target is not None, f"{name} imports the table of contents {imported}: name the file"
            assert levels[target] < levels[name], f"{name} (level {levels[name]}) imports {target} ({levels[target]})"


def test_sam_core_knows_torch_alone() -> None:
    standard = __import__("sys").stdlib_module_names
    for name, path in modules("sam_core").items():
        allowed = {"torch", "sam_core"} | ALSO_NEEDS.get(name, set())
        for imported in imports(path):
            top = imported.split(".")[0]
            assert top in allowed or top in standard, f"{path.name} imports {top}"
            assert not imported.startswith("sam_core.integrations"), f"{name} imports {imported}"
