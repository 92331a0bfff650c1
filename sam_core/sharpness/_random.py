"""Every source of random numbers that a model or a loader may draw from, remembered and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Put = Callable[[], object]


class RandomState:
    """The global random state of torch on the CPU and some devices, of Python, and of further sources, as it is now.

    Args:
        devices: whose state counts beside the CPU's.
        others: functions that remember one more source, and return what puts it back.
    """

    def __init__(self, devices: Iterable[torch.device] = (), others: Iterable[Callable[[], Put]] = ()) -> None:
        python, cpu = random.getstate(), torch.get_rng_state()
        self._putters: list[Put] = [
            lambda: random.setstate(python),
            lambda: torch.set_rng_state(cpu),
            *(_remember_device(device) for device in devices if device.type not in ("cpu", "meta")),
            *(remember() for remember in others),
        ]

    def restore(self) -> None:
        """All sources are as they were when this was made."""
        for put in self._putters:
            put()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restores after the block."""
        try:
            yield
        finally:
            self.restore()


@contextmanager
def kept_random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    """Torch's global random state alone, for what is called often: Python's and NumPy's take longer to read."""
    putters = [_remember_device(device) for device in devices if device.type not in ("cpu", "meta")]
    cpu = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for put in putters:
            put()


def random_states_of(loader: Any) -> list[Callable[[], Put]]:
    """For :class:`RandomState`: NumPy's global state, and the generators that a DataLoader shuffles with."""
    samplers = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = (getattr(sampler, "generator", None) for sampler in samplers)
    generators = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return [_remember_numpy, *(lambda g=generator: _remember_generator(g) for generator in generators.values())]


def _remember_device(device: torch.device) -> Put:
    module = torch.get_device_module(device)
    state = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return lambda: module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def _remember_numpy() -> Put:
    numpy = sys.modules.get("numpy")  # who has not imported it does not draw from it
    if numpy is None:
        return lambda: None
    state = numpy.random.get_state()
    return lambda: numpy.random.set_state(state)


def _remember_generator(generator: torch.Generator) -> Put:
    state = generator.get_state()
    return lambda: generator.set_state(state)
