"""How often the host waits for the device, found without one: looks at values counted, factors followed as CUDA's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_cases import METHODS, make_closure, make_model

#: Looks at values of the device in a step, after the first few, with nonfinite="raise" and with "ignore".
LOOKS = {
    "sam": (5, 0),
    "asam": (6, 0),
    "gsam": (8, 2),
    "wsam": (6, 0),
    "wsam_coupled": (6, 0),
    "friendlysam": (6, 0),
    "looksam": (10, 5),
    "efficientsam": (6, 2),
    "momentumsam": (6, 0),
    "msam": (4, 2),
    "memoryefficientsam": (5, 0),
}
WITHOUT_SECOND_PASS = {"looksam": (6, 3)}  # in the steps between its own
WAITLESS = [method for method, (_, looks) in LOOKS.items() if looks == 0]
BATCH = (torch.ones(4, 5), torch.tensor([0, 1, 2, 0]))


class Watch(TorchDispatchMode):
    """Counts looks at floating-point values, and operators between tensors of several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.looks += func is torch.ops.aten._local_scalar_dense.default and tensors[0].is_floating_point()
        if len({tensor.device for tensor in tensors}) > 1:
            self.mixed.append(str(func))
        return result


@pytest.mark.parametrize("method", METHODS)
def test_looks_at_values(method):
    fewest = WITHOUT_SECOND_PASS.get(method, LOOKS[method])
    for nonfinite, *expected in zip(("raise", "ignore"), fewest, LOOKS[method], strict=True):
        model = make_model(torch.float32)
        optimizer = METHODS[method](
            model.parameters(), torch.optim.SGD, nonfinite=nonfinite, max_grad_norm=1.0, lr=0.1, momentum=0.9
        )
        looks = []
        for _ in range(4):
            with Watch() as watch:
                optimizer.step(make_closure(model, BATCH, method=method))
            looks.append(watch.looks)
        assert sorted(looks[2:]) == expected


def step_on_fake_cuda(method: str, nonfinite: str, base: type[torch.optim.Optimizer], **options: object) -> Watch:
    """Two steps on tensors that say they are CUDA's and hold nothing: a look at a value, or a copy of one, shows."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = nn.Linear(5, 4)
        optimizer = METHODS[method](
            model.named_parameters(), base, nonfinite=nonfinite, max_grad_norm=1.0, lr=0.1, **options
        )
        with Watch() as watch:
            for _ in range(2):
                for half in (optimizer.first_step, optimizer.second_step):
                    for param in model.parameters():
                        param.grad = torch.empty_like(param)
                    half()
    return watch


@pytest.mark.parametrize("method", WAITLESS)
def test_a_graph_can_hold_the_step(method):
    """Neither a look nor a number that the host would have to send."""
    for base, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"capturable": True})):
        watch = step_on_fake_cuda(method, "ignore", base, **options)
        assert (watch.looks, watch.mixed) == (0, [])
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        step_on_fake_cuda(method, "raise", torch.optim.SGD)


def test_a_graph_can_hold_asam_of_weights_alone():
    watch = step_on_fake_cuda("asam", "ignore", torch.optim.SGD, weights_only=True)
    assert (watch.looks, watch.mixed) == (0, [])


@pytest.mark.parametrize("method", ["gsam", "looksam"])
def test_what_looks_at_values_fits_no_graph(method):
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        step_on_fake_cuda(method, "ignore", torch.optim.SGD)
