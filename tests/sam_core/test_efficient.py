"""EfficientSAM: the weights it draws, the samples it selects, and the sizes of its passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise, copies, make_batch, make_closure, make_model
from sam_core import EfficientSAM


def make_efficient(model, **options):
    return EfficientSAM(model.parameters(), torch.optim.SGD, **{"rho": 0.1, "lr": 0.1, **options})


@pytest.mark.parametrize(
    ("size", "ratio", "selected"), [(16, 0.5, 8), (16, 0.6, 10), (1, 0.5, 1), (2, 0.5, 1), (3, 0.1, 1), (10, 0.7, 7)]
)
def test_efficient_passes_have_the_promised_sizes(size, ratio, selected):
    """Regressions: peers' defect 13; one sample too few, B = 1 failed, B = 2 gave NaN."""
    model, sizes = make_model(), []
    inputs, targets = (x[:size] for x in make_batch())
    closure = make_closure(model, (inputs, targets), method="efficientsam")

    def watching(indices=None):
        losses = closure(indices)
        sizes.append((len(losses), torch.is_grad_enabled()))
        return losses

    loss = make_efficient(model, sample_ratio=ratio).step(watching)
    middle = [(size, False)] if selected < size else []
    assert sizes == [(size, True), *middle, (selected, True)]
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


def test_efficient_selects_what_gets_worst_also_when_maximizing():
    results = []
    for maximize in (False, True):
        model = make_model()
        closure = make_closure(model, method="efficientsam")
        optimizer = make_efficient(model, maximize=maximize)
        optimizer.step(lambda *indices, sign=-1 if maximize else 1, of=closure: sign * of(*indices))
        results.append(copies(model))
    assert_bitwise(results[1], results[0])


def test_efficient_ties_still_give_the_promised_number():
    model, sizes = make_model(), []
    inputs, targets = (x[:1].repeat_interleave(8, 0) for x in make_batch())
    closure = make_closure(model, (inputs, targets), method="efficientsam")

    def watching(indices=None):
        sizes.append(8 if indices is None else len(indices))
        return closure(indices)

    make_efficient(model).step(watching)
    assert sizes == [8, 8, 4]


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.75, 1.0])
def test_efficient_moves_the_drawn_weights_alone_and_differentiates_only_these(ratio):
    model, moved, wanted = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3)).double(), [], []
    optimizer = make_efficient(model, perturbation_ratio=ratio, rho=0.05)
    closure, before = make_closure(model, method="efficientsam"), []

    def watching(indices=None):
        now = copies(model)
        if optimizer.in_second_pass and torch.is_grad_enabled():
            moved.append([not torch.equal(a, b) for a, b in zip(now, before[0], strict=True)])
            length = torch.cat([(a - b).flatten() for a, b in zip(now, before[0], strict=True)]).norm()
            torch.testing.assert_close(length.item(), 0.05, rtol=1e-9, atol=0)
        elif torch.is_grad_enabled():
            before[:] = [now]
        return closure(indices)

    real_grad = torch.autograd.grad
    torch.autograd.grad = lambda outputs, inputs, **options: (
        wanted.append(list(inputs)),
        real_grad(outputs, inputs, **options),
    )[1]
    try:
        for _ in range(20):
            optimizer.step(watching)
    finally:
        torch.autograd.grad = real_grad
    params = list(model.parameters())
    assert moved == [[any(p is q for q in drawn) for p in params] for drawn in wanted]
    assert {sum(flags) for flags in moved} == {max(1, round(ratio * 8))}
    assert ratio == 1.0 or len({tuple(flags) for flags in moved}) > 4  # another draw each step
    if ratio == 0.5:
        assert all(4 <= sum(flags[i] for flags in moved) <= 16 for i in range(8))  # each about as often


def test_efficient_draws_depend_on_seed_and_step_alone():
    torch.manual_seed(0)
    first = [make_efficient(make_model(), seed=seed)._draw() for seed in range(6)]
    state = torch.get_rng_state()
    optimizer = make_efficient(make_model(), seed=3)
    assert [p.shape for p in optimizer._draw()] == [p.shape for p in first[3]]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(p.shape for p in drawn) for drawn in first}) > 1
    resumed = make_efficient(make_model())
    resumed.load_state_dict(optimizer.state_dict())
    assert [p.shape for p in resumed._draw()] == [p.shape for p in first[3]]


def test_efficient_skips_parameters_that_the_loss_does_not_use():
    model, unused = make_model(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = EfficientSAM([*model.parameters(), unused], torch.optim.SGD, rho=0.1, lr=0.1)
    for _ in range(5):
        optimizer.step(make_closure(model, method="efficientsam"))
    assert_bitwise([unused], [torch.ones(3, dtype=torch.float64)])


def test_efficient_is_the_base_optimizer_where_all_that_may_be_drawn_is_frozen():
    model, plain = make_model(), make_model()
    model[2].requires_grad_(False)
    plain[2].requires_grad_(False)
    groups = [{"params": model[0].parameters(), "perturb": False}, {"params": model[2].parameters()}]
    optimizer = EfficientSAM(groups, torch.optim.SGD, rho=0.1, lr=0.1)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.step(make_closure(model, method="efficientsam"))
        base.zero_grad()
        make_closure(plain)()
        base.step()
    assert_bitwise(copies(model), copies(plain))


def test_efficient_two_step_form_moves_the_drawn_weights():
    results = []
    for form in ("closure", "two_step"):
        model = make_model()
        optimizer = make_efficient(model, sample_ratio=1.0)
        for _ in range(3):
            if form == "closure":
                optimizer.step(make_closure(model, method="efficientsam"))
            else:
                make_closure(model)()
                optimizer.first_step(zero_grad=True)
                make_closure(model)()
                optimizer.second_step(zero_grad=True)
        results.append(copies(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_efficient_refuses():
    model = make_model()
    optimizer, closure = make_efficient(model), make_closure(model, method="efficientsam")
    with pytest.raises(ValueError, match=r"^grads_ready must be False for EfficientSAM: it needs each sample's loss"):
        optimizer.step(closure, grads_ready=True)
    with pytest.raises(
        ValueError, match=r"^closure must return one loss a sample, a tensor \[B\] with B >= 1, got shape \[\]"
    ):
        optimizer.step(make_closure(model))
    with pytest.raises(ValueError, match=r"^closure must return one loss a sample, .*, got None\.$"):
        optimizer.step(lambda: None)
    before = copies(model)
    with pytest.raises(ValueError, match=r"^closure must return one loss a sample, .*, got 3\.0\.$"):
        optimizer.step(lambda indices=None: closure() if not optimizer.in_second_pass else 3.0)
    assert_bitwise(copies(model), before)
    with pytest.raises(ValueError, match=r"^closure must be given, got None"):
        make_closure(model)()
        optimizer.step()
