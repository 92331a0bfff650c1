"""The contract of every optimizer, over all methods and two base optimizers, through ``step(closure)``."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

from sam_cases import (
    BASES,
    DEFAULTS,
    METHODS,
    TWO_PASS,
    assert_bitwise,
    copies,
    make_batch,
    make_closure,
    make_model,
    method_class,
)
from sam_core import make_closure as make_batch_closure
from sam_core import make_closures

PASSES = [(method, number) for method in METHODS for number in (1, 2) if (method, number) != ("msam", 2)]
WITH_BACKWARD = [method for method in METHODS if not method_class(method).takes_sample_losses]


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=BASES)
def base(request):
    return request.param


@pytest.fixture
def build(method, base):
    """Builds the optimizer of this case over a model or parameters."""

    def build(params, **options):
        params = params.parameters() if isinstance(params, nn.Module) else params
        return METHODS[method](params, BASES[base][0], **{**BASES[base][1], **options})

    return build


def clean(optimizer, model):
    with optimizer.at_weights():
        return copies(model)


def spoil(closure, model, bad_call, bad):
    """The closure, with a bad gradient in the numbered call of those that build a graph."""
    calls = []

    def spoiled(*indices):
        losses = closure(*indices)
        calls.extend([1] if torch.is_grad_enabled() else [])
        if torch.is_grad_enabled() and len(calls) == bad_call:
            if losses.dim() == 1:
                return losses * bad
            model[2].weight.grad[1, 2] = bad
        return losses

    return spoiled


# What step does to the weights ----------------------------------------------------------------------------------------


def test_rho_zero_is_the_base_optimizer_bit_for_bit(build, method, base):
    model, plain = make_model(), make_model()
    optimizer, calls = build(model, rho=0.0), []
    base_optimizer = BASES[base][0](plain.parameters(), **BASES[base][1])
    for _ in range(4):
        closure = make_closure(model, method=method)
        optimizer.step(lambda closure=closure: (calls.append(1), closure())[1])
        base_optimizer.zero_grad()
        make_closure(plain)()
        base_optimizer.step()
    assert len(calls) == 4
    assert_bitwise(copies(model), copies(plain))


@pytest.mark.parametrize("method", [name for name in TWO_PASS if name in WITH_BACKWARD], indirect=True)
def test_rho_zero_with_gradients_ready_runs_the_closure_once_and_returns_its_loss(build, method, base):
    model, plain = make_model(), make_model()
    optimizer, calls = build(model, rho=0.0), []
    base_optimizer = BASES[base][0](plain.parameters(), **BASES[base][1])
    for _ in range(4):
        closure = make_closure(model)
        optimizer.zero_grad()
        closure()
        loss = optimizer.step(lambda closure=closure: (calls.append(1), closure())[1], grads_ready=True)
        base_optimizer.zero_grad()
        assert loss == make_closure(plain)()
        base_optimizer.step()
    assert len(calls) == 4
    assert_bitwise(copies(model), copies(plain))


def test_weights_come_back_in_place_and_frozen_ones_stay(build, method):
    """Regressions: peers' defects 3 and 13; storage was swapped, frozen parameters were moved and thawed."""
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = build(model, lr=0.0, weight_decay=0.0)
    before, pointers = copies(model), [p.data_ptr() for p in model.parameters()]
    wanted, seen = [p.requires_grad for p in model.parameters()], []
    closure = make_closure(model, method=method)

    def watching(*indices):
        seen.append(copies(model))
        assert [p.requires_grad for p in model.parameters()] == wanted
        return closure(*indices)

    for _ in range(3):
        optimizer.step(watching)
        assert_bitwise(clean(optimizer, model), before)
    assert any(not torch.equal(weights[2], before[2]) for weights in seen)
    assert all(torch.equal(weights[1], before[1]) for weights in seen)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_weights_come_back_when_a_closure_raises(build, method):
    model = make_model()
    optimizer, closure = build(model), make_closure(model, method=method)
    optimizer.step(closure)
    for bad_call in (1, 2):
        before, calls = clean(optimizer, model), []

        def failing(*indices, bad_call=bad_call, calls=calls):
            calls.append(1)
            if len(calls) == bad_call:
                raise KeyboardInterrupt
            return closure(*indices)

        if bad_call == 1 or method not in ("msam", "looksam"):  # those call once
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(failing)
            assert_bitwise(clean(optimizer, model), before)
    optimizer.step(closure)


