"""What every rank of test_planning_ranks.py does: step, count what it calls and holds, write it to its file.

torchrun --standalone --nproc-per-node 2 planning_ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from small_models import LanguageModel, count_collectives, make_distributed

from sam_core import OptimizerWrapper
from sam_core.planning import METHOD_NAMES

COUNTED = {"depth": 3, "width": 8, "hidden": 64, "vocabulary": 64}
BUCKET_BYTES = 2 * 64 * 8 * 4  # two tensors


def count(method: str, sharding: str, **options: Any) -> tuple[list[tuple[str, int]], Any]:
    """Each collective of K steps; and the optimizer."""
    torch.manual_seed(0)
    if sharding == "ddp":
        options["bucket_cap_mb"] = BUCKET_BYTES / 2**20
    step, (_, optimizer) = make_distributed(method, "adamw", sharding, LanguageModel(**COUNTED), **options)
    return [tuple(call) for call in count_collectives(step)], optimizer


def held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes on this rank, from the tensors themselves."""
    state = optimizer.state_dict()["state"].values()
    own = [value for values in state for name, value in values.items() if str(name).startswith("sam_core.")]
    base = [value for values in state for name, value in values.items() if not str(name).startswith("sam_core.")]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {"parameters": num_bytes(params), "base_state": num_bytes(base), "method_state": num_bytes(own)}


def num_bytes(values: Iterable[Any]) -> int:
    """Of this rank's part of tensors of more than one entry: step counts are left out."""
    local = [v.to_local() if isinstance(v, DTensor) else v for v in values if isinstance(v, Tensor) and v.dim() > 0]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen: dict[str, Any] = {"collectives": {}, "held": {}}
    for sharding in ("ddp", "fsdp"):
        for method in METHOD_NAMES:
            collectives, optimizer = count(method, sharding)
            seen["collectives"][f"{method} {sharding}"] = collectives
            if isinstance(optimizer, OptimizerWrapper):
                seen["held"][f"{method} {sharding}"] = held(optimizer)
    seen["collectives"]["sam synchronised"] = count("sam", "ddp", local=False)[0]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
