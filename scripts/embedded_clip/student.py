"""The image tower: efficientnet-lite1 at one size learns the joint tokens of the teacher at three sizes.

The projection starts as the ridge regression of teacher tokens on its features. Then the upper trunk is tuned: for the
words that are strongest in a photo, the tower's map must correlate with the teacher's, and its tokens must be near.
Half of the photos are seen noisy, blurred or in other light while the teacher saw them clean: so the tokens learn not
to mind. BatchNorm stays as it was trained (eval mode), its scales and shifts are tuned.

Axes: B photos, T tokens, J joint width, A anchors, S strongest anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .sources import load_trunk, to_pixels

VERSION = 1
SIZE = 448
_FIRST_TUNED_BLOCK = 5
_STRONGEST = 32
_LR_TRUNK, _LR_HEAD, _DECAY = 1e-4, 4e-4, 1e-3
_BATCH = 8
_RIDGE = 1e-2


class Student(nn.Module):
    """Trunk and linear projection; tokens [B, T, J]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = load_trunk(VERSION)
        self.trunk.classifier = nn.Identity()
        self.head = nn.Linear(1280, width)

    def lower(self, pixels: Tensor) -> Tensor:
        """The part that is not tuned."""
        x = self.trunk.bn1(self.trunk.conv_stem(pixels))
        features: Tensor = self.trunk.blocks[:_FIRST_TUNED_BLOCK](x)
        return features

    def upper(self, x: Tensor) -> Tensor:
        """Features [B, T, 1280] from the lower part's output."""
        features: Tensor = self.trunk.bn2(self.trunk.conv_head(self.trunk.blocks[_FIRST_TUNED_BLOCK:](x)))
        return features.flatten(2).mT

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.head(self.upper(self.lower(pixels)))
        return tokens


def photos_at(paths: Sequence[Path], size: int = SIZE) -> Tensor:
    """Photos [P, 3, size, size] as bytes, to be read once."""
    return torch.stack(
        [((to_pixels(Image.open(path), size) + 1) * 127.5).round().byte() for path in tqdm(paths, desc="photos")]
    )


def _normalise(photos: Tensor) -> Tensor:
    return (photos.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def ridge_start(student: Student, photos: Tensor, teacher: Tensor) -> None:
    """Set the projection to the ridge regression of teacher tokens [P, T, J] on the features."""
    width, target_width, double = 1280, teacher.shape[-1], torch.float64
    gram, cross = torch.zeros(width, width, dtype=double), torch.zeros(width, target_width, dtype=double)
    sums, target_sums, count = torch.zeros(width, dtype=double), torch.zeros(target_width, dtype=double), 0
    for start in tqdm(range(0, len(photos), 8), desc="ridge"):
        x = student.upper(student.lower(_normalise(photos[start : start + 8]))).flatten(0, 1)
        y = teacher[start : start + 8].flatten(0, 1).float()
        gram += (x.T @ x).double()
        cross += (x.T @ y).double()
        sums, target_sums, count = sums + x.sum(0), target_sums + y.sum(0), count + len(x)
    mean, target_mean = sums / count, target_sums / count
    covariance = gram / count - mean[:, None] * mean
    ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(width, dtype=double)
    weight = torch.linalg.solve(covariance + ridge, cross / count - mean[:, None] * target_mean)
    student.head.weight.copy_(weight.T)
    student.head.bias.copy_(target_mean - mean @ weight)


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, blur or other light on half of the photos, pixels in [-1, 1]."""
    out = pixels.clone()
    for number in range(len(out)):
        kind, amount = torch.randint(8, (), generator=generator).item(), torch.rand((), generator=generator).item()
        x = out[number : number + 1]
        if kind == 0:
            x += 0.2 * amount * torch.randn(x.shape, generator=generator)
        elif kind == 1:
            small = F.interpolate(x, scale_factor=1 / (1.5 + 2 * amount), mode="bilinear", antialias=True)
            x.copy_(F.interpolate(small, x.shape[-2:], mode="bilinear"))
        elif kind == 2:
            x.mul_(0.5 + amount)
        elif kind == 3:
            x.add_(0.8 * (amount - 0.5))
    return out.clamp(-1, 1)


def map_loss(tokens: Tensor, target: Tensor, anchors: Tensor) -> Tensor:
    """1 - correlation of the maps of a photo's strongest anchors [A, J], plus half the squared error of the tokens."""
    maps = tokens @ anchors.T
    target_maps = target @ anchors.T
    strongest = target_maps.amax(1).topk(_STRONGEST, dim=-1).indices[:, None].expand(-1, maps.shape[1], -1)
    a = maps.gather(-1, strongest)
    b = target_maps.gather(-1, strongest)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    correlation = F.cosine_similarity(a, b, dim=1)
    return (1 - correlation).mean() + 0.5 * F.mse_loss(tokens, target)


def tune(student: Student, photos: Tensor, teacher: Tensor, anchors: Tensor, *, epochs: int, seed: int) -> None:
    """Tune the upper trunk and the projection towards the teacher's tokens [P, T, J]."""
    generator = torch.Generator().manual_seed(seed)
    student.eval().requires_grad_(False)
    modules = student.trunk.blocks[_FIRST_TUNED_BLOCK:], student.trunk.conv_head, student.trunk.bn2
    tuned = [parameter for module in modules for parameter in module.parameters()]
    for parameter in (*tuned, *student.head.parameters()):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": tuned, "lr": _LR_TRUNK}, {"params": student.head.parameters(), "lr": _LR_HEAD}], weight_decay=_DECAY
    )
    num_steps = epochs * math.ceil(len(photos) / _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )
    for epoch in range(epochs):
        order = torch.randperm(len(photos), generator=generator)
        bar = tqdm(order.split(_BATCH), desc=f"tune {epoch + 1}/{epochs}")
        running = 0.0
        for index in bar:
            pixels, target = _normalise(photos[index]), teacher[index].float()
            flip = torch.rand(len(index), generator=generator) < 0.5
            pixels[flip] = pixels[flip].flip(-1)
            side = math.isqrt(target.shape[1])
            target[flip] = target[flip].unflatten(1, (side, side)).flip(2).flatten(1, 2)
            with torch.no_grad():
                x = student.lower(disturb(pixels, generator))
            loss = map_loss(student.head(student.upper(x)), target, anchors)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}")