def test_foreach_is_the_loop_bit_for_bit(build, method):
    results = []
    for foreach in (True, False, None):
        model = make_model()
        optimizer = build(model, foreach=foreach, max_grad_norm=0.1)
        for _ in range(3):
            optimizer.step(make_closure(model, method=method))
        results.append(copies(model))
    assert_bitwise(results[1], results[0])
    assert_bitwise(results[2], results[0])


def test_zero_gradients_give_zero_perturbation(build, method):
    """Regressions: peers' defects 16 and 17, NaN."""
    model = make_model()
    optimizer, closure = build(model, weight_decay=0.0), make_closure(model, method=method)
    before = copies(model)

    def flat(*indices):
        if method_class(method).takes_sample_losses:
            return closure(*indices) * 0
        loss = closure()
        for param in model.parameters():
            param.grad.zero_()
        return loss

    for _ in range(3):
        optimizer.step(flat)
    assert_bitwise(copies(model), before)


@pytest.mark.parametrize("method", TWO_PASS)
def test_gradients_are_left_as_they_are_by_the_first_step(build):
    """Nothing scales ``.grad`` behind the user's back, with a loss scaler or without."""
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = make_model(torch.float32)
        optimizer = build(model)
        make_closure(model, make_batch(dtype=torch.float32), scaler=scaler)()
        grads = [p.grad for p in model.parameters()]
        values = [g.clone() for g in grads]
        optimizer.first_step(grad_scaler=scaler)
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert_bitwise(grads, values)


@pytest.mark.parametrize("method", TWO_PASS)
def test_clipping_leaves_the_perturbation_alone(build):
    moved = []
    for options in ({}, {"max_grad_norm": 1e-3}):
        model = make_model()
        optimizer = build(model, **options)
        make_closure(model)()
        optimizer.first_step()
        moved.append(copies(model))
    assert_bitwise(*moved)


@pytest.mark.parametrize("method", TWO_PASS)
def test_each_group_has_its_own_rho(build, method):
    moves = []
    for rho in (0.1, 0.3):
        model = make_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": rho}]
        optimizer, before = build(groups, rho=0.1), copies(model)
        make_closure(model)()
        optimizer.first_step()
        moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    for position, factor in enumerate((1, 1, 3, 3)):
        torch.testing.assert_close(moves[1][position], factor * moves[0][position], rtol=1e-10, atol=1e-14)


# What a step needs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_BACKWARD)
@pytest.mark.parametrize("value", [{"loss": 1}, 0.0, None])
def test_step_returns_what_the_closure_returns(build, method, value):
    """Regression: peers' defect 14, a loss of 0.0 skipped the step."""
    model = make_model()
    optimizer, before = build(model), copies(model)
    closure = make_closure(model)
    assert optimizer.step(lambda: (closure(), value)[1]) is value
    assert not torch.equal(before[0], copies(model)[0])


def test_no_gradient_at_all(build, method):
    model = make_model()
    optimizer = build(model)
    nothing = torch.zeros(4) if method == "efficientsam" else 0.0
    with pytest.raises(RuntimeError, match=r"^no parameter has a gradient"):
        optimizer.step(lambda: nothing)


def test_sparse_gradients_are_refused(method, base):
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = METHODS[method](layer.parameters(), BASES[base][0], **BASES[base][1])
    closure = make_closure(nn.Sequential(layer), (torch.tensor([1]), torch.tensor([0])), method=method)
    message = r"^gradients must be dense, got a torch\.sparse_coo gradient for parameter 0 with shape \[5, 3\]; build"
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)


