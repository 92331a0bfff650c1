"""What the tests of training share: noisy pictures with a colour in each quarter, and loaders of them."""

from __future__ import annotations

import torch

from arrcoc import RelevanceModel, TokenLoader, encode_samples
from arrcoc.data.sample import RelevanceSample

COLOURS = ("red", "green", "blue")


def samples(num: int = 8) -> list[RelevanceSample]:
    """Noisy pictures with one colour in each quarter; "green" is absent from every other one."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(num):
        image = 0.3 * torch.rand(3, 32, 32, generator=generator)
        masks = torch.zeros(3, 32, 32, dtype=torch.bool)
        for channel in range(3):
            if channel == 1 and number % 2:
                continue
            top, left = 16 * (channel // 2), 16 * ((channel + number) % 2)
            image[channel, top : top + 16, left : left + 16] += 0.6
            masks[channel, top : top + 16, left : left + 16] = True
        made.append(RelevanceSample(image=image, queries=COLOURS, masks=masks, name=str(number)))
    return made


def loader(model: RelevanceModel, seed: int = 0, **options: int) -> TokenLoader:
    return encode_samples(model, samples(), seed=seed, **{"batch_size": 3, "num_queries": 2, **options})
