"""What each dense mode costs, as a ratio to the library's plain forward of one picture: FLOPs and processor time.

The tower is open_clip's ViT-B-16 with random weights: cost does not depend on them. "Authors' code" is the ratio of
FLOPs of each method's own code, counted in the same way. Times are medians of one run in which all take turns.

For example: python scripts/benchmarks/dense_modes.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import positive, run

# FLOPs of the authors' code / plain forward, at 224 and 448 pixels
THEIRS = {
    "raw": (1.00, 1.00),
    "maskclip": (0.99, 0.98),
    "sclip": (1.01, 1.01),
    "clearclip": (0.95, 0.96),
    "naclip": (0.95, 0.96),
    "surgery": (1.06, 1.11),
    "gem": (1.17, 1.48),
}
SIZES = (224, 448)
QUICK = {"width": 64, "layers": 7, "head_width": 32, "patch_size": 32}  # a small tower, for tests


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--quick", action="store_true", help="a tower too small to be timed; for tests")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    import torch

    rows = {mode: [mode] for mode in THEIRS}
    for number, size in enumerate(SIZES):
        plain, modes = _forwards(size, arguments.quick)
        with torch.no_grad():
            whole = _flops(plain)
            flops = {mode: _flops(read) / whole for mode, read in modes.items()}
            first, *others = _interleaved([plain, *modes.values()], arguments.repeats)
        print(f"{size} pixels: plain forward {whole / 1e9:.2f} GFLOP, {first:.2f} s", file=sys.stderr)
        for mode, seconds in zip(modes, others, strict=True):
            rows[mode] += [f"{flops[mode]:.2f}", f"{THEIRS[mode][number]:.2f}", f"{seconds / first:.2f}"]
    print("| mode | FLOPs at 224 | authors' code | time | FLOPs at 448 | authors' code | time |")
    print("| --- " * 7 + "|")
    for row in rows.values():
        print(f"| {' | '.join(row)} |")


def _forwards(size: int, quick: bool) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """open_clip's image embedding of a picture, and tokens in each mode."""
    import open_clip
    import torch

    from arrcoc.backbones import OpenClipBackbone
    from arrcoc.backbones.dense import MODES

    if set(MODES) != set(THEIRS):
        raise ValueError(f"THEIRS must name the dense modes {sorted(MODES)}, got {sorted(THEIRS)}.")
    config = open_clip.get_model_config("ViT-B-16")
    config["vision_cfg"] |= {**(QUICK if quick else {}), "image_size": size}
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 1}  # plays no part
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**config).eval()
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    grey = (0.5, 0.5, 0.5)

    def reader(mode: str) -> Callable[[], object]:
        backbone = OpenClipBackbone(model, open_clip.tokenize, spec="ViT-B-16", mode=mode, mean=grey, std=grey)
        return lambda: backbone(image)

    return lambda: model.encode_image(image), {mode: reader(mode) for mode in THEIRS}


def _flops(forward: Callable[[], object]) -> int:
    """Floating point operations of a call.

    Two things would go uncounted on a CPU: its fused attention, for which the counter has no formula, and the fast path
    of nn.MultiheadAttention, a single operator that it does not look into.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    try:
        with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _interleaved(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median processor seconds of each action, run in turn so that what disturbs one disturbs all."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for action, seconds in zip(actions, times, strict=True):
            started = time.process_time()
            action()
            if repeat:  # the first is a warm-up
                seconds.append(time.process_time() - started)
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    sys.exit(main())