def test_groups_schedulers_and_added_groups(build, method, base):
    """Regressions: peers' defects 6 and 14."""
    model, extra = make_model(), nn.Linear(3, 3).double()
    optimizer = build(model)
    optimizer.add_param_group({"params": extra.parameters()})
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.param_groups[1]["rho"] == DEFAULTS[method]["rho"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, optimizer.base_optimizer)]
    before = copies(extra)
    optimizer.step(make_closure(nn.Sequential(model, extra), method=method))
    assert not torch.equal(copies(extra)[0], before[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scheduler in schedulers:
            scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == 2 * [0.25 * BASES[base][1]["lr"]]
    with pytest.raises(ValueError, match=r"^rho must be >= 0, got -1\.$"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1})


# dtypes ---------------------------------------------------------------------------------------------------------------


def test_one_step_over_several_dtypes(build, method):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    optimizer = build(params)

    def closure(*indices):
        losses = sum(param.double().square() for param in params)
        if not method_class(method).takes_sample_losses:
            losses.sum().backward()
        return losses

    for _ in range(3):
        optimizer.step(closure)
    assert [p.dtype for p in params] == list(dtypes)
    assert all(param.isfinite().all() and (param < 1).all() for param in params)


@pytest.mark.parametrize("method", [method for method in WITH_BACKWARD if method != "asam"])
def test_complex_parameter_is_its_real_view(build):
    """Not ASAM, whose |w| is another thing for a complex number than for its two parts."""
    start = torch.tensor([1.0 + 2.0j, -0.5 + 0.25j], dtype=torch.complex128)
    results = []
    for real in (False, True):
        param = nn.Parameter(torch.view_as_real(start).clone() if real else start.clone())
        optimizer = build([param])

        def closure(param=param, real=real):
            values = torch.view_as_complex(param) if real else param
            loss = (values.abs() ** 4).sum() + (values * (2 + 1j)).real.sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(param.detach() if real else torch.view_as_real(param.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


# Bad gradients and loss scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "bad_pass"), PASSES)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_nonfinite_gradients_leave_weights_and_moments(build, method, bad, bad_pass, nonfinite):
    model = make_model()
    optimizer, closure = build(model, nonfinite=nonfinite), make_closure(model, method=method)
    for _ in range(2):  # so that LookSAM's second pass is due again
        optimizer.step(closure)
    before, moments = clean(optimizer, model), copy.deepcopy(optimizer.base_optimizer.state_dict()["state"])
    spoiled = spoil(closure, model, bad_pass, bad)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"^the gradient of parameter \d with shape .* is not finite at w"):
            optimizer.step(spoiled)
    else:
        optimizer.step(spoiled)
    assert optimizer.num_skipped == (nonfinite == "skip")
    assert_bitwise(clean(optimizer, model), before)
    for number, values in optimizer.base_optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert value is moments[number][name] or torch.equal(value, moments[number][name])
    optimizer.step(closure)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(clean(optimizer, model)[0], before[0])


def test_loss_scaling_gives_the_unscaled_steps(build, method):
    """Regression: peers' defect 5. GSAM's and WSAM's two gradients meet on one scale."""
    model, plain, batch = make_model(torch.float32), make_model(torch.float32), make_batch(dtype=torch.float32)
    optimizer, reference = build(model, max_grad_norm=0.5), build(plain, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        reference.step(make_closure(plain, batch, method=method))
        optimizer.step(make_closure(model, batch, method=method, scaler=scaler), grad_scaler=scaler)
        scaler.update()
    assert_bitwise(copies(model), copies(plain))  # a power of two loses no bit
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize(("method", "bad_pass"), PASSES)
def test_loss_scale_falls_after_an_overflow_in_either_pass(build, method, bad_pass):
    model = make_model(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, before = build(model, nonfinite="raise"), copies(model)
    closure = make_closure(model, make_batch(dtype=torch.float32), method=method, scaler=scaler)
    for count in (1, 2):
        optimizer.step(spoil(closure, model, bad_pass, float("inf")), grad_scaler=scaler)
        scaler.update()
        assert scaler.get_scale() == 2.0 ** (10 - count)
        assert optimizer.num_skipped == count
        assert_bitwise(copies(model), before)
    optimizer.step(closure, grad_scaler=scaler)
    scaler.update()
    assert not torch.equal(copies(model)[0], before[0])


def test_one_autocast_region_around_both_passes(build, method):
    """Its cache of cast weights must not carry weights from w to w + perturbation."""
    batch, results = make_batch(dtype=torch.float32), []
    for outside in (True, False):
        model = make_model(torch.float32)
        optimizer, closure = build(model), make_closure(model, batch, method=method)

        def inside(*indices, closure=closure):
            with torch.autocast("cpu", torch.bfloat16):
                return closure(*indices)

        with torch.autocast("cpu", torch.bfloat16) if outside else contextlib.nullcontext():
            for _ in range(3):
                optimizer.step(closure if outside else inside)
        results.append(copies(model))
    assert_bitwise(*results)


# Big batches and batch normalisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_BACKWARD)
def test_accumulation_is_the_big_batch(build):
    """Regression: peers' defect 15, gradients of parts were summed, not averaged."""
    (inputs, targets), loss_fn = make_batch(), nn.functional.cross_entropy
    parts = list(zip(inputs.split((5, 5, 5, 1)), targets.split((5, 5, 5, 1)), strict=True))
    model, whole = make_model(), make_model()
    optimizer, reference = build(model), build(whole)
    for _ in range(3):
        loss = optimizer.step(make_batch_closure(model, parts, loss_fn, optimizer))
        torch.testing.assert_close(loss, reference.step(make_closure(whole)).detach(), rtol=1e-12, atol=0)
    for actual, expected in zip(copies(model), copies(whole), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", WITH_BACKWARD)
def test_running_statistics_follow_the_first_pass_alone(build, method):
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    optimizer, (inputs, targets) = build(model), make_batch()
    means = []
    for _ in range(3):
        means.append(model[0](inputs).detach().mean(0))  # MSAM's only pass is where its parameters are between steps
        optimizer.step(make_batch_closure(model, [(inputs, targets)], nn.functional.cross_entropy, optimizer))
    assert model[1].num_batches_tracked == 3
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0), rtol=1e-12, atol=1e-12)


def test_closures_refuse_what_they_cannot_do():
    model = make_model()
    efficient = METHODS["efficientsam"](model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"^optimizer must take one loss a batch, got EfficientSAM, which selects"):
        make_closures(model, [make_batch()], nn.functional.cross_entropy, efficient)
    sam = METHODS["sam"](model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"^batches must hold at least one sample, got 0 empty ones\.$"):
        make_closures(model, [], nn.functional.cross_entropy, sam)


# Memory and compilation -----------------------------------------------------------------------------------------------


def held_copies(optimizer, model) -> float:
    """Tensors that the optimizer holds beyond parameters, gradients and the base optimizer's state, in weight sizes."""
    known = {id(t) for p in model.parameters() for t in (p, p.grad) if t is not None}
    known |= {id(t) for state in optimizer.base_optimizer.state.values() for t in state.values()}
    entries, queue, seen = 0, [optimizer.__dict__], set()
    while queue:
        value = queue.pop()
        if id(value) in seen or value is optimizer.base_optimizer:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            entries += value.numel() if id(value) not in known else 0
        elif isinstance(value, dict):
            queue += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            queue += value
        elif type(value).__module__.startswith("sam_core."):
            queue.append(vars(value))
    return entries / sum(p.numel() for p in model.parameters())


# An average; the clean weights; g_v, but not before a step that makes it anew (k = 2).
BETWEEN = {"friendlysam": [1, 1, 1], "momentumsam": [1, 1, 1], "msam": [1, 1, 1], "looksam": [1, 0, 1]}
WITHIN = {"gsam": 2, "wsam": 2, "wsam_coupled": 2, "friendlysam": 2, "momentumsam": 2, "looksam": 2}


def test_copies_of_the_weights_in_memory(build, method):
    """One, at most two; and nothing between steps that is not needed."""
    model = make_model()
    optimizer, closure, within = build(model), make_closure(model, method=method), []

    def watching(*indices):
        within.append(held_copies(optimizer, model))
        return closure(*indices)

    between = []
    for _ in range(3):
        optimizer.step(watching)
        between.append(held_copies(optimizer, model))
    assert between == BETWEEN.get(method, [0, 0, 0])
    assert 0 < max(within) <= WITHIN.get(method, 1)


@pytest.mark.parametrize("base", ["sgd"])
def test_compiled_forward(build, method):
    model, plain = make_model(), make_model()
    optimizer, reference = build(model), build(plain)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        optimizer.step(make_closure(compiled, method=method))
        reference.step(make_closure(plain, method=method))
    for actual, expected in zip(copies(model), copies(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_which_methods_may_ascend_on_each_rank_alone():
    """Regression: peers' defect 18. Where the gradient at w enters the update or an average, ranks must share it."""
    local = {method for method in TWO_PASS if method_class(method).local_ascent}
    assert local == {"sam", "asam", "memoryefficientsam"}


def test_the_state_of_another_method_is_refused_and_the_moments_alone_are_not(build, method):
    """Regression: MSAM's weights, saved off their clean place, were loaded into SAM without a word."""
    model = make_model()
    optimizer = build(model)
    optimizer.step(make_closure(model, method=method))
    other = "sam" if method != "sam" else "msam"
    stranger = METHODS[other](model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    before = copy.deepcopy(stranger.state_dict())
    mine, theirs = type(optimizer).__name__, type(stranger).__name__
    with pytest.raises(ValueError, match=rf"^state_dict must be that of {theirs}, got that of {mine}\. To change"):
        stranger.load_state_dict(optimizer.state_dict())
    assert stranger.state_dict().keys() == before.keys() and not stranger.state
    stranger.load_state_dict(optimizer.base_optimizer.state_dict())
    assert len(stranger.state) == len(optimizer.state)
